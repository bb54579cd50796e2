"""Losses of runs over their steps: where they stand in TensorBoard (train/board.py), read from there, and drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from redheart.tasks import TASKS

# in the order in which TensorBoard shows them
OVERVIEW, QUALITY, MODULES, SYNERGY = "0_overview", "1_quality", "2_modules", "3_synergy"
# weighted sums over all answers
LOSS, DEV, CONSTANT = f"{OVERVIEW}/loss", f"{OVERVIEW}/dev_loss", f"{OVERVIEW}/constant"
RATE = f"{OVERVIEW}/samples_per_s"
TOTAL = "total"
Scalars = Mapping[str, Mapping[int, float]]  # tag -> step -> value


def tag(task: str, name: str) -> str:
    """Of a figure of a task: `train_loss`, `dev_loss`, `constant` …"""
    return f"{QUALITY if task in TASKS and TASKS[task].final else MODULES}/{task}/{name}"


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
    names = [name for name in events.Tags()["scalars"] if name.startswith(prefix)]
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in names}


def dev_losses(run: Path) -> dict[str, dict[int, float]]:
    """Dev loss by step of every task, and the weighted `total`; empty where there is none."""
    found = scalars(run)
    names = {TOTAL: DEV, **{task: tag(task, "dev_loss") for task in TASKS}}
    return {name: found[place] for name, place in names.items() if place in found}


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
    names = {LOSS: ("C0.-", "training batch"), DEV: ("C1.-", "dev")}
    lines = [Line(tags[tag], *look) for tag, look in names.items() if tag in tags]
    if lines:
        draw(lines, path, ylabel="weighted loss (1 per task = constant predictor)")
    return path if lines else None
