"""How far answers can be taken at their word, before and after calibration: expected calibration error, Brier score, diagram.

The expected calibration error of an answer (Naeini, Cooper and Hauskrecht 2015): all labelled entries of it together are dealt into
15 bins of equal mass by what was predicted, and |mean prediction - mean label| is averaged over the bins, weighted by their entries.
Of ratings and strengths it is in the label's units, and the Brier score is the mean squared error. Labels of people alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from redheart.evaluation.answers import Answers
from redheart.evaluation.calibration import Line, crossed, uncalibrated, with_lines
from redheart.evaluation.page import Picture
from redheart.schema import LABELS
from redheart.tasks import TASKS

BINS = 15
BINNED = f"{BINS} bins of equal mass over all labelled entries of an answer"
COLUMNS = ("answer", "texts", "ECE ↓", "calibrated", "Brier ↓", "calibrated", "mae ↓", "calibrated")


@dataclass(frozen=True)
class Figures:
    """`bins` [bins, 3]: mean prediction, mean label, entries."""

    ece: float
    brier: float
    mae: float
    bins: np.ndarray

    def to_json(self) -> dict[str, float]:
        return {"ece": self.ece, "brier": self.brier, "mae": self.mae}


@dataclass(frozen=True)
class Reliability:
    """Of one answer; `entries`: expected calibration error before and after of every entry with a label."""

    task: str
    texts: int
    before: Figures
    after: Figures
    entries: Mapping[str, tuple[float, float]]

    def cells(self) -> list[str]:
        """Of a row under COLUMNS."""
        pairs = zip(self.before.to_json().values(), self.after.to_json().values(), strict=True)
        return [self.task, str(self.texts), *(f"{value:.3f}" for pair in pairs for value in pair)]

    def to_json(self) -> dict[str, Any]:
        entries = {name: {"before": before, "after": after} for name, (before, after) in self.entries.items()}
        return {"texts": self.texts, "before": self.before.to_json(), "after": self.after.to_json(), "ece": entries}


def binned(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[n], [n] -> [at most BINS, 3]: mean prediction, mean label, how many; equal predictions share a bin."""
    edges = np.quantile(prediction, np.arange(1, BINS) / BINS)
    place = np.searchsorted(edges, prediction, side="right")
    sums = np.stack([np.bincount(place, x, minlength=BINS) for x in (prediction, target, np.ones_like(prediction))], 1)
    sums = sums[sums[:, 2] > 0]
    return np.concatenate([sums[:, :2] / sums[:, 2:], sums[:, 2:]], 1)


def calibration_error(prediction: np.ndarray, target: np.ndarray) -> float:
    said, true, count = binned(prediction, target).T
    return float(count @ np.abs(said - true) / count.sum())


def figures(given: Answers) -> Figures:
    p, t = given.prediction[given.known].astype(float), given.target[given.known].astype(float)
    return Figures(calibration_error(p, t), float(((p - t) ** 2).mean()), float(np.abs(p - t).mean()), binned(p, t))


def calibrated(
    held_out: Mapping[str, Answers], lines: Mapping[str, tuple[Line, ...]], same_rows: bool
) -> dict[str, Answers]:
    """Scores (calibration.score_split) -> answers calibrated by `lines`, or, where they were fitted on these very rows (`same_rows`),
    of each half of the rows by what the other half says."""
    return {
        name: crossed(name, scored)
        if same_rows
        else with_lines(name, lines[name], scored)
        if name in lines
        else uncalibrated(name, scored)
        for name, scored in held_out.items()
    }


def reliability(
    held_out: Mapping[str, Answers], lines: Mapping[str, tuple[Line, ...]], same_rows: bool
) -> list[Reliability]:
    """One per answer of `held_out`, before and after `calibrated`."""
    found = []
    for name, after in calibrated(held_out, lines, same_rows).items():
        scored = held_out[name]
        before = uncalibrated(name, scored)
        errors = {
            entry: (_entry_error(before, k), _entry_error(after, k))
            for k, entry in enumerate(LABELS[TASKS[name].label].names)
            if scored.known[:, k].any()
        }
        found.append(Reliability(name, len(scored.target), figures(before), figures(after), errors))
    return found


def _entry_error(given: Answers, entry: int) -> float:
    known = given.known[:, entry]
    return calibration_error(given.prediction[known, entry].astype(float), given.target[known, entry].astype(float))


def picture(found: list[Reliability]) -> Picture:
    """A panel per answer: mean label over mean prediction of every bin, before and after; on the diagonal they agree."""
    return Picture("reliability.png", "mean label over mean prediction", [partial(_panel, one) for one in found])


def _panel(one: Reliability, axes: Any) -> None:
    label = LABELS[TASKS[one.task].label]
    axes.plot([label.low, label.high], [label.low, label.high], color="grey", lw=0.8, ls=":")
    for side, look, name in ((one.before, "C1.-", "before"), (one.after, "C0.-", "calibrated")):
        axes.plot(side.bins[:, 0], side.bins[:, 1], look, lw=1.2, label=f"{name}, {side.ece:.3f}")
    axes.set(title=one.task, xlabel="mean prediction", ylabel="mean label")
    axes.legend(fontsize=7, title="expected calibration error", title_fontsize=7)
