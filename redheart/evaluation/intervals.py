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
FIGURES = ("constant", "linear", "above_constant", "above_linear")  # beside the network's own
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
    """Of one answer on so many texts: the metric of all three, and how far the network's lies above the others'; None of a baseline that
    there is not."""

    task: str
    rows: int
    metric: str
    model: Interval
    constant: Interval | None
    linear: Interval | None
    above_constant: Interval | None
    above_linear: Interval | None

    def cells(self) -> list[str]:
        """Of a row under COLUMNS."""
        values = ("–" if one is None else f"{one.value:.3f}" for one in (self.constant, self.linear))
        above = ("–" if one is None else str(one) for one in (self.above_constant, self.above_linear))
        return [self.task, str(self.rows), self.metric, str(self.model), *values, *above]

    def to_json(self) -> dict[str, Any]:
        return {name: v._asdict() if isinstance(v, Interval) else v for name, v in vars(self).items()}


def measured(model: Sides, constant: Sides, linear: Sides, same_rows: bool) -> list[Measured]:
    """One per final answer that people labelled on the held-out split; `same_rows`: that is dev itself (answers.cuts). A multilabel answer
    is left out where dev lacks it, or where no label on the held-out split is positive; any where all labels are alike, but of
    pairs, which are read either way round. A baseline may lack an answer."""
    found = []
    for task, held_out in model[1].items():
        kind: str = TASKS[task].kind
        if not held_out.varies and kind != "binary":
            continue
        if kind == "multilabel" and (task not in model[0] or not ((held_out.target > 0.5) & held_out.known).any()):
            continue
        sides = {}
        for side, (on_dev, answers) in (("model", model), ("constant", constant), ("linear", linear)):
            if task in answers:
                cut = cuts(on_dev[task], answers[task], same_rows) if kind == "multilabel" else None
                sides[side] = sums(kind, answers[task], cut)
        values = dict(zip(sides, resampled(kind, *sides.values()), strict=True))
        values |= {f"above_{side}": values["model"] - values[side] for side in sides if side != "model"}
        figures = {name: _interval(values[name]) if name in values else None for name in FIGURES}
        found.append(Measured(task, len(held_out.target), METRIC[kind], _interval(values["model"]), **figures))
    return found


def _interval(values: np.ndarray) -> Interval:
    return Interval(float(values[0]), *np.percentile(values[1:], [2.5, 97.5]).tolist())
