"""One metric of every answer that people labelled, beside the baselines', with 95 % intervals of a bootstrap over the held-out rows.

Macro-F1 with thresholds from dev, accuracy or Pearson's r, as modules are measured (ablation.py); differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from redheart.evaluation.ablation import METRIC
from redheart.evaluation.answers import Answers, cuts, resampled, sums
from redheart.tasks import TASKS

COLUMNS = ("answer", "texts", "metric", "Red Heart", "constant", "linear", "above the constant", "above linear")
Sides = tuple[Mapping[str, Answers], Mapping[str, Answers]]  # answers on dev and on the held-out split, by task


class Interval(NamedTuple):
    """A figure, and its 2.5th and 97.5th percentile over resamples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Measured:
    """Of one answer on so many texts: the metric of all three, and how far the network's lies above the others'."""

    task: str
    rows: int
    metric: str
    model: Interval
    constant: Interval
    linear: Interval
    above_constant: Interval
    above_linear: Interval

    def cells(self) -> list[str]:
        """Of a row under COLUMNS."""
        values = (
            f"{self.constant.value:.3f}",
            f"{self.linear.value:.3f}",
            str(self.above_constant),
            str(self.above_linear),
        )
        return [self.task, str(self.rows), self.metric, str(self.model), *values]

    def to_json(self) -> dict[str, Any]:
        return {name: v._asdict() if isinstance(v, Interval) else v for name, v in vars(self).items()}


def measured(model: Sides, constant: Sides, linear: Sides, same_rows: bool) -> list[Measured]:
    """One per final answer that people labelled on the held-out split; `same_rows`: that is dev itself (answers.cuts). A multilabel answer
    is left out where dev lacks it, or where no label on the held-out split is positive; any where all labels are alike."""
    found = []
    for task, held_out in model[1].items():
        kind: str = TASKS[task].kind
        if not held_out.varies:
            continue
        if kind == "multilabel" and (task not in model[0] or not ((held_out.target > 0.5) & held_out.known).any()):
            continue
        sides = []
        for on_dev, answers in (model, constant, linear):
            cut = cuts(on_dev[task], answers[task], same_rows) if kind == "multilabel" else None
            sides.append(sums(kind, answers[task], cut))
        values = resampled(kind, *sides)
        values += [values[0] - values[1], values[0] - values[2]]
        found.append(Measured(task, len(held_out.target), METRIC[kind], *map(_interval, values)))
    return found


def _interval(values: np.ndarray) -> Interval:
    return Interval(float(values[0]), *np.percentile(values[1:], [2.5, 97.5]).tolist())
