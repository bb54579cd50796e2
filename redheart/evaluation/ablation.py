"""What each module is worth: held-out metrics with it removed, or of a network trained without it, with intervals.

Removal asks how much the trained network leans on a module; retraining asks whether the network needs it at all. A
difference is metric(with) - metric(without) on the same rows, its interval the 2.5th to 97.5th percentile of the paired
bootstrap over rows (Efron and Tibshirani 1993, ch. 13). Labels of people alone judge. Emotions are said to be there above
the threshold that is best on dev (on the other half of it, where dev is judged), chosen anew for every variant.

Of networks of several seeds the differences are averaged, and the interval is Student's over the seeds: what one network leans on by
chance, another does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from redheart.evaluation.answers import Answers, cuts, resampled, sums
from redheart.tasks import TASKS

METRIC = {"multilabel": "macro_f1", "binary": "accuracy", "score": "pearson"}


@dataclass(frozen=True)
class Effect:
    """A line of the table. `difference` > 0: the network is better with the module; `low`, `high`: 95 % interval."""

    module: str
    how: str  # removed, or retrained
    task: str
    metric: str
    rows: int
    whole: float
    without: float
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "helps" if self.low > 0 else "hurts" if self.high < 0 else "–"


def over_seeds(each: Sequence[Sequence[Effect]]) -> list[Effect]:
    """The effects of networks of at least two seeds as one: means, and Student's 95 % interval of the mean difference.

    A line that not every network has is left out: an answer that one of them could not be judged by is no answer of all.
    """
    lines = [{(e.module, e.how, e.task): e for e in effects} for effects in each]
    found = []
    for key, first in lines[0].items():
        if not all(key in line for line in lines):
            continue
        same = [line[key] for line in lines]
        whole, without, differences = (
            np.array([getattr(e, name) for e in same]) for name in ("whole", "without", "difference")
        )
        half = student.ppf(0.975, len(same) - 1) * differences.std(ddof=1) / np.sqrt(len(same))
        mean = float(differences.mean())
        figures = (float(whole.mean()), float(without.mean()), mean, mean - float(half), mean + float(half))
        found.append(Effect(*key, first.metric, first.rows, *figures))
    return found


def effects(
    module: str,
    how: str,
    whole: tuple[dict[str, Answers], ...],
    without: tuple[dict[str, Answers], ...],
    resamples: int = 1000,
    seed: int = 0,
    same_rows: bool = False,
) -> list[Effect]:
    """One Effect per answer; `whole` and `without` are (dev, held-out) answers of the two networks; `same_rows`: held out is dev
    itself (answers.cuts). An answer that is gone without the module counts as nothing: metric 0. Left out as in intervals.measured is
    what has labels all alike, but of pairs, a multilabel answer that dev lacks too, and emotions that nobody has."""
    lines = []
    for name, one in whole[1].items():
        kind = TASKS[name].kind
        if not one.varies and kind != "binary":
            continue
        if kind == "multilabel" and (name not in whole[0] or not ((one.target > 0.5) & one.known).any()):
            continue
        cut: list[np.ndarray | None] = [None, None]
        if kind == "multilabel":
            sides = [(x[0].get(name), x[1].get(name)) for x in (whole, without)]
            cut = [cuts(dev, held_out, same_rows) if dev and held_out else None for dev, held_out in sides]
        present = sums(kind, one, cut[0])
        if name in without[1]:
            values = resampled(kind, present, sums(kind, without[1][name], cut[1]), resamples=resamples, seed=seed)
        else:
            values = [*resampled(kind, present, resamples=resamples, seed=seed), np.zeros(resamples + 1)]
        difference = values[0] - values[1]
        low, high = np.percentile(difference[1:], [2.5, 97.5])
        figures = (float(values[0][0]), float(values[1][0]), float(difference[0]), float(low), float(high))
        lines.append(Effect(module, how, name, METRIC[kind], len(present), *figures))
    return lines
