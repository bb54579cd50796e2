"""Losses of runs over their steps: where they stand in TensorBoard (train/board.py), read from there, and drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from redheart.evaluation.page import Picture, figure
from redheart.tasks import TASKS

OVERVIEW, QUALITY, MODULES, SYNERGY = (
    "0_overview",
    "1_quality",
    "2_modules",
    "3_synergy",
)  # in the order TensorBoard shows them
LOSS, DEV, CONSTANT = (
    f"{OVERVIEW}/{name}" for name in ("loss", "dev_loss", "constant")
)  # weighted sums over all answers
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
    from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    try:
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    except (FileNotFoundError, DirectoryDeletedError):  # the run is being replaced
        return {}
    names = [name for name in events.Tags()["scalars"] if name.startswith(prefix)]
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in names}


def dev_losses(run: Path) -> dict[str, dict[int, float]]:
    """Dev loss by step of every task, and the weighted `total`; empty where there is none."""
    found = scalars(run)
    names = {TOTAL: DEV, **{task: tag(task, "dev_loss") for task in TASKS}}
    return {name: found[place] for name, place in names.items() if place in found}


def draw(lines: Iterable[Line], path: Path, **settings: Any) -> None:
    """Lines over optimizer steps, or what `settings` of the axes (xlabel, yscale …) say."""
    picture = figure(7, 4.5)
    axes = picture.subplots()
    for line in lines:
        axes.plot(line.points.keys(), line.points.values(), line.style, lw=1.2, label=line.label)
    axes.set(**{"xlabel": "optimizer step"} | settings)
    axes.legend(fontsize=8)
    picture.savefig(path, dpi=120)


def learning_curves(found: Scalars, kept: int | None = None) -> Picture | None:
    """Losses of all answers together and of each, with the constant predictor's as a line across and the step of the checkpoint that
    was `kept` as one upright; from all `scalars` of a run, None where there are none. A run whose log has no line yet has its looks at
    dev alone."""
    names: dict[str, tuple[str, ...]] = {"all answers, weighted": (LOSS, DEV, CONSTANT)}
    names |= {n: tuple(tag(n, k) for k in ("train_loss", "dev_loss", "constant")) for n, t in TASKS.items() if t.final}
    first = 0 if LOSS in found else 1  # what has dev labels alone is not learned: no panel, once that can be told
    panels = [
        partial(_panel, name, [found.get(t, {}) for t in of], kept) for name, of in names.items() if of[first] in found
    ]
    return Picture("learning_curve.png", "losses over the steps", panels) if panels else None


def _panel(name: str, lines: Sequence[Mapping[int, float]], kept: int | None, axes: Any) -> None:
    train, dev, constant = lines
    if train:
        axes.plot(train.keys(), train.values(), "C0-", lw=0.8, alpha=0.7, label="training batch")
    axes.plot(dev.keys(), dev.values(), "C1.-", lw=1.4, label="dev")
    if constant:
        axes.axhline(constant[max(constant)], color="grey", lw=0.9, ls=":", label="constant predictor")
    if kept is not None:
        axes.axvline(kept, color="tab:red", lw=0.9, ls="--", label=f"kept: step {kept}")
    axes.set(title=name, xlabel="optimizer step", ylabel="loss")
    axes.legend(fontsize=7)
