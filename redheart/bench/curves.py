"""Dev losses of runs: read from what TensorBoard holds of them, and drawn in one picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

LOSS = "dev_loss/"
TOTAL = f"{LOSS}total"


def dev_losses(run: Path) -> dict[str, dict[int, float]]:
    """Dev losses by step, of the whole (TOTAL) and of every answer; empty where there is no run."""
    if not (run / "tensorboard").is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(LOSS)]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}


class Line(NamedTuple):
    points: Sequence[tuple[float, float]]  # (step, dev loss)
    style: str  # matplotlib's, such as "C0--"
    label: str | None  # None: not in the legend


def draw(lines: Iterable[Line], marks: Iterable[float], title: str, path: Path) -> None:
    """A line per run over optimizer steps; `marks`: dev losses as dotted lines across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for line in lines:
        axes.plot(*zip(*line.points, strict=True), line.style, lw=1.2, label=line.label)
    for mark in marks:
        axes.axhline(mark, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="optimizer steps", ylabel="dev loss", yscale="log", title=title)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
