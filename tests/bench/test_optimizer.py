"""`redheart bench optimizer` on few parameters: every figure is there, and what does not depend on time is right."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from redheart.bench import optimizer
from redheart.bench.optimizer import LINK, _Link, _nearest, relative_error_by_decade
from redheart.cli import app
from redheart.train.engine.machinery import import_machinery

NAMES = {"cpu_adamw_8bit", "deepspeed_cpu_adam", "deepspeed_cpu_adam_bf16", "torch_fused_adamw", "bitsandbytes_cpu"}


@pytest.mark.parametrize(("master", "bytes_kept", "bytes_moved"), [("split", 3, 12), ("fp32", 2, 18)])
def test_the_command_prints_every_figure(master: str, bytes_kept: int, bytes_moved: int):
    size = ["--params", "65536", "--threads", "1", "--rounds", "1", "--master", master]
    done = CliRunner().invoke(app, ["bench", "optimizer", *size, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    for figure in ("ns_per_param", "state_bytes_per_param", "peak_temporary_bytes_per_param"):
        assert set(result[figure]) == NAMES
    assert result["params"] == 65536
    assert result["threads"] == 1
    state = result["state_bytes_per_param"]
    assert state["cpu_adamw_8bit"] == bytes_kept + 9 / 256
    assert state["deepspeed_cpu_adam_bf16"] == 4
    assert state["deepspeed_cpu_adam"] == state["torch_fused_adamw"] == 8
    ns = result["ns_per_param"]
    assert result["ratio_to_deepspeed"] == ns["cpu_adamw_8bit"] / ns["deepspeed_cpu_adam"]
    assert result["ratio_to_bitsandbytes"] == ns["cpu_adamw_8bit"] / ns["bitsandbytes_cpu"]
    assert result["ratio_to_deepspeed_with_copy"] < result["ratio_to_deepspeed"]
    assert result["share_of_bandwidth"].keys() == {"cpu_adamw_8bit"}
    assert result["ratio_to_deepspeed_bf16"] == ns["cpu_adamw_8bit"] / ns["deepspeed_cpu_adam_bf16"]
    assert result["bytes_per_param"]["deepspeed_cpu_adam"] == 28
    assert result["bytes_per_param"]["cpu_adamw_8bit"] == bytes_moved + 18 / 256


def test_without_avx512_every_kernel_is_compiled_for_avx2(monkeypatch: pytest.MonkeyPatch):
    import_machinery()
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.ops.op_builder.builder import OpBuilder

    for name in ("cpu_arch", "simd_width"):
        monkeypatch.setattr(OpBuilder, name, getattr(OpBuilder, name))  # put back afterwards
    optimizer._build_for_avx2()
    arguments = CPUAdamBuilder().cxx_args()
    assert {"-march=x86-64-v3", "-D__AVX256__"} <= set(arguments)
    assert not {"-march=native", "-D__AVX512__"} & set(arguments)


def test_other_instructions_are_refused(monkeypatch: pytest.MonkeyPatch):
    done = CliRunner().invoke(app, ["bench", "optimizer", "--instructions", "sse"])
    assert done.exit_code != 0
    assert "choose native or avx2" in str(done.exception or done.output)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    done = CliRunner().invoke(app, ["bench", "optimizer", "--instructions", "avx2"])
    assert "has no AVX2" in str(done.exception or done.output)


def test_relative_errors_are_those_of_the_codes():
    errors = relative_error_by_decade(blocks=64)
    root, linear = errors["exp_avg_sq_root"], errors["exp_avg_sq_root"]["linear"]
    # eight decades leave a 3-bit mantissa: half a step is 1/16 to 1/32 of the value, evenly spread, in every decade
    assert all(1 / 16 / math.sqrt(12) < e < 1 / 8 / math.sqrt(12) for e in root["ours_nearest"])
    assert linear[0] < root["ours"][0] < linear[2] < linear[3]
    assert root["ours"][0] == pytest.approx(root["ours_nearest"][0] * math.sqrt(2), rel=0.1)  # twice the variance
    assert max(errors["exp_avg"]["ours_nearest"]) < 1 / 100  # of the ratio to that root, whatever it was rounded to


def test_nearest_is_nearest():
    code = torch.tensor([0.5, -1.0, 0.0])
    assert _nearest(torch.tensor([-0.6, -0.4, 0.2, 0.3, 9.0]), code).tolist() == [-1.0, 0.0, 0.0, 0.5, 0.5]


def test_what_an_assumed_link_has_left_when_a_step_ends(monkeypatch: pytest.MonkeyPatch):
    """A step of four seconds that finishes halves of 1.5 seconds of the link after one second and after four: the second is left."""
    now = [0.0]
    monkeypatch.setattr(optimizer.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(optimizer, "has_gpu", lambda: False)
    half = int(1.5 * LINK / 2)

    def step(given) -> None:
        began = now[0]
        now[0] = began + 1.0
        given(0, half)
        now[0] = began + 4.0
        given(half, 2 * half)

    link = _Link(None)
    for _ in range(3):  # the first warms up
        link.used_by(step)
    told = link.told(step_ns=3.5e9 / (2 * half), whole_s=3.0, n=2 * half)
    assert told["link"] == "assumed"
    assert told["hidden_share"] == pytest.approx(0.5)
    assert told["gb_per_s"] == pytest.approx(12)
    assert told["step_in_stretches"] == pytest.approx(4 / 3.5)
