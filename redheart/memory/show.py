"""A plan in the terminal: a table of candidates and bars of where the memory goes."""

from __future__ import annotations

from itertools import cycle

from rich.table import Table
from rich.text import Text

from redheart.console import console, table
from redheart.memory.budget import Budget
from redheart.memory.plan import GIB, Candidate, Plan, fastest, smallest

PLAIN = ("red", "yellow", "green", "cyan", "blue", "magenta")
COLORS = (*PLAIN, *(f"bright_{color}" for color in PLAIN))
WIDTH = 60  # characters of a full bar


def show_plan(plan: Plan, budget: Budget) -> None:
    """The best candidate of every strategy, the chosen one's bars, and what the times assume."""
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
        f"over PCIe, {card.host_bytes / 1e9:.0f} GB/s of host memory"
    )


def plan_table(plan: Plan) -> Table:
    rows = []
    for strategy in dict.fromkeys(c.strategy for c in plan.candidates):
        candidates = [c for c in plan.candidates if c.strategy == strategy]
        best = fastest(candidates) or smallest(candidates)
        rows.append(
            (
                ("→ " if best.fits and best is plan.chosen else "  ") + strategy,
                best.micro_batch_size,
                best.gradient_accumulation_steps,
                "yes" if best.activation_checkpointing else "no",
                "–" if plan.gpu_memory is None else f"{best.gpu_peak / GIB:.2f}",
                f"{best.host_peak / GIB:.2f}",
                f"{best.samples_per_s:.1f}" if best.fits else "does not fit",
                best.bound if best.fits else "",
            )
        )
    where = "on the CPU" if plan.gpu_memory is None else f"{plan.gpu_memory / GIB:.1f} GiB of GPU memory"
    title = f"{plan.preset}: {where}, {plan.host_memory / GIB:.1f} GiB on the host" + (
        f", {plan.nodes} × {plan.gpus_per_node} cards" if plan.nodes * plan.gpus_per_node > 1 else ""
    )
    columns = ("strategy", "micro-batch", "accumulation", "recompute", "GPU GiB", "host GiB", "samples/s", "bound by")
    return table(title, columns, rows)


def show_memory(candidate: Candidate, gpu_memory: int | None, host_memory: int) -> None:
    """A bar for the GPU (if there is one) and one for the host, term by term."""
    if gpu_memory is not None:
        console.print(_bar("GPU ", candidate.gpu, candidate.gpu_peak, gpu_memory))
    console.print(_bar("host", candidate.host, candidate.host_peak, host_memory))


def _bar(name: str, terms: dict[str, int], peak: int, budget: int) -> Text:
    shown = [(term, size) for term, size in terms.items() if size > 0]
    full = max(budget, sum(size for _, size in shown), 1)
    bar, legend, used = Text(f"{name} "), Text("     "), 0
    for (term, size), color in zip(shown, cycle(COLORS), strict=False):
        cells = round(WIDTH * size / full)
        used += cells
        bar.append("█" * cells, style=color)
        legend.append("■ ", style=color)
        legend.append(f"{term} {size / GIB:.2f}  ")
    bar.append("·" * max(0, WIDTH - used))
    bar.append(f"  peak {peak / GIB:.2f} of {budget / GIB:.2f} GiB\n")
    return bar.append_text(legend)
