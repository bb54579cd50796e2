"""What memory there is: sizes as people write them, and what is free on this machine now."""

from __future__ import annotations

import re

import psutil
import torch

from redheart.config import RunConfig
from redheart.schema import RedHeartError

UNITS = {"": 1.0, "G": 1.0, "GIB": 1.0, "GB": 1e9 / 2**30, "M": 2**-10, "MIB": 2**-10, "MB": 1e6 / 2**30}


def gib(text: str, option: str) -> float:
    """`8GiB`, `8GB`, `8`, `512MiB` in GiB; a bare number is GiB."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise RedHeartError(f"{option} {text!r}: write a size such as 8GiB, 8GB or 512MiB")
    return float(found[1]) * UNITS[found[2].upper()]


def resident() -> int:
    """Bytes of this process in memory now."""
    return psutil.Process().memory_info().rss


def resident_peak() -> int:
    """The most bytes of this process that were ever in memory (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise RedHeartError("this system does not tell a process's peak memory (VmHWM in /proc/self/status)")


def free_host_gib() -> float:
    """What this process may still take, with what it has already."""
    return (psutil.virtual_memory().available + resident()) / 2**30


def budgets(
    config: RunConfig, gpu_memory: str | None, host_memory: str | None, on_cpu: bool
) -> tuple[float | None, float]:
    """(GPU GiB, or None for a run on the CPU; host GiB) from the options, else what is free now, else what the preset names."""
    here = torch.cuda.is_available()
    if on_cpu:
        return None, gib(host_memory, "--host-memory") if host_memory else free_host_gib()
    if gpu_memory:
        gpu = gib(gpu_memory, "--gpu-memory")
    else:
        gpu = torch.cuda.mem_get_info()[0] / 2**30 if here else config.memory.gpu_memory_gib
    if host_memory:
        return gpu, gib(host_memory, "--host-memory")
    return gpu, free_host_gib() if here else config.memory.host_memory_gib
