"""Before a run: what it will take, and a refusal where that is more than there is. After it: what it took."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from redheart.config import RunConfig
from redheart.console import console
from redheart.device import has_gpu
from redheart.memory.activations import MicroStep, measured
from redheart.memory.budget import CONTEXT, budget_of, local_world_size, resident, resident_peak, shards_in_memory
from redheart.memory.plan import GIB, Candidate, Request, fastest, parameters_of, plan, predict
from redheart.memory.show import plan_table, show_memory
from redheart.ranks import launched_world_size
from redheart.schema import RedHeartError

MACHINERY = 118 * 2**20  # bytes of Accelerate and DeepSpeed, imported when an engine is made
SMALL = 0.1  # of the memory that is free: a network whose states take less is not worth measuring


def check_memory(config: RunConfig, micro_batch_size: int, accumulation: int, tokens: int) -> Candidate:
    """Prints the memory the run as configured will take; raises RedHeartError, naming what would fit, where it cannot."""
    world_size = launched_world_size()
    here = min(world_size, local_world_size())
    nodes = max(1, world_size // here)
    on_cpu = not has_gpu()
    budget = budget_of(config, on_cpu=on_cpu)
    gpu, host = budget.gpu.gib if budget.gpu else None, budget.host.gib
    strategy, checkpointing = config.memory.strategy, config.model.activation_checkpointing
    imports = MACHINERY if strategy != "plain" and "deepspeed" not in sys.modules else 0
    request = Request(
        config, strategy, micro_batch_size, accumulation, checkpointing, MicroStep(0, 0, 0, 0, 0, 0), parameters_of(config),
        on_cpu=on_cpu, nodes=nodes, gpus_per_node=here, base=resident() + imports if on_cpu else None,
    )  # fmt: skip
    held = here * (sum(request.states.gpu.values()) + sum(request.states.host.values()))
    small = held < SMALL * min(host, host if gpu is None else gpu) * GIB
    if not small:
        step = measured(config, micro_batch_size, tokens, checkpointing, strategy == "plain")
        request = replace(request, step=step)
    planned = predict(request)
    gpu_bytes = None if gpu is None else int(gpu * GIB)
    if planned.host_peak <= host * GIB and (gpu_bytes is None or planned.gpu_peak <= gpu_bytes):
        show_memory(planned, gpu_bytes, int(host * GIB))
        console.print(f"within: {budget}")
        if small:
            console.print("(activations not measured: the network is small beside this machine's memory)")
        return planned
    others = plan(config, gpu, host, nodes, here, tokens, base=request.base)
    console.print(plan_table(others))
    show_memory(planned, gpu_bytes, int(host * GIB))
    on_gpu = "" if on_cpu else f"{planned.gpu_peak / GIB:.2f} GiB on the GPU and "
    need = f"{strategy} with micro-batch {micro_batch_size} needs {on_gpu}{planned.host_peak / GIB:.2f} GiB on the host"
    best = fastest(others.candidates)
    if best is None:
        raise RedHeartError(f"{need}, there is {budget}; {others.no_fit()}")
    raise RedHeartError(
        f"{need}, there is {budget}: choose "
        f"--set memory.strategy={best.strategy} --set training.micro_batch_size={best.micro_batch_size} "
        f"--set model.activation_checkpointing={str(best.activation_checkpointing).lower()}"
    )


def planned_and_taken(planned: Candidate) -> dict[str, dict[str, float]]:
    """{where: {predicted_gib, observed_gib}} of this process; nothing where the activations were not measured.

    `host`: peak resident memory, without pages that the system takes back when it needs them: of shards, and of files that a save maps;
    `gpu`: what torch's allocator had reserved at most. Several ranks share one prediction, so they are not compared.
    """
    if not planned.host.get("activations", planned.gpu.get("activations")):
        return {}
    peaks = {}
    if has_gpu():
        peaks["gpu"] = (planned.gpu_peak - CONTEXT, torch.cuda.max_memory_reserved())
    else:
        peaks["host"] = (planned.host_peak, resident_peak() - shards_in_memory())
    return {where: {"predicted_gib": p / GIB, "observed_gib": o / GIB} for where, (p, o) in peaks.items()}


def show_taken(memory: dict[str, dict[str, float]]) -> None:
    for where, one in memory.items():
        p, o = one["predicted_gib"], one["observed_gib"]
        console.print(f"memory on the {where}: {o:.2f} GiB at its peak, {p:.2f} predicted ({p / o - 1:+.1%})")
