"""`redheart bench optimizer` on few parameters: every figure is there, and what does not depend on time is right."""

import json
import math

import pytest
from typer.testing import CliRunner

from redheart.bench.optimizer import _nearest, relative_error_by_decade
from redheart.cli import app

NAMES = {"cpu_adamw_8bit", "deepspeed_cpu_adam", "torch_fused_adamw", "bitsandbytes_cpu"}


def test_the_command_prints_every_figure():
    done = CliRunner().invoke(
        app, ["bench", "optimizer", "--params", "65536", "--threads", "1", "--rounds", "1", "--json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    for figure in ("ns_per_param", "state_bytes_per_param", "peak_temporary_bytes_per_param"):
        assert set(result[figure]) == NAMES
    assert result["params"] == 65536
    assert result["threads"] == 1
    state = result["state_bytes_per_param"]
    assert state["cpu_adamw_8bit"] == 2 + 8 / 256
    assert state["deepspeed_cpu_adam"] == state["torch_fused_adamw"] == 8
    ns = result["ns_per_param"]
    assert result["ratio_to_deepspeed"] == ns["cpu_adamw_8bit"] / ns["deepspeed_cpu_adam"]
    assert result["ratio_to_bitsandbytes"] == ns["cpu_adamw_8bit"] / ns["bitsandbytes_cpu"]
    assert result["ratio_to_deepspeed_with_copy"] < result["ratio_to_deepspeed"]
    assert result["bytes_per_param"]["deepspeed_cpu_adam"] == 28


def test_relative_errors_are_those_of_the_codes():
    errors = relative_error_by_decade(blocks=64)
    ours, linear = errors["exp_avg"]["ours_nearest"], errors["exp_avg"]["linear"]
    # a 3-bit mantissa: half a step is 1/16 to 1/32 of the value, evenly spread
    assert all(1 / 16 / math.sqrt(12) < e < 1 / 8 / math.sqrt(12) for e in ours[:4])
    assert linear[0] < ours[0] < linear[2] < linear[3]
    assert errors["exp_avg"]["ours"][0] == pytest.approx(
        ours[0] * math.sqrt(2), rel=0.1
    )  # stochastic: twice the variance


def test_nearest_is_nearest():
    import torch

    code = torch.tensor([0.5, -1.0, 0.0])
    assert _nearest(torch.tensor([-0.6, -0.4, 0.2, 0.3, 9.0]), code).tolist() == [-1.0, 0.0, 0.0, 0.5, 0.5]
