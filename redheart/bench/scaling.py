"""Does the scaling model hold? One process, then two on this machine over gloo: the predicted step of two beside the observed.

redheart bench scaling --json

Weak scaling: both runs have the same micro-batch of synthetic samples per process. Predicted: the step of one process, and the
bytes that two send (gradients reduced, weights gathered) over the bandwidth that gloo reaches between the same two processes. Two
processes share this machine's memory and caches, which the model knows nothing of: run it on a quiet machine with a core for each.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

from redheart.bench.processes import on_ranks
from redheart.config import load_config
from redheart.memory.plan import parameters_of
from redheart.options import Preset, Set

STRATEGY = "zero2_offload"
PASSES = 2  # gradients reduced, weights gathered, once in a step


def predicted_step(alone_s: float, num_bytes: float, world_size: int, bytes_per_s: float) -> float:
    """Seconds of a step on `world_size` ranks: `num_bytes` of weights cross twice, (ranks − 1)/ranks of them from each rank."""
    return alone_s + PASSES * num_bytes * (world_size - 1) / world_size / bytes_per_s


def bench_scaling(
    preset: Preset = "local",
    set_: Set = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=512)] = 32,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Samples of a process and step.")] = 16,
    steps: Annotated[int, typer.Option("--steps", min=4, help="Steps of each run; the first two do not count.")] = 12,
    timeout_s: Annotated[int, typer.Option("--timeout-s", min=1, help="Of each run.")] = 900,
) -> dict[str, Any]:
    """A step of two processes over gloo, beside what the scaling model of `plan` predicts from a step of one: medians."""
    settings = [*(set_ or ()), f"memory.strategy={STRATEGY}", "training.precision=fp32"]
    job = {"preset": preset, "set": settings, "tokens": tokens, "micro_batch": micro_batch, "steps": steps}
    alone, both = (on_ranks(_measured, job, ranks, timeout_s) for ranks in (1, 2))
    num_bytes = 4 * parameters_of(load_config(preset, settings)).total
    bandwidth = PASSES * num_bytes / 2 / (both["reduce_s"] + both["gather_s"])
    one_s, two_s = alone["step_s"], both["step_s"]
    predicted = predicted_step(one_s, num_bytes, 2, bandwidth)
    return {
        "preset": preset, "tokens": tokens, "micro_batch_size": micro_batch, "steps": steps, "bytes_of_weights": num_bytes,
        "load_average": os.getloadavg()[0], "cores": os.cpu_count(), "gloo_bytes_per_s": bandwidth,
        "reduce_s": both["reduce_s"], "gather_s": both["gather_s"], "one_rank_step_s": one_s,
        "two_ranks_step_s": {"predicted": predicted, "observed": two_s, "ratio": predicted / two_s},
        "efficiency": {"predicted": one_s / predicted, "observed": one_s / two_s},
        "spread": {"one": alone["spread"], "two": both["spread"]},
    }  # fmt: skip


def _measured(job: dict[str, Any]) -> dict[str, Any]:
    """Of one process of it."""
    from redheart.ranks import launched_world_size, world_size
    from redheart.train.measure import measure_step

    torch.set_num_threads(1)
    batch = job["micro_batch"]
    sizes = [f"training.micro_batch_size={batch}", f"training.global_batch_size={batch * launched_world_size()}"]
    config = load_config(job["preset"], [*job["set"], *sizes])
    seconds = sorted(measure_step(config, job["tokens"], job["steps"])["step_seconds"][2:])
    measured: dict[str, Any] = {"step_s": statistics.median(seconds), "spread": [seconds[0], seconds[-1]]}
    if world_size() > 1:
        import torch.distributed as dist

        count = parameters_of(config).total
        whole, part = torch.zeros(count + count % 2), torch.zeros((count + 1) // 2)
        measured["reduce_s"] = _median(lambda: dist.reduce(whole, 0))
        measured["gather_s"] = _median(lambda: dist.all_gather_into_tensor(whole, part))
    return measured


def _median(work: Callable[[], Any], repeats: int = 7) -> float:
    import torch.distributed as dist

    seconds = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
