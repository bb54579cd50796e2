"""Losses of runs over their steps: read from what TensorBoard holds of them, and drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LOSS = "dev_loss/"
TOTAL = f"{LOSS}total"


class Line(NamedTuple):
    points: Mapping[int, float]  # step -> loss
    style: str  # matplotlib's, such as "C0--"
    label: str | None  # None: not in the legend


def scalars(run: Path, prefix: str = "") -> dict[str, dict[int, float]]:
    """Values by step of every tag of a run's TensorBoard events that begins so; empty where there are none."""
    if not (run / "tensorboard").is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(prefix)]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}


def figure(width: float, height: float) -> Any:
    """An empty picture of so many inches, drawn without a screen; axes of it are made with `subplots`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def draw(lines: Iterable[Line], path: Path, marks: Iterable[float] = (), **settings: Any) -> None:
    """Lines over optimizer steps; `marks`: losses as dotted lines across; `settings` of the axes, such as ylabel and yscale."""
    picture = figure(7, 4.5)
    axes = picture.subplots()
    for line in lines:
        axes.plot(line.points.keys(), line.points.values(), line.style, lw=1.2, label=line.label)
    for mark in marks:
        axes.axhline(mark, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="optimizer step", **settings)
    axes.legend(fontsize=8)
    picture.savefig(path, dpi=120)


def learning_curve(run: Path) -> Path | None:
    """Draws training and dev loss from the run's TensorBoard events; None where there are none."""
    tags, path = scalars(run), run / "learning_curve.png"
    names = {"loss/total": ("C0.-", "training batch"), TOTAL: ("C1.-", "dev")}
    lines = [Line(tags[tag], *look) for tag, look in names.items() if tag in tags]
    if lines:
        draw(lines, path, ylabel="weighted loss (1 per task = constant predictor)")
    return path if lines else None
