"""What memory there is, what a run promises to stay within, and the keeping of that promise.

memory.gpu_memory_gib and memory.host_memory_gib hold whatever the machine has: `plan` and `train` plan within the smaller of
the promise and what is free, the GPU's allocator is capped (`limit_gpu`), and the host is looked at as a run goes on
(`over_host_memory`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from redheart.config import RunConfig
from redheart.device import compute_device, has_gpu
from redheart.ranks import launched_world_size, sum_over_ranks, world_size
from redheart.schema import RedHeartError

CONTEXT = 530 * 2**20  # CUDA context and loaded kernels, outside torch's allocator: 527 MiB on an H100 with CUDA 13
PEAKS = Path("/proc/self/clear_refs")  # proc(5): 5 resets VmHWM
UNITS = {"": 1.0, "G": 1.0, "GIB": 1.0, "GB": 1e9 / 2**30, "M": 2**-10, "MIB": 2**-10, "MB": 1e6 / 2**30}


def gib(text: str, option: str) -> float:
    """`8GiB`, `8GB`, `8`, `512MiB` in GiB; a bare number is GiB."""
    parsed = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if parsed is None or parsed[2].upper() not in UNITS or float(parsed[1]) <= 0:
        raise RedHeartError(f"{option} {text!r}: write a size such as 8GiB, 8GB or 512MiB")
    return float(parsed[1]) * UNITS[parsed[2].upper()]


def resident() -> int:
    """Bytes of this process in memory now."""
    return psutil.Process().memory_info().rss


_earlier = 0  # the peak before the kernel's was last reset: `without`


def resident_peak() -> int:
    """The most bytes of this process that were in memory since it began, or since `forget_peaks`, but for what `without` leaves out."""
    return max(_earlier, status_bytes("VmHWM"))


@contextmanager
def without(mapped: int) -> Iterator[None]:
    """Inside, a peak does not count `mapped` bytes: pages of files that are mapped meanwhile, which the system may write back instead."""
    global _earlier
    before = resident_peak()
    _reset()
    try:
        yield
    finally:
        _earlier = max(before, status_bytes("VmHWM") - mapped)
        _reset()


def _reset() -> None:
    if PEAKS.exists():
        PEAKS.write_text("5", encoding="ascii")


def shards_in_memory() -> int:
    """Bytes of this process's resident memory that are pages of shards, which are mapped and never written to."""
    maps = psutil.Process().memory_maps(grouped=True)
    return sum(one.rss for one in maps if one.path.removesuffix(" (deleted)").endswith(".arrow"))


def forget_peaks() -> None:
    """The present size is the peak from here on, on the host and in torch's GPU allocator; on a system without /proc nothing happens."""
    global _earlier
    _earlier = 0
    _reset()
    if has_gpu() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status such as VmHWM (the most that was resident) or RssAnon (private memory)."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise RedHeartError(f"this system does not tell a process's memory ({field} in /proc/self/status)")


def free_host_gib() -> float:
    """What this process may still take, with what it has already."""
    return (psutil.virtual_memory().available + resident()) / 2**30


def free_gpu_gib() -> float:
    """What this process may still take of its GPU, with its CUDA context and what torch has reserved there already.

    Asking makes the context, so what CUDA calls free is without it, while predictions count it (memory/plan.py).
    """
    device = compute_device()
    free, total = torch.cuda.mem_get_info(device)
    return min(free + torch.cuda.memory_reserved(device) + CONTEXT, total) / 2**30


@dataclass(frozen=True)
class Bound:
    """How much memory there is to use, and what says so: an option, a promise of the configuration, or what is free."""

    gib: float
    by: str

    def __str__(self) -> str:
        return f"{self.gib:.2f} GiB ({self.by})"


@dataclass(frozen=True)
class Budget:
    """`gpu` of one card, None for a run on the CPU; `host` of one node."""

    gpu: Bound | None
    host: Bound

    def __str__(self) -> str:
        return (f"GPU {self.gpu}, " if self.gpu else "") + f"host {self.host}"

    def to_json(self) -> dict[str, Any]:
        host = {"host_gib": self.host.gib, "host_bound": self.host.by}
        return {"gpu_gib": self.gpu.gib, "gpu_bound": self.gpu.by, **host} if self.gpu else host


def budget_of(
    config: RunConfig, gpu_memory: str | None = None, host_memory: str | None = None, on_cpu: bool = False
) -> Budget:
    """What the options say; else the smaller of what the configuration promises and what is free here.

    A machine without a GPU cannot tell what is free where the GPU is: there the promises count alone, unless `on_cpu`.
    """
    promised = config.memory
    here = on_cpu or has_gpu()
    free = Bound(free_host_gib(), "free on this machine") if here else None
    host = _bound(host_memory, "--host-memory", promised.host_memory_gib, "memory.host_memory_gib", free)
    if on_cpu:
        return Budget(None, host)
    free = Bound(free_gpu_gib(), "free on this GPU") if here and not gpu_memory else None
    return Budget(_bound(gpu_memory, "--gpu-memory", promised.gpu_memory_gib, "memory.gpu_memory_gib", free), host)


def _bound(given: str | None, option: str, promised: float, key: str, free: Bound | None) -> Bound:
    if given:
        return Bound(gib(given, option), option)
    return min([Bound(promised, key), *([free] if free else [])], key=lambda bound: bound.gib)


def limit_gpu(config: RunConfig) -> None:
    """Keeps the promise of memory.gpu_memory_gib: torch's allocator gets what it leaves beside the CUDA context, and no more.

    A card that is smaller bounds by itself. Nothing on the CPU. Before anything is allocated.
    """
    if not has_gpu():
        return
    device, promised = compute_device(), config.memory.gpu_memory_gib * 2**30
    total = torch.cuda.get_device_properties(device).total_memory
    if promised <= CONTEXT:
        raise RedHeartError(
            f"memory.gpu_memory_gib = {promised / 2**30:g} is no more than the {CONTEXT / 2**30:.2f} GiB of a CUDA context: give more"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, (promised - CONTEXT) / total), device)


def over_host_memory(config: RunConfig, step: int) -> str | None:
    """Why a run has to end before `step`: its processes of a node hold more than memory.host_memory_gib. None: they keep the promise.

    Looked at on logging steps; collective. Pages that processes share count for each of them, as in `redheart plan`; those of shards,
    which the system takes back when it needs them, for none.
    """
    if step % config.training.log_every:
        return None
    share = local_world_size() / world_size() / 2**30
    held = sum_over_ranks([float(resident())])[0] * share
    if held > config.memory.host_memory_gib:  # on all ranks alike; looking at every mapping takes a while
        held -= sum_over_ranks([float(shards_in_memory())])[0] * share
    if held <= config.memory.host_memory_gib:
        return None
    return (
        f"the run holds {held:.2f} GiB of host memory, more than memory.host_memory_gib = {config.memory.host_memory_gib:g}: go on "
        f"with --resume and a smaller training.micro_batch_size, or promise it more (--set memory.host_memory_gib={math.ceil(held * 1.1)})"
    )


def local_world_size() -> int:
    """Processes of this run on this node, as the launcher says (torchrun and Accelerate, DeepSpeed); else all of them."""
    size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(size) if size else launched_world_size()
