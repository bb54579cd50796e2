"""Plans: what fits, what is fastest, what is said where nothing fits; activations here are a line written down, not measured."""

import json

import pytest
import torch
from typer.testing import CliRunner

from redheart.cli import app
from redheart.config import load_config
from redheart.memory import plan as room
from redheart.memory.activations import Activations, MicroStep
from redheart.memory.budget import gib
from redheart.memory.plan import GIB, parameters_of, plan, ranks_hold
from redheart.memory.states import TRAITS
from redheart.schema import RedHeartError

MB = 10**6
LINES = {  # bytes a sample and at zero samples, FLOPs a sample: as measured for these presets at 64 tokens in bf16
    ("330m", False): (34.5 * MB, 15.3 * MB, 44.6e9),
    ("330m", True): (16.7 * MB, 15.3 * MB, 51.9e9),
    ("1b3", False): (80.9 * MB, 78.1 * MB, 177.6e9),
    ("1b3", True): (45.2 * MB, 78.1 * MB, 206.6e9),
}


@pytest.fixture(autouse=True)
def known_activations(monkeypatch):
    def line(config, tokens, checkpointing, dtype, autocast=False):
        slope, fixed, flops = LINES[(config.preset, checkpointing)]
        factor = tokens / 64 * (2 if dtype == torch.float32 else 1)

        def at(n):
            peak = int(factor * (fixed + slope * n))
            return MicroStep(peak, peak + 600 * MB, peak, 200_000 * n, int(flops * n), 10_500)

        return Activations(at(4), at(12), (4, 12))

    monkeypatch.setattr(room, "activations", line)


def chosen(preset, gpu, host=32.0, **more):
    return plan(load_config(preset), gpu, host, **more).chosen


def test_330m_at_8_gib_fits_with_margin_and_does_not_recompute():
    best = chosen("330m", 8.0)
    assert best.gpu_peak < 7.9 * GIB
    assert best.gpu["activations"] > 0
    assert not best.activation_checkpointing


def test_330m_at_4_gib_and_1b3_at_8_gib_fit():
    assert chosen("330m", 4.0).gpu_peak <= 4 * GIB
    best = chosen("1b3", 8.0, host=48.0)
    assert best.gpu_peak <= 8 * GIB
    assert TRAITS[best.strategy].offload


def test_1b3_with_zero2_offload_8bit_and_recomputation_fits_8_gib():
    found = plan(load_config("1b3"), 8.0, 48.0, strategies=("zero2_offload_8bit",))
    assert any(c.fits and c.activation_checkpointing for c in found.candidates)


def test_nothing_fits_1_gib_and_the_smallest_budget_that_works_is_named():
    with pytest.raises(RedHeartError, match=r"smallest budget that works is --gpu-memory ([0-9.]+)GiB") as error:
        _ = chosen("330m", 1.0)
    named = float(str(error.value).split("--gpu-memory ")[1].split("GiB")[0])
    assert chosen("330m", named + 0.01).gpu_peak <= (named + 0.01) * GIB
    with pytest.raises(RedHeartError):
        _ = chosen("330m", named - 0.02)


def test_a_host_that_is_too_small_is_named_too():
    found = plan(load_config("330m"), 3.0, 2.0, strategies=("zero2_offload_8bit",))
    with pytest.raises(RedHeartError, match="--host-memory"):
        _ = found.chosen


def test_the_chosen_is_the_fastest_that_fits_and_sums_its_batch():
    found = plan(load_config("330m"), 8.0, 32.0)
    best = found.chosen
    assert best.step_s == min(c.step_s for c in found.candidates if c.fits)
    for c in found.candidates:
        assert c.micro_batch_size * c.gradient_accumulation_steps == 64
        assert c.samples_per_s == pytest.approx(64 / c.step_s)
        assert (
            c.gpu_peak >= sum(c.gpu.values()) > 0
        )  # all terms at once, or the optimizer's step, or DeepSpeed's set-up
        assert c.fits == (c.gpu_peak <= 8 * GIB and c.host_peak <= 32 * GIB)
    assert {c.fits for c in found.candidates} == {True, False}


def test_more_memory_is_never_slower():
    speeds = [chosen("330m", size).samples_per_s for size in (4.0, 6.0, 8.0, 16.0)]
    assert speeds == sorted(speeds)


def test_a_cpu_run_has_one_memory():
    found = plan(load_config("330m"), None, 24.0)
    assert {c.gpu_peak for c in found.candidates} == {0}
    assert "gpu_8bit" not in {c.strategy for c in found.candidates}
    assert found.chosen.host_peak <= 24 * GIB


def test_ranks_share_what_zero_partitions():
    one = plan(load_config("1b3"), 80.0, 2000.0, strategies=("zero2_offload_8bit",)).candidates[0]
    many = plan(load_config("1b3"), 80.0, 2000.0, 8, 8, strategies=("zero2_offload_8bit",)).candidates[0]
    assert many.host["states"] * 64 == pytest.approx(one.host["states"], rel=0.01)
    assert many.gpu["weights"] == pytest.approx(one.gpu["weights"], rel=1e-4)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(RedHeartError, match="cannot be shared by 7 ranks"):
        plan(load_config("330m"), 8.0, 16.0, 7, 1)


def test_partitions_of_64_ranks_are_deepspeeds():
    """The same rule written out again: pad to 2 × ranks, cut into equal parts; stage 3 pads every parameter."""
    parameters = parameters_of(load_config("1b3"))
    padded = [-(-sum(g) // 128) * 128 for g in parameters.groups]
    assert ranks_hold(load_config("1b3"), 64)["zero2"] * 64 == sum(padded)
    assert ranks_hold(load_config("1b3"), 64)["zero3"] == sum(-(-n // 64) for g in parameters.groups for n in g)


def test_the_command_prints_json(tmp_path):
    done = CliRunner().invoke(
        app, ["plan", "--preset", "330m", "--gpu-memory", "8GiB", "--host-memory", "16GiB", "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert set(told["chosen"]) == {
        "strategy", "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing",
        "gpu_peak_gib", "host_peak_gib", "samples_per_s",
    }  # fmt: skip
    assert told["chosen"]["gpu_peak_gib"] < 8
    assert {"breakdown_gib", "bound", "fits"} <= set(told["candidates"][0])


def test_the_command_draws_a_table_and_bars(capfd):
    done = CliRunner().invoke(app, ["plan", "--preset", "330m", "--gpu-memory", "8GB", "--host-memory", "16"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("text", "value"), [("8GiB", 8.0), ("8", 8.0), ("512MiB", 0.5), ("8GB", 8e9 / 2**30)])
def test_sizes_are_read(text, value):
    assert gib(text, "--gpu-memory") == value


@pytest.mark.parametrize("text", ["", "many", "-1GiB", "0", "8 potatoes"])
def test_other_sizes_are_refused(text):
    with pytest.raises(RedHeartError, match="--gpu-memory"):
        gib(text, "--gpu-memory")
