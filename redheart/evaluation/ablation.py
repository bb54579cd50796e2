"""What each module is worth: held-out metrics with it removed, or of a network trained without it, with intervals.

Removal asks how much the trained network leans on a module; retraining asks whether the network needs it at all. A
difference is metric(with) - metric(without) on the same rows, its interval the 2.5th to 97.5th percentile of the paired
bootstrap over rows (Efron and Tibshirani 1993, ch. 13). Labels of people alone judge. Emotions are said to be there above
the threshold that is best on dev, chosen anew for every variant.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from redheart.data.stream import SampleStream
from redheart.evaluation.evaluate import forward
from redheart.model.redheart import RedHeartModel
from redheart.schema import JUDGED_ORIGINS, LABELS, ORIGINS
from redheart.tasks import TASKS

METRIC = {"multilabel": "macro_f1", "binary": "accuracy", "score": "pearson"}
THRESHOLDS = np.linspace(0.05, 0.95, 37)
JUDGES = [ORIGINS.index(o) for o in JUDGED_ORIGINS]


@dataclass(frozen=True)
class Answers:
    """Predictions, labels and label masks of one final answer on one split, [N, size] each; rows with no label are left out."""

    prediction: np.ndarray
    target: np.ndarray
    known: np.ndarray


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


@torch.no_grad()
def answers(
    model: RedHeartModel, stream: SampleStream, without: Collection[str] = (), max_rows: int | None = None
) -> dict[str, Answers]:
    """The final answers by task on a split (or `max_rows` rows evenly spread over it), where people labelled them."""
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {}
    label_names = list(LABELS)
    for batch in stream.in_order(128, max_rows=max_rows):
        outputs = forward(model, batch.to("cpu", torch.float32), without)
        for name, task in TASKS.items():
            prediction = task.predict(outputs) if task.final else None
            origin = batch.origins[:, label_names.index(task.label)]
            rows = torch.isin(origin, torch.tensor(JUDGES, dtype=origin.dtype)) & (batch.weights[task.label] > 0).any(1)
            if prediction is not None and rows.any():
                found = (prediction[rows], batch.labels[task.label][rows], batch.weights[task.label][rows] > 0)
                parts.setdefault(name, []).append(tuple(t.numpy() for t in found))
    return {n: Answers(*(np.concatenate(x) for x in zip(*p, strict=True))) for n, p in parts.items()}


def thresholds(dev: Answers) -> np.ndarray:
    """Per entry the threshold of the highest F1 on dev, [size]."""
    true = (dev.target > 0.5) & dev.known
    best = np.zeros(dev.target.shape[1])
    score = np.full(dev.target.shape[1], -1.0)
    for threshold in THRESHOLDS:
        said = (dev.prediction > threshold) & dev.known
        f1 = 2 * (said & true).sum(0) / np.maximum(said.sum(0) + true.sum(0), 1)
        best, score = np.where(f1 > score, threshold, best), np.maximum(score, f1)
    return best


def sums(kind: str, given: Answers, cut: np.ndarray | None) -> np.ndarray:
    """What the metric is made of, row by row: [N, terms, size]; metrics of any rows follow from sums over them."""
    p, t, known = given.prediction.astype(float), given.target.astype(float), given.known
    if kind == "multilabel":
        said, true = p > cut, t > 0.5
        terms = [said & true, said & ~true, ~said & true]
    elif kind == "binary":
        terms = [(p > 0.5) == (t > 0.5), np.ones_like(known)]
    else:
        terms = [np.ones_like(p), p, t, p * p, t * t, p * t]
    return np.stack([np.where(known, x, 0).astype(np.float32 if kind != "score" else float) for x in terms], 1)


def metric(kind: str, total: np.ndarray) -> np.ndarray:
    """Sums over rows [..., terms, size] -> macro-F1, accuracy or mean Pearson correlation [...]."""
    if kind == "multilabel":
        tp, fp, fn = np.moveaxis(total, -2, 0)
        return (2 * tp / np.maximum(2 * tp + fp + fn, 1e-12)).mean(-1)
    if kind == "binary":
        right, n = np.moveaxis(total, -2, 0)
        return right.sum(-1) / n.sum(-1)
    n, p, t, pp, tt, pt = np.moveaxis(total, -2, 0)
    var_p, var_t = n * pp - p * p, n * tt - t * t
    moves = (var_t > 1e-9).any(tuple(range(var_t.ndim - 1)))  # entries that people labelled at all
    r = (n * pt - p * t) / np.sqrt(np.maximum(var_p * var_t, 1e-18))
    return r[..., moves].mean(-1)


def effects(
    module: str,
    how: str,
    whole: tuple[dict[str, Answers], ...],
    without: tuple[dict[str, Answers], ...],
    resamples: int = 1000,
    seed: int = 0,
) -> list[Effect]:
    """One Effect per answer; `whole` and `without` are (dev, held-out) answers of the two networks. An answer that is gone
    without the module counts as nothing: metric 0."""
    lines = []
    for name, one in whole[1].items():
        kind = TASKS[name].kind
        cut = (
            [None, None]
            if kind != "multilabel"
            else [thresholds(x[0][name]) if name in x[0] else None for x in (whole, without)]
        )
        mine = sums(kind, one, cut[0])
        other = sums(kind, without[1][name], cut[1]) if name in without[1] else None
        draws = np.random.default_rng(seed).multinomial(len(mine), np.full(len(mine), 1 / len(mine)), resamples)
        values = [_resampled(kind, x, draws) if x is not None else np.zeros(resamples + 1) for x in (mine, other)]
        difference = values[0] - values[1]
        low, high = np.percentile(difference[1:], [2.5, 97.5])
        figures = (float(values[0][0]), float(values[1][0]), float(difference[0]), float(low), float(high))
        lines.append(Effect(module, how, name, METRIC[kind], len(mine), *figures))
    return lines


def _resampled(kind: str, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The metric on all rows, then on each resample [1 + resamples]."""
    flat = rows.reshape(len(rows), -1)
    total = np.concatenate([flat.sum(0, keepdims=True), draws.astype(flat.dtype) @ flat])
    return metric(kind, total.reshape(-1, *rows.shape[1:]))
