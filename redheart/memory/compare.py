"""After a run: the memory that was planned beside what was taken."""

from __future__ import annotations

import torch

from redheart.console import console
from redheart.device import has_gpu
from redheart.memory.budget import CONTEXT, resident_peak
from redheart.memory.plan import GIB, Candidate


def planned_and_taken(planned: Candidate) -> dict[str, dict[str, float]]:
    """{where: {predicted_gib, observed_gib}} of this process; nothing where the activations were not measured.

    `host`: peak resident memory; `gpu`: what torch's allocator had reserved at most. Several ranks share one prediction,
    so they are not compared.
    """
    if not planned.host.get("activations", planned.gpu.get("activations")):
        return {}
    peaks = {}
    if has_gpu():
        peaks["gpu"] = (planned.gpu_peak - CONTEXT, torch.cuda.max_memory_reserved())
    else:
        peaks["host"] = (planned.host_peak, resident_peak())
    return {where: {"predicted_gib": p / GIB, "observed_gib": o / GIB} for where, (p, o) in peaks.items()}


def show_taken(memory: dict[str, dict[str, float]]) -> None:
    for where, one in memory.items():
        p, o = one["predicted_gib"], one["observed_gib"]
        console.print(f"memory on the {where}: {o:.2f} GiB at its peak, {p:.2f} predicted ({p / o - 1:+.1%})")
