"""A plan in the terminal: a table of candidates and bars of where the memory goes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import cycle

from rich import box
from rich.table import Table
from rich.text import Text

from redheart.config import load_config
from redheart.console import console, table
from redheart.memory.budget import Budget
from redheart.memory.plan import GIB, Candidate, Plan, fastest, smallest

PLAIN = ("red", "yellow", "green", "cyan", "blue", "magenta")
COLORS = (*PLAIN, *(f"bright_{color}" for color in PLAIN))
WIDTH = 48  # characters of a full bar
LEGEND = 79  # most characters of a line of its legend


def show_plan(plan: Plan, budget: Budget, preset: str, overrides: Sequence[str]) -> None:
    """The best candidate of every strategy, the chosen one's bars, what the times assume, and the command that trains so."""
    console.print(plan_table(plan))
    console.print(f"within: {budget}")
    show_memory(plan.chosen, plan.gpu_memory, plan.host_memory)
    card = plan.card
    speed = (
        f"{card.cpu_flops / 1e9:.0f} GFLOP/s (fp32) on the CPU"
        if plan.gpu_memory is None
        else f"{card.flops / 1e12:.0f} TFLOP/s in bf16, {card.operation_s * 1e6:.0f} µs an operation, {card.wait_s * 1e6:.0f} µs a wait"
    )
    console.print(
        f"{plan.flops_per_sample / 1e9:.1f} GFLOP a sample of {plan.tokens} tokens; times assume {speed}, {card.pcie_bytes / 1e9:.0f} GB/s "
        f"over PCIe, {card.host_bytes / 1e9:.0f} GB/s of host memory",
        soft_wrap=False,
    )
    console.print(f"train so with:\n  {command(plan, preset, overrides)}", soft_wrap=True)


def command(plan: Plan, preset: str, overrides: Sequence[str]) -> str:
    """What to type for the plan's choice; on several nodes it starts each of them."""
    chosen, processes = plan.chosen, plan.nodes * plan.gpus_per_node
    promised = load_config(preset, overrides).memory
    room = {"gpu_memory_gib": plan.gpu_memory, "host_memory_gib": plan.host_memory}
    settings = [
        *overrides,
        *(f"memory.{k}={v / GIB:.6g}" for k, v in room.items() if v and v != round(getattr(promised, k) * GIB)),
        f"memory.strategy={chosen.strategy}",
        f"training.micro_batch_size={chosen.micro_batch_size}",
        f"model.activation_checkpointing={str(chosen.activation_checkpointing).lower()}",
    ]
    train = ["train", "--preset", preset, *(word for s in settings for word in ("--set", s)), "--data", "DIR"]
    if processes == 1:
        return shlex.join(["redheart", *train])
    file = f"launch/accelerate/{'zero2' if chosen.strategy == 'gpu_8bit' else chosen.strategy}.yaml"
    if plan.nodes > 1:
        return shlex.join(
            ["bash", "launch/multinode/run_node.sh", "--node-rank", "R", "--config-file", file, "--", *train]
        )
    launcher = ["accelerate", "launch", "--config_file", file, "--num_processes", str(processes), "-m", "redheart"]
    return shlex.join([*launcher, *train])


def plan_table(plan: Plan) -> Table:
    rows = []
    for strategy in dict.fromkeys(c.strategy for c in plan.candidates):
        candidates = [c for c in plan.candidates if c.strategy == strategy]
        best = fastest(candidates) or smallest(candidates)
        rows.append(
            (
                ("→ " if best.fits and best is plan.chosen else "  ") + strategy,
                f"{best.micro_batch_size} × {best.gradient_accumulation_steps}",
                "yes" if best.activation_checkpointing else "no",
                "–" if plan.gpu_memory is None else f"{best.gpu_peak / GIB:.2f}",
                f"{best.host_peak / GIB:.2f}",
                f"{best.samples_per_s:.1f}" if best.fits else "too big",
                best.bound if best.fits else "",
            )
        )
    where = "on the CPU" if plan.gpu_memory is None else f"{plan.gpu_memory / GIB:.1f} GiB of GPU memory"
    title = f"{plan.preset}: {where}, {plan.host_memory / GIB:.1f} GiB on the host" + (
        f", {plan.nodes} × {plan.gpus_per_node} cards" if plan.nodes * plan.gpus_per_node > 1 else ""
    )
    columns = (
        "strategy",
        "batch ×\naccum.",
        "re-\ncompute",
        "GPU\nGiB",
        "host\nGiB",
        "samples\n/s",
        "bound by",
    )
    made = table(title, columns, rows)  # at most 80 characters wide with whole names
    made.box, made.pad_edge = box.SIMPLE_HEAD, False
    return made


def show_memory(candidate: Candidate, gpu_memory: int | None, host_memory: int) -> None:
    """A bar for the GPU (if there is one) and one for the host, term by term."""
    if gpu_memory is not None:
        console.print(_bar("GPU ", candidate.gpu, candidate.gpu_peak, gpu_memory))
    console.print(_bar("host", candidate.host, candidate.host_peak, host_memory))
    if candidate.host_pinned:
        console.print(
            f"     {candidate.host_pinned / GIB:.2f} GiB of it page-locked, which the system can neither swap nor move"
        )


def _bar(name: str, terms: dict[str, int], peak: int, budget: int) -> Text:
    shown = [(term, size) for term, size in terms.items() if size > 0]
    full = max(budget, sum(size for _, size in shown), 1)
    bar, legend, used, line = Text(f"{name} "), Text("     "), 0, 5
    for (term, size), color in zip(shown, cycle(COLORS), strict=False):
        cells = round(WIDTH * size / full)
        used += cells
        bar.append("█" * cells, style=color)
        line += len(entry := f"{term} {size / GIB:.2f}  ") + 2
        if line > LEGEND:
            legend.append("\n     ")
            line = len(entry) + 7
        legend.append("■ ", style=color)
        legend.append(entry)
    bar.append("·" * max(0, WIDTH - used))
    bar.append(f"  peak {peak / GIB:.2f} of {budget / GIB:.2f} GiB\n")
    return bar.append_text(legend)
