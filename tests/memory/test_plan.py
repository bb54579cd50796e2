"""Plans: what fits, what is fastest, what is said where nothing fits; activations here are a line written down, not measured."""

import json
import re
import shlex
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

from redheart.cli import app
from redheart.config import load_config
from redheart.memory import plan as room
from redheart.memory.activations import Activations, MicroStep
from redheart.memory.budget import CONTEXT, gib
from redheart.memory.launches import UPDATE, WAITS
from redheart.memory.plan import GIB, Card, Request, parameters_of, plan, predict
from redheart.memory.show import command
from redheart.memory.states import STRATEGIES, TRAITS, Parameters, partition_sizes, states
from redheart.schema import RedHeartError

MB = 10**6
LINES = {  # bytes a sample and at zero samples, FLOPs a sample: as measured for these presets at 64 tokens in bf16
    ("330m", False): (31 * MB, 117 * MB, 44.6e9),
    ("330m", True): (5 * MB, 120 * MB, 53.9e9),
    ("1b3", False): (63 * MB, 476 * MB, 177.6e9),
    ("1b3", True): (9 * MB, 477 * MB, 214.6e9),
}


@pytest.fixture(autouse=True)
def known_activations(monkeypatch):
    def line(config, tokens, checkpointing, dtype, autocast=False):
        slope, fixed, flops = LINES[(config.preset, checkpointing)]
        factor = tokens / 64 * (2 if dtype == torch.float32 else 1)

        def at(n):
            peak = int(factor * (fixed + slope * n))
            return MicroStep(
                peak, peak + 600 * MB, peak, 200_000 * n, int(flops * n), 5_300 if checkpointing else 4_700
            )

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


@pytest.mark.parametrize(("preset", "gpu"), [("330m", 1.5), ("1b3", 4.0)])
def test_the_smallest_cards_hold_the_presets(preset: str, gpu: float):
    """And what the command asks for is what was planned: the same strategy, micro-batch and recomputation, within the same promise."""
    found = plan(load_config(preset), gpu, 32.0)
    best = found.chosen
    assert best.gpu_peak <= gpu * GIB
    words = shlex.split(command(found, preset, ()))
    asked = load_config(preset, [value for option, value in pairwise(words) if option == "--set"])
    assert asked.memory.gpu_memory_gib == gpu
    assert asked.memory.strategy == best.strategy
    assert asked.training.global_batch_size == best.micro_batch_size * best.gradient_accumulation_steps
    assert asked.training.micro_batch_size == best.micro_batch_size
    assert asked.model.activation_checkpointing == best.activation_checkpointing


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
    only = ("zero2_offload_8bit",)
    for gpu, host in ((3.0, 2.0), (0.3, 40.0), (0.3, 2.0), (None, 2.0)):
        with pytest.raises(RedHeartError, match="smallest budget that works is --") as error:
            _ = plan(load_config("330m"), gpu, host, strategies=only).chosen
        told = str(error.value).split("that works is ")[1]
        named = {name: float(size) for name, size in re.findall(r"--(gpu|host)-memory ([0-9.]+)GiB", told)}
        assert named.keys() == {n for n, small in (("gpu", (gpu or 9) < 1), ("host", host < 3)) if small}
        candidates = {}
        for more in (0.01, -0.02):  # what is named works, and nothing smaller
            sizes = {"gpu": gpu, "host": host, **{name: size + more for name, size in named.items()}}
            candidates[more] = [
                c for c in plan(load_config("330m"), sizes["gpu"], sizes["host"], strategies=only).candidates if c.fits
            ]
        assert candidates[-0.02] == []
        names = {
            f"with {c.strategy}, micro-batch {c.micro_batch_size}{', recomputing' * c.activation_checkpointing}"
            for c in candidates[0.01]
        }
        assert any(told.endswith(name) for name in names)


def test_a_budget_that_is_named_as_enough_is():
    for gpu, host in ((1.0, 16.0), (8.0, 1.0), (0.5, 0.5), (None, 0.8)):
        with pytest.raises(RedHeartError, match="smallest budget that works is --") as error:
            _ = plan(load_config("330m"), gpu, host).chosen
        for way in str(error.value).split("that works is ")[1].split("; or "):
            named = {name: gib(size, name) for name, size in re.findall(r"--(gpu|host)-memory ([0-9.]+GiB)", way)}
            assert plan(load_config("330m"), named.get("gpu", gpu), named.get("host", host)).chosen.fits
    words = shlex.split(command(plan(load_config("330m"), 8.0, 123.4321), "330m", ()))
    asked = load_config("330m", [value for option, value in pairwise(words) if option == "--set"])
    assert asked.memory.host_memory_gib == pytest.approx(123.4321, abs=1e-3)


@pytest.mark.parametrize(
    ("setting", "gpu", "missing"),
    [
        ("optimizer.name=adamw", 8.0, {s for s in STRATEGIES if s.endswith("8bit")}),
        ("optimizer.name=adamw_8bit", 8.0, {"plain"}),
        ("optimizer.name=adamw_8bit", None, {"gpu_8bit", "zero1", "zero2", "zero3"}),
        ("training.compile=regional", 8.0, {"zero3", "zero3_offload_8bit"}),
        ("memory.swap=[analyzers.emotion]", 8.0, {*STRATEGIES} - {"plain"}),
    ],
)
def test_a_plan_offers_no_strategy_that_train_would_refuse(setting, gpu, missing):
    config = load_config("330m", ["memory.strategy=plain", setting])
    assert {c.strategy for c in plan(config, gpu, 64.0).candidates} == {*STRATEGIES} - missing


def test_settings_that_no_strategy_runs_are_named():
    swapped = load_config("330m", ["memory.strategy=plain", "memory.swap=[analyzers.emotion]"])
    with pytest.raises(RedHeartError, match=r"memory\.swap in training needs memory\.strategy=plain"):
        plan(swapped, 8.0, 64.0, gpus_per_node=2)


CONFIG = load_config("330m", ["training.precision=bf16"])
PARAMETERS = parameters_of(CONFIG)
STEP = MicroStep(1000 * MB, 1600 * MB, 1024 * MB, 7 * MB, 3 * 10**12, 10_500, 660 * MB, 11 * MB, 23 * MB)


def predicted(strategy, accumulation, **more):
    return predict(Request(CONFIG, strategy, 8, accumulation, False, STEP, PARAMETERS, **more))


def test_a_candidates_bytes_and_peaks_by_hand():
    found = predicted("zero2", 8)
    assert found == predicted("zero2", 8, nodes=1, gpus_per_node=1)
    assert not found.fits  # before a plan has looked at it
    s = states("zero2", parameters_of(load_config("330m")), accumulation=8)
    assert {k: found.gpu[k] for k in s.gpu} == s.gpu
    more = {k: v for k, v in found.gpu.items() if k not in s.gpu}
    # rounding, half-used segments, fragments
    allocator = 24 * MB + 64 * 2**20 + 2 * PARAMETERS.largest + int(0.05 * (1000 * MB + s.gpu["buckets"]))
    assert more == {
        "activations": 1000 * MB, "inputs": 7 * MB, "workspace": 64 * 2**20, "allocator": allocator, "context": CONTEXT,
    }  # fmt: skip
    terms = sum(found.gpu.values())
    stepping = terms - 1007 * MB - s.gpu["buckets"] + s.step
    assert found.gpu_peak == max(terms, stepping, s.gpu_start + 64 * 2**20 + allocator + CONTEXT)
    measured = room.HOST_BASE_GPU + room.HOST_ENGINE_GPU + room.HOST_BF16_GPU
    assert predicted("zero2", 8, base=1).host == {**s.host, "base": measured}
    base = measured + room.HOST_DATA  # what a training has, and one step alone has not
    assert found.host == {**s.host, "base": base}
    starting = s.host_start + room.HOST_STARTING_GPU + room.HOST_DATA
    assert predicted("zero2", 8, gpus_per_node=4).host_peak == 4 * max(base, starting)
    once = predicted("plain", 1)  # gradients grow while activations shrink: together as measured
    assert once.gpu["gradients"] == 660 * MB
    assert once.gpu["activations"] == int(room.CUDA_AUTOCAST * 940 * MB)
    assert once.host["base"] == base - room.HOST_ENGINE_GPU
    late = predicted(
        "zero1", 1
    )  # all gradients, a bucket for them and one piece of them all, when the backward pass is over
    after = states("zero1", PARAMETERS).after
    assert late.gpu["gradients"] + late.gpu["activations"] == max(1600 * MB, 660 * MB + after)
    assert late.gpu["allocator"] == 24 * MB + 64 * 2**20 + 2 * PARAMETERS.largest + int(0.05 * 1000 * MB) + after
    assert predicted("plain", 2).gpu["gradients"] == 4 * parameters_of(load_config("330m")).total


@pytest.mark.parametrize("has_bf16", [True, False])
def test_what_a_cpu_keeps_beside_the_tensors(has_bf16: bool, monkeypatch: pytest.MonkeyPatch):
    """Small pieces stay in the heap, an engine and the libraries of matrix products keep their own, and every rank has all of it."""
    monkeypatch.setattr(room, "bf16_is_fast", lambda device: has_bf16)
    found, other = (predicted("zero1", 1, on_cpu=True, base=300 * MB, gpus_per_node=n) for n in (1, 2))
    assert found.host["allocator"] == 23 * MB
    assert predicted("zero2_offload", 1, on_cpu=True, base=0).host["allocator"] == 11 * MB
    assert found.host["base"] == 300 * MB + room.HOST_ENGINE
    assert found.host["kernels"] == (room.HOST_KERNELS_BF16 if has_bf16 else room.HOST_KERNELS)
    assert other.host_peak >= 2 * sum(other.host.values())
    least = MicroStep(1, 1, 1, 0, 1, 1)
    request = Request(CONFIG, "zero2_offload_8bit", 8, 1, False, least, PARAMETERS, on_cpu=True, base=MB)
    most = request.states.gpu_start + request.states.host_start
    assert (
        predict(request).host_peak == most + MB + room.HOST_STARTING
    )  # split masters need most while the engine starts


def test_a_candidates_times_by_hand():
    n, tensors = PARAMETERS.total, PARAMETERS.count
    one = predicted("zero2", 8).times_s
    launches = 8 * (10_500 + 4 * tensors) + UPDATE
    assert one == pytest.approx(
        {
            "compute": 8 * 3e12 / 20e12,
            "launches": launches * 40e-6,
            "waits": WAITS * 15e-6,
            "optimizer": 32 * n / 250e9,
        },
        rel=1e-6,
    )
    down_and_up = predicted("zero2_offload_8bit", 8).times_s
    assert down_and_up["optimizer"] == pytest.approx(18 * n / 20e9, rel=1e-6)
    assert down_and_up["pcie"] == pytest.approx(
        (4 + 2 + 15 * 2) * n / 12e9, rel=1e-6
    )  # partial sums 8 times down, 7 times up
    assert predicted("zero2_offload", 8).times_s["pcie"] == pytest.approx(6 * n / 12e9, rel=1e-6)
    assert "network" not in one
    cpu = predicted("zero2_offload_8bit", 8, on_cpu=True).times_s
    assert cpu == pytest.approx(
        {"compute": 8 * 3e12 / 2e9, "launches": 0, "waits": 0, "optimizer": 18 * n / 20e9}, rel=1e-6
    )
    for strategy, passes in (("zero1", 2), ("zero2", 9), ("zero3", 24)):
        cards = predicted(strategy, 8, gpus_per_node=4).times_s["network"]
        assert cards == pytest.approx(passes * 2 * n * 3 / 4 / 10e9, rel=1e-6), strategy
        nodes = predicted(strategy, 8, nodes=2, gpus_per_node=4).times_s["network"]
        assert nodes == pytest.approx(passes * 2 * n * 7 / 8 / (3e9 * 4), rel=1e-6), strategy


def test_a_step_counts_the_launches_and_waits_of_every_tensor():
    """By hand, after DeepSpeed 0.19.8: with offload and 16-bit sums a gradient takes 4 launches a micro-step (into the bucket; up, added,
    down) and 3 a step (norm, cast, to the host), and the host reads all norms at once."""
    tensors = PARAMETERS.count
    card = Card(operation_s=1e-6, wait_s=1e-3)
    times = predicted("zero2_offload_8bit", 4, card=card).times_s
    assert times["launches"] == pytest.approx((4 * (10_500 + 4 * tensors) + 3 * tensors + UPDATE) * 1e-6)
    assert times["waits"] == pytest.approx(WAITS * 1e-3)
    assert predicted("plain", 4, card=card).times_s["waits"] == pytest.approx(WAITS * 1e-3)
    few = Parameters(tuple((sum(group),) for group in PARAMETERS.groups))  # the same elements in two tensors
    flat = predict(Request(CONFIG, "zero2_offload_8bit", 8, 4, False, STEP, few, card))
    assert flat.times_s["waits"] == pytest.approx(WAITS * 1e-3)
    assert flat.times_s["launches"] == pytest.approx((4 * (10_500 + 4 * 2) + 3 * 2 + UPDATE) * 1e-6)
    bound = predicted("zero2_offload_8bit", 4, card=Card(operation_s=1e-6, wait_s=1.0))
    assert bound.bound == "waits"
    assert bound.step_s > WAITS + 0.5  # nothing hides a wait


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
    assert sum(partition_sizes(parameters, 64, 2)) * 64 == sum(padded)
    assert sum(partition_sizes(parameters, 64, 3)) == sum(-(-n // 64) for g in parameters.groups for n in g)


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
    assert {"breakdown_gib", "bound", "fits", "host_pinned_gib"} <= set(told["candidates"][0])


def test_what_is_page_locked_is_the_offloaded_strategies_and_within_the_host():
    """Gradients, masters and copies of what is offloaded to a host with a GPU; never 8-bit states or a master's remainder."""
    parameters = Parameters(((3 * 2**20, 2**20), (1024,)))
    n = parameters.total
    for strategy, traits in TRAITS.items():
        for master in ("split", "fp32"):
            found = states(strategy, parameters, master=master)
            assert (found.pinned > 0) == traits.offload
            assert states(strategy, parameters, master=master, on_cpu=True).pinned == 0
            movable = sum(found.host.values()) - found.pinned
            assert movable >= (2 * n if traits.offload else 0)  # two bytes of states at least
    split = states("zero2_offload_8bit", parameters)
    assert (
        sum(split.host.values()) - split.pinned == split.host["states"] + n
    )  # the rest can be moved: states, remainders


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
