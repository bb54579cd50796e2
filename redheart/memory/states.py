"""Bytes of weights, gradients, buckets and optimizer states of every strategy, on the GPU and on the host: integer arithmetic.

    states(strategy, parameters, world_size, precision, accumulation) -> States

Read in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py). n: parameters, p = ⌈n / ranks⌉ of each group: what one rank
updates, b: bytes of a weight in training (2 in bf16, 4 in fp32).

ZeRO-1 and -2, `DeepSpeedZeroOptimizer`
  __init__          group by group (engine/base.py: at most GROUP elements each) one flat copy of its weights while the old ones
                    live, then a clone of the own part and its fp32 master (4·p, on the host with offload) with a 16-bit buffer
                    beside it (b·p, offload only)
  initialize_optimizer_states   an fp32 gradient of the own part (4·p, offload only; zeros, which cost memory once written)
  setup_buckets     the whole reduce_bucket_size per micro-step; allreduce_bucket copies a full one. A gradient larger than a bucket would
                    be cloned, and kept until the backward pass is over: a bucket holds the largest one (bucket_of)
  async_accumulate_grad_in_cpu_via_gpu   offload and accumulation > 1: a buffer per parameter on the host (b·p), kept
  _build_compact_grad_partition_buffer   grad_accum_dtype fp32 on bf16: 4·p on the GPU from the first reduction to the step
  copy_grads_in_partition, independent_gradient_partition_epilogue   no offload: b·p per micro-step (in stage 1 once all gradients are
                    there), made at once, so that on a GPU it counts from the first reduction on, on a CPU as it is written; and with
                    accumulation > 1 the sum so far (b·p) beside it
  step              no offload: a flat fp32 gradient (4·p); the optimizer makes its states in the first step
ZeRO-3, `DeepSpeedZeroOptimizer_Stage3`
  weights b·p, on a GPU put together on the host; fp32 master 4·p and, with offload, its gradient 4·p; grad_partitions_flat_buffer b·p
  beside them; one bucket, kept;
  gathered weights: at most max_live_parameters, the prefetched ones and what stays below param_persistence_threshold
With split masters (engine/split_master.py: 8-bit states, offload, bf16) master and gradient are 2·p each, the remainders p; there is
no 16-bit buffer and no accumulation buffer, and on the CPU the masters are the weights.
Pinned buffers take what device.pinned_bytes says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from redheart.config import RunConfig
from redheart.device import pinned_bytes
from redheart.sections import Strategy

REDUCE_BUCKET = 5_000_000  # elements at least (bucket_of); DeepSpeed's default of 5e8 is 1 GB in bf16
ZERO3_PREFETCH = 20_000_000  # elements gathered ahead
ZERO3_MAX_LIVE = 200_000_000  # elements gathered at once
ZERO3_SUB_GROUP = 100_000_000  # elements the optimizer steps at once
ZERO3_PERSISTENCE = 100_000  # parameters smaller than this stay gathered
ADAM_8BIT_BLOCK = 256  # elements that share two fp32 scales and a byte
MASTER_BYTES = {"fp32": 4, "split": 2}  # of a master weight, remainders apart, and of its gradient
# elements of an optimizer's group under ZeRO-1 and -2, which copy one group after the other when they start and when they step
GROUP = 2**25
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Traits:
    """What a strategy does; its file in ds_configs/ says the same (memory/ds_files.py writes it from here)."""

    stage: int
    offload: bool = False  # master weights, their gradients and optimizer states on the host
    eight_bit: bool = False
    fp32_accumulation: bool = False  # gradients of micro-steps are summed in fp32 on the GPU, where weights are 16-bit
    pinned: bool = False


TRAITS: dict[Strategy, Traits] = {
    "plain": Traits(0),
    "gpu_8bit": Traits(2, eight_bit=True, fp32_accumulation=True),
    "zero1": Traits(1),
    "zero2": Traits(2, fp32_accumulation=True),
    "zero2_offload": Traits(2, offload=True, fp32_accumulation=True, pinned=True),
    "zero2_offload_8bit": Traits(2, offload=True, eight_bit=True, pinned=True),
    "zero3": Traits(3),
    "zero3_offload_8bit": Traits(3, offload=True, eight_bit=True, pinned=True),
}


def traits_of(strategy: Strategy, eight_bit: bool = False) -> Traits:
    """The strategy's, with 8-bit states where optimizer.name asks for them."""
    return replace(TRAITS[strategy], eight_bit=True) if eight_bit else TRAITS[strategy]


def refusal(config: RunConfig, strategy: Strategy, on_gpu: bool) -> str | None:
    """Why these settings cannot run under a strategy, whatever memory there is: `train` refuses what `plan` does not offer."""
    t, swap = traits_of(strategy, config.optimizer.name == "adamw_8bit"), config.memory.swap
    if t.eight_bit and config.optimizer.name == "adamw":
        return f"optimizer.name = adamw contradicts memory.strategy = {strategy}: leave one of them out"
    if strategy == "plain":
        if t.eight_bit and (swap or on_gpu):
            return "memory.strategy=plain has 8-bit states on the CPU alone, and without memory.swap: choose zero2_offload_8bit or gpu_8bit"
        return None
    if swap:
        return (
            f"memory.swap in training needs memory.strategy=plain: {strategy} places parameters itself; empty one of them, or choose "
            "zero3_offload_8bit to keep parameters off the device"
        )
    if t.eight_bit and not t.offload and not on_gpu:
        return f"memory.strategy={strategy} keeps 8-bit states on a GPU and none is visible: choose zero2_offload_8bit"
    if t.stage == 3 and config.training.compile != "off":  # model/regional.py says why
        return f"training.compile=regional does not run under {strategy}: choose a zero2 strategy"
    return None


@dataclass(frozen=True)
class Parameters:
    """Elements of every parameter, in the optimizer's two groups (with weight decay and without)."""

    groups: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def count(self) -> int:
        return sum(map(len, self.groups))

    @property
    def largest(self) -> int:
        return max(n for group in self.groups for n in group)


def bucket_of(sizes: Iterable[int], stage: int) -> int:
    """Elements of a bucket for parameters of so many elements; ZeRO-3 lets go of a larger gradient once it is partitioned."""
    return max(REDUCE_BUCKET, *sizes) if stage < 3 else REDUCE_BUCKET


def chunked(sizes: Sequence[int], most: int = GROUP) -> list[range]:
    """Places of `sizes` in turn, in chunks of at most so many elements in all, or of one that is larger by itself."""
    chunks: list[range] = []
    start = held = 0
    for i, size in enumerate(sizes):
        if held and held + size > most:
            chunks.append(range(start, i))
            start, held = i, 0
        held += size
    return [*chunks, range(start, len(sizes))]


@dataclass(frozen=True)
class States:
    """Bytes by term while a micro-step runs (`gpu`, `host`), and what other moments hold.

    `growing`: the weights' gradients (b·n) that a micro-step leaves on the device so many times, piece by piece; its term
    `gradients` was there before. `after`: bytes beside them when the backward pass is over. `step`: on the device, beyond the terms but
    for the buckets, while the optimizer steps (no activations then). `gpu_start`, `host_start`: in all while DeepSpeed sets up (no
    activations, buckets, gradients or moments then); on the CPU `gpu_start` is both.
    """

    gpu: dict[str, int]
    host: dict[str, int]
    step: int
    gpu_start: int
    host_start: int
    partition: int  # elements that one rank updates
    weights: int  # elements of weights that one rank keeps
    growing: float = 0.0
    after: int = 0
    pinned: int = 0  # of `host`: page-locked, which the system can neither swap nor move


def partition_sizes(parameters: Parameters, world_size: int, stage: int) -> list[int]:
    """Elements of each group that one rank updates: padded to 2 × ranks chunk by chunk (ZeRO-1, -2) or parameter by parameter (-3)."""
    if stage == 3:
        return [sum(-(-n // world_size) for n in group) for group in parameters.groups]
    unit = 2 * world_size  # nccl_start_alignment_factor × ranks
    sizes = [sum(group[i] for i in chunk) for group in parameters.groups for chunk in chunked(group)]
    return [-(-size // unit) * unit // world_size for size in sizes]


def states(
    strategy: Strategy,
    parameters: Parameters,
    world_size: int = 1,
    precision: str = "bf16",
    accumulation: int = 1,
    on_cpu: bool = False,
    bucket: int | None = None,
    eight_bit: bool = False,
    master: str = "split",
) -> States:
    """The bytes of one rank. `on_cpu`: the run has no GPU: nothing is pinned, and the 16-bit copy is written in place.

    `bucket`: elements of it, by default bucket_of the parameters. `eight_bit`: optimizer.name asks for 8-bit states, whatever the
    strategy; `master`: optimizer.master.
    """
    t = traits_of(strategy, eight_bit)
    if t.stage == 0:
        return _plain(t, parameters, accumulation)
    b = 2 if precision == "bf16" else 4
    bucket = bucket or bucket_of((n for group in parameters.groups for n in group), t.stage)
    parts = partition_sizes(parameters, world_size, t.stage)
    if not (t.offload and t.eight_bit and b == 2):
        master = "fp32"
    if t.stage == 3:
        return _zero3(t, parameters, sum(parts), b, world_size, bucket, on_cpu, master)
    return _zero12(t, parameters, parts, b, world_size, accumulation, on_cpu, bucket, master)


def _zero12(
    t: Traits,
    parameters: Parameters,
    parts: list[int],
    b: int,
    world_size: int,
    accumulation: int,
    on_cpu: bool,
    bucket: int,
    master: str,
) -> States:
    part, most, pinned = sum(parts), max(parts), t.pinned and not on_cpu
    weights = b * part * world_size
    sums_in_fp32 = t.fp32_accumulation and b == 2
    full = b * min(bucket, parameters.total)
    buckets = full * (1 + (world_size > 1))  # ranks reduce a copy of their pieces
    gpu = {"weights": weights, "buckets": buckets}
    host: dict[str, int] = {}
    # a group's weights beside their flat copy, then, group by group, the clone of the own part and its fp32 master
    start = weights + max(b * most * world_size, 4 * part + b * most)
    if t.offload:
        m = MASTER_BYTES[master]
        if not on_cpu or (accumulation > 1 and not sums_in_fp32):  # there it is made, and not written to without
            gpu["buckets"] += b * parameters.largest  # temp_grad_buffer_for_gpu_offload
        if b == 2 and not sums_in_fp32 and master != "split":
            gpu["buckets"] += 4 * parameters.largest  # a gradient cast on its way to the host
        gpu["gradients"] = 4 * part if sums_in_fp32 else 0
        host["gradients"] = masters = sum(_pinned(m * size, pinned) for size in parts)
        host["states"] = adam_bytes(parts, t.eight_bit)
        if master == "split":
            host["master"] = part + (0 if on_cpu else masters)
        else:
            host["master"] = masters
            if not (t.eight_bit and b == 2 and on_cpu):  # there train/engine writes the 16-bit weights in place
                host["copies"] = sum(_pinned(b * size, pinned) for size in parts)
        if accumulation > 1 and not sums_in_fp32 and master != "split":
            sizes = [_pinned(b * n, pinned) for group in parameters.groups for n in group]
            host["accumulation"] = -(-sum(sizes) // world_size)
        if on_cpu:
            # gloo gathers a group's weights beside them, once all are stepped and sums of gradients are gone; old weights stay until
            # the masters and their gradients are there
            gathered = b * most * world_size * (world_size > 1) - gpu["gradients"]
            return States(gpu, host, gathered, weights + b * most + (2 * m + b) * part, 0, part, part * world_size)
        host["buckets"] = _pinned(b * parameters.largest, pinned)  # temp_grad_buffer_for_cpu_offload
        # pin_memory copies: while a master is pinned, the one it came from is there too
        copies = sum(_pinned(b * size, pinned) for size in parts)
        host_start = max(b * parameters.total, m * most + masters, 2 * masters + copies)
        kept = sum(host.get(k, 0) for k in ("gradients", "copies", "accumulation", "buckets")) + masters
        start = weights + b * most * world_size
        return States(gpu, host, 0, start, host_start, part, part * world_size, pinned=kept * pinned)
    gpu["master"] = 4 * part
    gpu["states"] = adam_bytes(parts, t.eight_bit)
    host_start = 0 if on_cpu else b * parameters.total
    if t.stage == 1:  # all gradients stay until the last backward pass is over, and go through the bucket then
        reduced, first = gpu.pop("buckets"), accumulation == 1
        gpu["gradients"] = 0 if first else b * parameters.total
        flat = 4 * most + b * most * (b == 2) - b * (parameters.total - part) + full
        after = reduced + b * part * (not on_cpu)
        return States(gpu, host, flat, start, host_start, part, part * world_size, float(first), after)
    if sums_in_fp32:
        gpu["gradients"] = 4 * part
        return States(gpu, host, 0, start, host_start, part, part * world_size)
    gpu["gradients"] = b * part * (accumulation > 1)
    if not on_cpu:  # the step's flat gradient and its fp32 copy come beside them
        gpu["gradients"] += b * part
        flat = 4 * most + b * most * (b == 2)
        return States(gpu, host, flat, start, host_start, part, part * world_size)
    # the step's flat gradient and its fp32 copy, beside the averaged ones, to which the last micro-step's have been added
    flat = 4 * most + b * most * (b == 2) - gpu["gradients"]
    return States(gpu, host, flat, start, host_start, part, part * world_size, 1 / world_size)


def adam_bytes(parts: Iterable[int], eight_bit: bool) -> int:
    """Both moments of parameters with so many elements each: fp32, or a byte each and nine per block of 256."""
    if eight_bit:
        return sum(2 * n + 9 * -(-n // ADAM_8BIT_BLOCK) for n in parts)
    return sum(8 * n for n in parts)


def _plain(t: Traits, parameters: Parameters, accumulation: int) -> States:
    """torch.optim.AdamW on fp32 weights, as first described, in its fused form, which makes nothing beside; or 8-bit states."""
    n = parameters.total
    sizes = [n for group in parameters.groups for n in group]
    gpu = {"weights": 4 * n, "gradients": 4 * n * (accumulation > 1), "states": adam_bytes(sizes, t.eight_bit)}
    return States(gpu, {}, 0, 4 * n, 0, n, n, float(accumulation == 1))


def _zero3(
    t: Traits, parameters: Parameters, part: int, b: int, world_size: int, bucket: int, on_cpu: bool, master: str
) -> States:
    m, pinned = MASTER_BYTES[master], t.pinned and not on_cpu
    sizes = [n for group in parameters.groups for n in group]
    kept = sum(n for n in sizes if n < ZERO3_PERSISTENCE)
    # one rank has all of them where they lie (NoGatherHandle)
    gathered = min(parameters.total, max(ZERO3_MAX_LIVE, parameters.largest) + ZERO3_PREFETCH + kept) * (world_size > 1)
    sub_groups = [-(-n // world_size) for n in sub_group_sizes(parameters, world_size)]
    if on_cpu and world_size > 1:  # gloo copies what it gathers
        gathered += min(parameters.total, ZERO3_PREFETCH)
    gpu = {"weights": b * part, "gathered": b * gathered}
    gpu["buckets"] = 2 * b * min(bucket, parameters.total) + 4 * parameters.largest
    host: dict[str, int] = {}
    where = host if t.offload else gpu
    where["master"] = m * part + (part if master == "split" else 0)
    where["gradients"] = _pinned(b * part, pinned)
    if t.offload:
        where["gradients"] += sum(_pinned(m * n, pinned) for n in sub_groups)
    where["states"] = adam_bytes([part], t.eight_bit)
    # a sub-group's gradient, and the fp32 one it is cast to; one bucket stays, gathered weights do not
    step = 0 if t.offload else (4 + b * (b == 2)) * max(sub_groups)
    step += b * min(bucket, parameters.total) - b * max(0, gathered - kept * (world_size > 1))
    host_start = m * part + m * max(sub_groups) if t.offload else 0  # masters, and the cast the last one is cloned from
    start = b * part * (1 + on_cpu) + (0 if t.offload or on_cpu else m * part)
    return States(gpu, host, step, start, host_start, part, part, pinned=host.get("gradients", 0) * pinned)


def sub_group_sizes(parameters: Parameters, world_size: int) -> list[int]:
    """Elements over all ranks of ZeRO-3's sub-groups: a group's parameters in turn, until ZERO3_SUB_GROUP of a rank's are full."""
    sizes = []
    for group in parameters.groups:
        filled = whole = 0
        for i, n in enumerate(group):
            filled, whole = filled + -(-n // world_size), whole + n
            if filled >= ZERO3_SUB_GROUP or i == len(group) - 1:
                sizes.append(whole)
                filled = whole = 0
    return sizes


def _pinned(size: int, pinned: bool) -> int:
    return pinned_bytes(size) if pinned else size
