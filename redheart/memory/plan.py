"""Which strategy, micro-batch and accumulation fit a budget, and which of them is the fastest: without running anything.

    plan(config, gpu_memory_gib, host_memory_gib, nodes, gpus_per_node, tokens) -> Plan
    plan(config, None, host_memory_gib)    a run on the CPU, where the device's memory is the host's

Bytes come from states.py (arithmetic) and activations.py (measured on shapes), times from the constants below: they rank
candidates, and are stated with every plan. Host figures of several ranks are those of a whole node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from redheart.config import RunConfig
from redheart.device import bf16_is_fast
from redheart.memory.activations import MicroStep, activations
from redheart.memory.budget import CONTEXT
from redheart.memory.launches import WAITS, count_launches
from redheart.memory.states import STRATEGIES, Parameters, States, Traits, refusal, states, traits_of
from redheart.model.axes import decays
from redheart.model.build import build_model
from redheart.schema import RedHeartError
from redheart.sections import Strategy

GIB = 2**30
MIB = 2**20
# as seen in 22 configurations on an H200, CUDA 13 (tests/benchmarks/results/plan-memory-gpu.json)
WORKSPACE = 64 * MIB  # cuBLAS: 32 MiB on Hopper, once for the forward pass and once for the backward pass's thread
FRAGMENTATION = 0.05  # of activations and buckets: blocks the allocator cannot reuse
RESERVE = 64 * MIB  # half-used segments of the allocator
CUDA_AUTOCAST = 1.2  # activations beside a CPU's autocast, under which they are measured: CUDA's computes norms and softmaxes in fp32
# libraries of a CUDA build and what the driver keeps on the host, resident: of any run, of an engine of Accelerate and DeepSpeed, and of
# kernels for bf16; and what is there of all that while an engine starts
HOST_BASE_GPU, HOST_ENGINE_GPU, HOST_BF16_GPU = 1980 * MIB, 360 * MIB, 335 * MIB
HOST_STARTING_GPU = 1060 * MIB
# data sets and boards, which a training reads and `--measure` does not: of a CPU's 762, 375 are there without
HOST_DATA = 390 * MIB
HOST_BASE_CPU = 762 * MIB  # the interpreter and the libraries of a CPU run, DeepSpeed and data sets included
# what an engine of Accelerate and DeepSpeed keeps beside its tensors: while it starts, and once it trains
HOST_STARTING, HOST_ENGINE = 27 * MIB, 82 * MIB
# what the libraries of matrix products keep: buffers, and where a processor computes in bf16 the code that oneDNN writes for every shape
# (up to 1,024 of them; of 55 drawn configurations on a Zen 4 the median, from 154 to 253)
HOST_KERNELS, HOST_KERNELS_BF16 = 8 * MIB, 198 * MIB


@dataclass(frozen=True)
class Card:
    """What a step's time is estimated with: sustained, not advertised, figures of an ordinary 8 GB card and its host."""

    flops: float = 20e12  # FLOP/s in bf16 matrix products of this size
    fp32_flops: float = 10e12  # the same in fp32: TF32 stays off, too few bits for the Kalman filter's covariances
    # s of the host for one operation of the network, its views, autograd and hooks included (`bench gpu`: operation_s). On an H100's host
    # micro-steps of 330m took 55e-6 for each that is counted here, copies of gradients included, which have a price of their own
    operation_s: float = 40e-6
    wait_s: float = 15e-6  # s in which nothing is launched when the host waits for the GPU (`bench gpu`: wait_s)
    gpu_bytes: float = 250e9  # B/s of the card's memory
    pcie_bytes: float = 12e9  # B/s, pinned, one direction
    host_bytes: float = 20e9  # B/s that all cores of the host reach in the optimizer
    node_bytes: float = 10e9  # B/s between cards of a node (PCIe)
    network_bytes: float = 3e9  # B/s between nodes (25 Gbit/s)
    cpu_flops: float = 60e9  # FLOP/s of a run on the CPU in fp32
    cpu_bf16_flops: float = 2e9  # the same in bf16 without hardware for it (AVX2): 1.2e9 seen on two busy cores


@dataclass(frozen=True)
class Request:
    """One way to train, on `nodes` × `gpus_per_node` ranks: what bytes and times are predicted of."""

    config: RunConfig
    strategy: Strategy
    micro_batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool
    step: MicroStep
    parameters: Parameters
    card: Card = Card()
    on_cpu: bool = False
    nodes: int = 1
    gpus_per_node: int = 1
    base: int | None = (
        None  # bytes of the process before a network, on a GPU one that reads no data; None: the constants above
    )

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def traits(self) -> Traits:
        return traits_of(self.strategy, self.config.optimizer.name == "adamw_8bit")

    @cached_property
    def states(self) -> States:
        """Of one rank."""
        return states(
            self.strategy, self.parameters, self.ranks, self.config.training.precision, self.gradient_accumulation_steps,
            self.on_cpu, eight_bit=self.traits.eight_bit, master=self.config.optimizer.master,
        )  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One way to train. Bytes by term; peaks are the worst moment's, not the terms' sum: start, micro-step or update."""

    strategy: Strategy
    micro_batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool
    step: MicroStep
    gpu: dict[str, int]
    host: dict[str, int]
    gpu_peak: int
    host_peak: int
    times_s: dict[str, float]
    samples_per_s: float
    fits: bool = False
    host_pinned: int = 0  # of the host's bytes: page-locked

    @property
    def step_s(self) -> float:
        t = self.times_s
        return max(t["compute"], t["launches"]) + sum(v for k, v in t.items() if k not in ("compute", "launches"))

    @property
    def bound(self) -> str:
        return max(self.times_s, key=lambda name: self.times_s[name])

    def peaks_gib(self) -> dict[str, float]:
        """As train/measure.py observes them: the host's, and on a GPU what torch's allocator has allocated and reserved at most."""
        found = {"host_peak_gib": self.host_peak / GIB}
        if "context" in self.gpu:
            outside = self.gpu["context"]
            found["gpu_allocated_gib"] = (self.gpu_peak - outside - self.gpu["allocator"]) / GIB
            found["gpu_reserved_gib"] = (self.gpu_peak - outside) / GIB
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "micro_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "activation_checkpointing": self.activation_checkpointing,
            "gpu_peak_gib": round(self.gpu_peak / GIB, 3),
            "host_peak_gib": round(self.host_peak / GIB, 3),
            "samples_per_s": round(self.samples_per_s, 2),
        }

    def details(self) -> dict[str, Any]:
        terms = {"gpu": self.gpu, "host": self.host}
        return {
            **self.to_json(),
            "host_pinned_gib": round(self.host_pinned / GIB, 3),
            "fits": self.fits,
            "step_s": round(self.step_s, 4),
            "bound": self.bound,
            "times_s": {name: round(value, 5) for name, value in self.times_s.items()},
            "breakdown_gib": {
                where: {k: round(v / GIB, 4) for k, v in sizes.items()} for where, sizes in terms.items()
            },
        }


@dataclass(frozen=True)
class Plan:
    """All candidates, the fastest that fits first in `chosen`, and what was assumed."""

    preset: str
    tokens: int
    gpu_memory: int | None  # bytes; None: a run on the CPU
    host_memory: int
    nodes: int
    gpus_per_node: int
    flops_per_sample: int
    card: Card
    candidates: list[Candidate]

    @property
    def chosen(self) -> Candidate:
        best = fastest(self.candidates)
        if best is None:
            raise RedHeartError(self.no_fit())
        return best

    def no_fit(self) -> str:
        """What is too small, and the smallest budget that works."""
        if self.gpu_memory is None:
            least = min(self.candidates, key=lambda c: c.host_peak)
            return (
                f"{self.preset} does not fit into {self.host_memory / GIB:.2f} GiB of host memory: the smallest budget that works is "
                f"--host-memory {_up(least.host_peak)}, {_named(least)}"
            )
        by_gpu = [c for c in self.candidates if c.host_peak <= self.host_memory]
        by_host = [c for c in self.candidates if c.gpu_peak <= self.gpu_memory]
        ways = []
        if by_gpu:
            least = min(by_gpu, key=lambda c: c.gpu_peak)
            ways.append(f"--gpu-memory {_up(least.gpu_peak)}, {_named(least)}")
        if by_host:
            least = min(by_host, key=lambda c: c.host_peak)
            ways.append(f"--host-memory {_up(least.host_peak)}, {_named(least)}")
        if not ways:
            least = smallest(self.candidates)
            ways.append(f"--gpu-memory {_up(least.gpu_peak)} --host-memory {_up(least.host_peak)}, {_named(least)}")
        return (
            f"{self.preset} does not fit into {self.gpu_memory / GIB:.2f} GiB of GPU and {self.host_memory / GIB:.2f} GiB of host memory: "
            f"the smallest budget that works is {'; or '.join(ways)}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen.to_json(),
            "candidates": [c.details() for c in self.candidates],
            "preset": self.preset,
            "tokens": self.tokens,
            "flops_per_sample": self.flops_per_sample,
            "assumed": asdict(self.card),
        }


def fastest(candidates: Iterable[Candidate]) -> Candidate | None:
    """Of those that fit; None where none does."""
    return min((c for c in candidates if c.fits), key=lambda c: (c.step_s, c.gpu_peak), default=None)


def smallest(candidates: Iterable[Candidate]) -> Candidate:
    return min(candidates, key=lambda c: (c.gpu_peak, c.host_peak))


def _up(size: int) -> str:
    """In GiB with two digits, never less than it is: what is named as enough is."""
    return f"{math.ceil(100 * size / GIB) / 100:.2f}GiB"


def _named(c: Candidate) -> str:
    return f"with {c.strategy}, micro-batch {c.micro_batch_size}" + (
        ", recomputing" if c.activation_checkpointing else ""
    )


def parameters_of(config: RunConfig) -> Parameters:
    """Every parameter of the real network, grouped as the optimizer does: matrices with weight decay, the rest without."""
    with torch.device("meta"):
        model = build_model(config, None)
    decayed: list[int] = []
    free: list[int] = []
    for name, p in model.named_parameters():
        (decayed if decays(name, p.dim()) else free).append(p.numel())
    return Parameters((tuple(decayed), tuple(free)))


def plan(
    config: RunConfig,
    gpu_memory_gib: float | None,
    host_memory_gib: float,
    nodes: int = 1,
    gpus_per_node: int = 1,
    tokens: int = 64,
    strategies: tuple[Strategy, ...] = STRATEGIES,
    base: int | None = None,
) -> Plan:
    """Every strategy that these settings run under × micro-batch × checkpointing; RedHeartError where there is none. Whether one fits is
    for `chosen` to say. `base`: bytes of the process before a network."""
    on_cpu, ranks = gpu_memory_gib is None, nodes * gpus_per_node
    share = config.training.global_batch_size // ranks
    if share * ranks != config.training.global_batch_size:
        raise RedHeartError(
            f"training.global_batch_size = {config.training.global_batch_size} cannot be shared by {ranks} ranks: "
            f"choose a multiple of {ranks}"
        )
    parameters, card = parameters_of(config), Card()
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    candidates: list[Candidate] = []
    flops = 0
    for checkpointing in (False, True):
        usual = activations(config, tokens, checkpointing, dtype)
        flops = flops or usual.at(1).flops
        for strategy in strategies:
            if refusal(config, strategy, not on_cpu) or (strategy == "plain" and (ranks > 1 or checkpointing)):
                continue  # the reference `plain` is not looked at with recomputation
            autocast = strategy == "plain" and dtype == torch.bfloat16
            measured = activations(config, tokens, checkpointing, torch.float32, True) if autocast else usual
            for micro in (m for m in range(1, share + 1) if share % m == 0):
                request = Request(
                    config, strategy, micro, share // micro, checkpointing, measured.at(micro), parameters, card,
                    on_cpu, nodes, gpus_per_node, base,
                )  # fmt: skip
                c = predict(request)
                fits = c.host_peak <= host_memory_gib * GIB and c.gpu_peak <= (gpu_memory_gib or 0) * GIB
                candidates.append(replace(c, fits=fits))
    if not candidates:
        reasons = [why for strategy in strategies if (why := refusal(config, strategy, not on_cpu))]
        raise RedHeartError("; ".join(reasons[:1] or ["memory.strategy=plain runs on one process"]))
    memory = None if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
    return Plan(
        config.preset, tokens, memory, int(host_memory_gib * GIB), nodes, gpus_per_node, flops, card, candidates
    )


def predict(request: Request) -> Candidate:
    """One candidate: bytes by term, peaks, times."""
    r, s, step = request, request.states, request.step
    gpu, host = dict(s.gpu), dict(s.host)
    if r.config.checkpoint.background:
        host["checkpoint"] = sum(where.get(k, 0) for where in (gpu, host) for k in ("weights", "master", "states"))
    # what is left of the weights' gradients grows while activations shrink: between `peak` and `peak_with_gradients`, at most
    left = int(s.growing * step.gradients)
    passing = max(step.peak + int(s.growing * (step.peak_with_gradients - step.peak)), left + s.after)
    gpu["gradients"] = gpu.get("gradients", 0) + min(left, passing)
    gpu["activations"], gpu["inputs"] = passing - min(left, passing), step.inputs
    if r.on_cpu:
        gpu["allocator"] = step.heap + int(min(s.growing, 1.0) * (step.heap_with_gradients - step.heap))
    else:
        largest = r.parameters.largest * (2 if r.config.training.precision == "bf16" and r.strategy != "plain" else 4)
        if r.strategy == "plain" and r.config.training.precision == "bf16":
            gpu["activations"] = int(CUDA_AUTOCAST * gpu["activations"])
        gpu["workspace"] = WORKSPACE
        gpu["allocator"] = max(0, step.peak_rounded - step.peak) + RESERVE + largest
        gpu["allocator"] += int(FRAGMENTATION * (step.peak + gpu.get("buckets", 0)))
        if r.strategy == "zero1":  # the buffer of all gradients finds no place among what activations leave
            gpu["allocator"] += s.after
        gpu["context"] = CONTEXT
    fixed = sum(gpu.get(k, 0) for k in ("workspace", "allocator", "context"))
    during = sum(gpu.values())
    stepping = during - gpu["activations"] - gpu["inputs"] - gpu.get("buckets", 0) + s.step
    gpu_peak = max(during, stepping, s.gpu_start + fixed)
    if r.on_cpu:
        host = {**host, **{k: host.get(k, 0) + v for k, v in gpu.items()}}
        host["base"] = HOST_BASE_CPU if r.base is None else r.base + HOST_ENGINE * (r.strategy != "plain")
        written = r.config.training.precision == "bf16" and bf16_is_fast("cpu")
        host["kernels"] = HOST_KERNELS_BF16 if written else HOST_KERNELS
        both = sum(host.values())
        stepping += both - during
        starting = host["base"] - (HOST_ENGINE - HOST_STARTING) * (r.base is not None and r.strategy != "plain")
        host_peak = r.gpus_per_node * max(both, stepping, s.gpu_start + s.host_start + starting)
        gpu, gpu_peak = {}, 0
    else:
        data = HOST_DATA * (r.base is None)
        host["base"] = HOST_BASE_GPU + data + HOST_ENGINE_GPU * (r.strategy != "plain")
        host["base"] += HOST_BF16_GPU * (r.config.training.precision == "bf16")
        host_peak = r.gpus_per_node * max(sum(host.values()), s.host_start + HOST_STARTING_GPU + data)
    candidate = Candidate(
        r.strategy, r.micro_batch_size, r.gradient_accumulation_steps, r.activation_checkpointing, step, gpu, host,
        gpu_peak, host_peak, step_times(r), 0.0, host_pinned=r.gpus_per_node * s.pinned,
    )  # fmt: skip
    return replace(candidate, samples_per_s=r.config.training.global_batch_size / candidate.step_s)


def step_times(request: Request) -> dict[str, float]:
    """Seconds of one optimizer step by what takes them; launches overlap with computing, the rest does not."""
    r, t, card, part = request, request.traits, request.card, request.states.partition
    n, accumulation = r.parameters.total, r.gradient_accumulation_steps
    bf16 = r.config.training.precision == "bf16"
    b = 2 if bf16 and t.stage else 4
    rate = (card.cpu_bf16_flops if bf16 else card.cpu_flops) if r.on_cpu else card.flops if bf16 else card.fp32_flops
    times = {"compute": accumulation * r.step.flops / rate, "launches": 0.0, "waits": 0.0}
    if not r.on_cpu:
        tensors = r.parameters.count
        times["launches"] = count_launches(t, tensors, r.step.kernels, accumulation) * card.operation_s
        times["waits"] = WAITS * card.wait_s
    # bytes read and written, the 16-bit copy included
    optimizer = (18 if t.eight_bit else 34 if t.offload else 32) * part
    times["optimizer"] = optimizer / (card.host_bytes if t.offload or r.on_cpu else card.gpu_bytes)
    if t.offload and not r.on_cpu:
        sums_there = t.fp32_accumulation and bf16 and t.stage == 2
        traffic = 4 * part + b * part  # the fp32 gradient down, weights up
        if accumulation > 1 and not sums_there:
            traffic += (2 * accumulation - 1) * b * part  # partial sums down, and up again
        times["pcie"] = traffic / (card.pcie_bytes if t.pinned else card.pcie_bytes / 3)
    if r.ranks > 1:
        sent = b * n * (r.ranks - 1) // r.ranks
        # gradients (every micro-step where they are partitioned), weights; ZeRO-3: weights forward and backward, gradients
        passes = 3 * accumulation if t.stage == 3 else 2 + (accumulation - 1) * (t.stage >= 2)
        times["network"] = passes * sent / (card.network_bytes * r.gpus_per_node if r.nodes > 1 else card.node_bytes)
    return times
