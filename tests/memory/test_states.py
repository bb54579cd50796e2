"""States are arithmetic: DeepSpeed's own estimators, DeepSpeed's own partitions and the design's table are the oracles."""

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from redheart.config import load_config
from redheart.memory.plan import parameters_of
from redheart.memory.states import (
    GROUP,
    STRATEGIES,
    TRAITS,
    ZERO3_PERSISTENCE,
    Parameters,
    adam_bytes,
    chunked,
    partition_sizes,
    states,
    sub_group_sizes,
)
from redheart.train.engine import parameter_groups
from redheart.train.engine.base import in_chunks

EVEN = Parameters(((1 << 20, 3 << 18), (1 << 10,)))  # divides by every world size used here


@pytest.mark.parametrize("world_size", [1, 4, 64])
def test_zero2_without_offload_agrees_with_deepspeeds_estimator(world_size):
    n = EVEN.total
    theirs = estimate_zero2_model_states_mem_needs(n, world_size, 1, cpu_offload=False)[1]
    ours = states("zero2", EVEN, world_size).gpu
    # theirs counts bf16 gradients beside fp32 ones (18 = 2 + 4 + 4 + 8); the compact fp32 buffer has no bf16 beside it
    mine = sum(ours[k] for k in ("weights", "master", "gradients", "states"))
    assert mine + 2 * n // world_size == theirs


def test_zero2_offload_agrees_with_deepspeeds_estimator():
    n = EVEN.total
    cpu, gpu = estimate_zero2_model_states_mem_needs(n, 1, 1, cpu_offload=True, additional_buffer_factor=1.0)
    ours = states("zero2_offload", EVEN, 1, on_cpu=True)
    assert ours.gpu["weights"] == gpu
    assert ours.host["master"] + ours.host["gradients"] + ours.host["states"] == cpu  # 16 a parameter


@pytest.mark.parametrize("world_size", [1, 8])
def test_zero3_agrees_with_deepspeeds_estimator(world_size):
    n, largest = EVEN.total, EVEN.largest
    _, gpu, layer = estimate_zero3_model_states_mem_needs(n, largest, world_size, 1, cpu_offload=False)
    ours = states("zero3", EVEN, world_size)
    mine = sum(ours.gpu[k] for k in ("weights", "master", "gradients", "states"))
    # theirs, 18: 2 weights, 4 master, 8 moments and 4 fp32 gradients, where ours has 2: those in fp32 are a sub-group's, in `step`
    assert mine == gpu - layer - 2 * n // world_size


def test_eight_bit_states_take_two_bytes_and_scales():
    assert adam_bytes([256, 1], True) == 2 * 257 + 2 * 9
    assert adam_bytes([256, 1], False) == 8 * 257


def test_host_bytes_per_parameter_are_those_of_the_design():
    n = EVEN.total
    for master, most in (("split", 7.04), ("fp32", 10.04)):
        s = states("zero2_offload_8bit", EVEN, 1, on_cpu=True, master=master)
        whole = sum(s.host.values()) + s.gpu["weights"]  # which on a CPU are the 16-bit copy
        assert whole / n == pytest.approx(most + 2 * (master == "fp32"), abs=0.01)
    pinned = states("zero2_offload_8bit", EVEN, 1).host
    unpinned = 2 * n + 2 * n + n + pinned["states"]  # the upper halves, their gradients, the lower halves
    assert unpinned / n == pytest.approx(7.04, abs=0.01)
    for master, kept in (("fp32", 2 * n), ("split", 0)):
        host = states("zero2_offload_8bit", EVEN, 1, accumulation=2, on_cpu=True, master=master).host
        assert host.get("accumulation", 0) == kept


@pytest.mark.parametrize("ranks", [1, 4])
def test_what_is_passing_is_the_sum_of_its_buffers(ranks):
    """Buckets, the optimizer's step and DeepSpeed's set-up, in bf16 with buckets smaller than the largest parameter."""
    n, largest, bucket = EVEN.total, EVEN.largest, 1000
    most, part = sum(EVEN.groups[0]) // ranks, EVEN.total // ranks  # a rank's share of the larger group, and of both
    found = {s: states(s, EVEN, ranks, bucket=bucket) for s in STRATEGIES if s != "plain" or ranks == 1}
    two = 2 * bucket * (1 + (ranks > 1))  # a bucket in bf16 and, where ranks reduce together, a copy of it
    start = 2 * n + max(
        2 * most * ranks, 4 * part + 2 * most
    )  # a group's weights flattened, or its clone and the masters
    small = sum(n for group in EVEN.groups for n in group if n < ZERO3_PERSISTENCE)
    let_go = 2 * (n - small) * (ranks > 1)
    for strategy, buckets, step, at_start in (
        ("gpu_8bit", two, 0, start),
        ("zero2", two, 0, start),
        ("zero2_offload", two + 2 * largest, 0, 2 * n + 2 * most * ranks),  # sums are fp32: nothing is cast
        ("zero2_offload_8bit", two + 2 * largest, 0, 2 * n + 2 * most * ranks),
        # of the larger sub-group, the gradient, cast; a bucket stays, and of what was gathered the small parameters
        ("zero3", 2 * 2 * bucket + 4 * largest, (4 + 2) * most + 2 * bucket - let_go, (2 + 4) * part),
        ("zero3_offload_8bit", 2 * 2 * bucket + 4 * largest, 2 * bucket - let_go, 2 * part),
    ):
        s = found[strategy]
        assert (s.gpu["buckets"], s.step, s.gpu_start) == (buckets, step, at_start), strategy
        assert (s.partition, s.weights) == (part, part if strategy.startswith("zero3") else n), strategy
        assert (s.growing, s.after) == (0, 0), strategy
    one = found["zero1"]  # keeps every gradient, and takes them through the bucket at the end
    assert (one.growing, one.after, one.gpu["gradients"]) == (1, two + 2 * part, 0)  # and puts them into one piece
    assert one.step == (4 + 2) * most - 2 * (n - part) + 2 * bucket
    again = states("zero1", EVEN, ranks, bucket=bucket, accumulation=2)
    assert (again.growing, again.after, again.gpu["gradients"]) == (0, two + 2 * part, 2 * n)
    assert states("zero1", EVEN, ranks, bucket=bucket, on_cpu=True).after == two  # which takes memory as it is written
    in_fp32 = states("zero2", EVEN, ranks, "fp32", bucket=bucket)
    assert (in_fp32.growing, in_fp32.gpu["gradients"], in_fp32.step) == (0, 4 * part, 4 * most)
    written = states("zero2", EVEN, ranks, "fp32", bucket=bucket, on_cpu=True)
    assert (written.growing, written.gpu["gradients"], written.step) == (1 / ranks, 0, 4 * most)
    assert found["zero2"].host_start == found["zero1"].host_start == 2 * n
    masters = (1 << 23) // ranks + 4096 // ranks  # pinned: the next power of two of each group's
    copies = masters // 2
    assert found["zero2_offload"].host_start == max(2 * n, 4 * most + masters, 2 * masters + copies)
    assert found["zero3_offload_8bit"].host_start == 2 * part + 2 * most
    halves = masters // 2
    assert found["zero2_offload_8bit"].host_start == max(2 * n, 2 * most + halves, 2 * halves + copies)
    on_cpu = states("zero2_offload", EVEN, ranks, bucket=bucket, on_cpu=True)
    assert (on_cpu.gpu_start, on_cpu.host_start) == (2 * n + 2 * most + 10 * part, 0)
    # weights are gathered when the sums are gone
    assert on_cpu.step == (2 * most * ranks if ranks > 1 else 0) - 4 * part
    summed = states("zero2", EVEN, ranks, "fp32", bucket=bucket, accumulation=2)
    assert (summed.gpu["gradients"], summed.step) == (2 * 4 * part, 4 * most)
    summed = states("zero2", EVEN, ranks, "fp32", bucket=bucket, accumulation=2, on_cpu=True)
    assert (summed.gpu["gradients"], summed.step) == (4 * part, 4 * most - 4 * part)
    three = states("zero3", EVEN, ranks, "fp32", bucket=bucket)
    assert (three.gpu["master"], three.step) == (4 * part, 4 * most + 4 * bucket - 2 * let_go)
    gathers, copies_too = (states("zero3", EVEN, ranks, on_cpu=on_cpu).gpu["gathered"] for on_cpu in (False, True))
    assert (gathers, copies_too) == ((0, 0) if ranks == 1 else (2 * n, 4 * n))
    if ranks == 1:
        assert (found["plain"].step, found["plain"].gpu_start, found["plain"].growing) == (0, 4 * n, 1)


def test_large_groups_are_cut_where_a_parameter_ends():
    sizes = [30, 30, 30, 200, 5, 5]
    chunks = chunked(sizes, 64)
    assert [list(c) for c in chunks] == [[0, 1], [2], [3], [4, 5]]
    assert [i for c in chunks for i in c] == list(range(len(sizes)))
    assert [len(c) for c in chunked([7], 64)] == [1]
    model = torch.nn.ParameterList([torch.empty(n, device="meta") for n in (GROUP, 3, GROUP - 3, 1)])
    groups = in_chunks([{"params": list(model), "weight_decay": 0.5}])
    assert [sum(p.numel() for p in g["params"]) for g in groups] == [GROUP, GROUP, 1]
    assert {g["weight_decay"] for g in groups} == {0.5}
    parts = partition_sizes(Parameters(((GROUP, 3, GROUP - 3, 1),)), 1, 2)
    assert parts == [GROUP, GROUP, 2]


def test_pinned_buffers_are_powers_of_two(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    host = states("zero2_offload_8bit", Parameters(((1000,), (10,)))).host
    assert host["gradients"] == 2048 + 32
    assert host["master"] == 2048 + 32 + 1010  # remainders are not pinned


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "plain"])
def test_more_ranks_never_need_more(strategy):
    def per_rank(world_size):
        s = states(strategy, EVEN, world_size)
        return sum(s.gpu.values()) + sum(s.host.values())

    needs = [per_rank(w) for w in (1, 2, 4, 8)]
    assert needs == sorted(needs, reverse=True)


def test_eight_bit_is_smaller_everywhere():
    pairs = {
        s: s.removesuffix("_8bit")
        for s in STRATEGIES
        if s.endswith("offload_8bit") and s.removesuffix("_8bit") in TRAITS
    }
    assert pairs
    for strategy, wide in pairs.items():
        assert TRAITS[strategy].eight_bit
        assert states(strategy, EVEN).host["states"] < states(wide, EVEN).host["states"] / 3.9


def test_the_groups_are_the_optimizers():
    from redheart.model.build import build_model

    config = load_config("local")
    with torch.device("meta"):
        groups = parameter_groups(build_model(config, None), 0.01)
    assert parameters_of(config).groups == tuple(tuple(p.numel() for p in g["params"]) for g in groups)


def test_sub_groups_hold_every_element_once():
    sizes = Parameters(((60_000_000, 60_000_000, 5), (7,)))
    assert sub_group_sizes(sizes, 1) == [120_000_000, 5, 7]
    assert partition_sizes(sizes, 64, 3) == [-(-60_000_000 // 64) * 2 + 1, 1]


def test_plain_agrees_with_accelerates_estimator():
    """Weights in any precision, and fp32 AdamW in all (its `step`: 4 × the weights). Accelerate knows no ZeRO, no 8-bit states,
    no master weights beside bf16 ones, no activations, and counts buffers, whose size its own sum is relieved of here."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes, compute_module_sizes

    from redheart.model.build import build_model

    config = load_config("local")
    parameters = parameters_of(config)
    with torch.device("meta"):
        model = build_model(config, None)
    buffers = compute_module_sizes(model, buffers_only=True)[""]
    size = calculate_maximum_sizes(model)[0] - buffers
    ours = states("plain", parameters).gpu
    assert ours["weights"] == size
    gradients = states("plain", parameters, accumulation=2).gpu["gradients"]
    assert ours["weights"] + gradients + ours["states"] == estimate_training_usage(size, "float32")["step"]
    in_bf16 = compute_module_sizes(model.to(torch.bfloat16))[""] - compute_module_sizes(model, buffers_only=True)[""]
    assert states("zero1", parameters, 1).gpu["weights"] == pytest.approx(in_bf16, abs=8)  # ours: padded to 2 a group


def test_8_bit_states_that_optimizer_name_asks_for_are_reckoned():
    wide, narrow = states("plain", EVEN).gpu["states"], states("plain", EVEN, eight_bit=True).gpu["states"]
    assert wide == 8 * EVEN.total
    assert narrow == pytest.approx(2.03 * EVEN.total, rel=0.01)
    assert states("zero1", EVEN, eight_bit=True).gpu["states"] < states("zero1", EVEN).gpu["states"] / 3.9
    assert states("zero2_offload_8bit", EVEN, eight_bit=True) == states("zero2_offload_8bit", EVEN)
