"""Did it learn? Every trained answer, calibrated, beside the best constant and the linear model, in at most three lines.

The rule: of every held-out text the squared error over the entries that people labelled (of probabilities the Brier score; of a pair
that of the probability that the text is the better one) is taken of the network and of a baseline. The mean of these paired
differences has the 95 % interval mean ± t · sd / √n (Student's t, n texts). An answer is better where the interval lies below 0,
worse where it lies above; where it holds 0, or with fewer than MIN_TEXTS texts, there are too few rows to tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from redheart.evaluation.answers import Answers
from redheart.metrics import MIN_TEXTS
from redheart.tasks import TASKS

BASELINES = ("constant", "linear")
WORDS = (
    ("constant", "better than the best constant on", "worse than the best constant on"),
    ("linear", "ahead of a linear model on", "behind a linear model on"),
)
Finding = Literal["better", "worse", "open"]


@dataclass(frozen=True)
class Difference:
    """Squared error of the network minus a baseline's: mean over texts and its 95 % interval."""

    mean: float
    low: float
    high: float

    def finding(self, texts: int) -> Finding:
        if texts < MIN_TEXTS or self.low <= 0 <= self.high:
            return "open"
        return "better" if self.high < 0 else "worse"


@dataclass(frozen=True)
class Verdict:
    """`against`: by baseline, then by answer, where there is that baseline; `texts`: labelled held-out texts by answer."""

    texts: dict[str, int]
    against: dict[str, dict[str, Difference]]

    def on(self, baseline: str, finding: Finding) -> list[str]:
        """The answers of which that is found."""
        return [name for name, d in self.against[baseline].items() if d.finding(self.texts[name]) == finding]

    def lines(self) -> list[str]:
        """What is better or worse than the constant, ahead of or behind the linear model, and what cannot be told: a line each."""
        told = []
        for baseline, ahead, behind in WORDS:
            both = ((ahead, self.on(baseline, "better")), (behind, self.on(baseline, "worse")))
            if parts := [f"{words} {', '.join(names)}" for words, names in both if names]:
                told.append("; ".join(parts))
        unclear = {b: self.on(b, "open") for b in BASELINES}
        third = "; ".join(
            f"{', '.join(f'{n} ({self.texts[n]})' for n in names)} against the {b}"
            for b, names in unclear.items()
            if names
        )
        return [*told, *([f"too few rows to tell on {third}"] if third else [])]

    def to_json(self) -> dict[str, Any]:
        return {
            "lines": self.lines(),
            "answers": {
                name: {"texts": n} | {b: asdict(self.against[b][name]) for b in BASELINES if name in self.against[b]}
                for name, n in self.texts.items()
            },
        }


def judge(network: Mapping[str, Answers], others: Mapping[str, Mapping[str, Answers]]) -> Verdict:
    """`network` and those of BASELINES that there are in `others`: predictions by answer, in the label's units, on the same held-out rows.
    Where all labels are alike there is nothing to tell apart; those of pairs never are, which are read either way round."""
    told = {name: a for name, a in network.items() if a.varies or TASKS[name].kind == "binary"}
    against = {
        b: {name: difference(ours, others[b][name]) for name, ours in told.items() if name in others.get(b, {})}
        for b in BASELINES
    }
    return Verdict({name: len(a.target) for name, a in told.items()}, against)


def difference(ours: Answers, theirs: Answers) -> Difference:
    """Of the squared errors, text by text. The interval of fewer than two texts is unbounded."""
    apart = squared_errors(ours) - squared_errors(theirs)
    mean, n = float(apart.mean()), len(apart)
    if n < 2:
        return Difference(mean, -np.inf, np.inf)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1) * apart.std(ddof=1) / n**0.5)
    return Difference(mean, mean - half, mean + half)


def squared_errors(given: Answers) -> np.ndarray:
    """[N], the mean over the labelled entries of each text."""
    known = given.known
    error = np.where(known, (given.prediction.astype(float) - given.target) ** 2, 0.0)
    return error.sum(1) / known.sum(1)
