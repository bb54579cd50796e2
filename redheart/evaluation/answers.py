"""Answers row by row, where metrics of sums (metrics.py) are not enough: thresholds chosen on dev, bootstrap intervals.

Labels of people alone. A metric is a function of sums over rows, so that it follows for any resample of the rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from redheart.data.stream import SampleStream
from redheart.evaluation.evaluate import forward, predict_all
from redheart.finite import check_finite
from redheart.metrics import ROUNDING, macro_f1, telling
from redheart.schema import JUDGED_ORIGINS, LABELS, ORIGINS, Batch
from redheart.tasks import TASKS

JUDGES = [ORIGINS.index(o) for o in JUDGED_ORIGINS]


@dataclass(frozen=True)
class Answers:
    """Predictions, labels and label weights (0: no label) of one final answer on one split, [N, size] each; rows with no label are
    left out.

    `halves` [N] deals the rows in two by the hashes of their ids, for thresholds on the rows they are chosen from. `numbers` [N]:
    their places in the split.
    """

    prediction: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    halves: np.ndarray | None = None
    numbers: np.ndarray | None = None

    @property
    def known(self) -> np.ndarray:
        return self.weight > 0

    @property
    def varies(self) -> bool:
        """Whether the labels of any one entry differ: else there is nothing to tell apart."""
        low = np.where(self.known, self.target, np.inf).min(0)
        high = np.where(self.known, self.target, -np.inf).max(0)
        return bool((high > low).any())

    def rows(self, chosen: np.ndarray) -> Answers:
        """Those of the rows where `chosen` [N] is true."""
        return Answers(self.prediction[chosen], self.target[chosen], self.weight[chosen])

    def entries(self, columns: np.ndarray) -> Answers:
        """These entries alone, and of the rows those where one of them is labelled."""
        rows = self.known[:, columns].any(1)
        prediction, target, weight = (x[rows][:, columns] for x in (self.prediction, self.target, self.weight))
        return Answers(prediction, target, weight, None if self.halves is None else self.halves[rows])


def answers(
    model: nn.Module, stream: SampleStream, without: Collection[str] = (), max_rows: int | None = None
) -> dict[str, Answers]:
    """The final answers by task on a split (or `max_rows` rows evenly spread over it), where people labelled them, of a network
    wherever it is: ours, or one that is called as ours is (evaluate.forward)."""
    device = next(model.parameters()).device

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        return predict_all(forward(model, batch.to(device, torch.float32), without))

    return collect(predict, stream, max_rows)


def collect(
    predict: Callable[[Batch], dict[str, torch.Tensor]],
    stream: SampleStream,
    max_rows: int | None = None,
    batch_size: int = 128,
    finite: bool = True,
) -> dict[str, Answers]:
    """The same of anyone who predicts a batch: [B, size] by task, on the CPU. `finite`: what is not is an error."""
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {}
    label_names = list(LABELS)
    for batch in stream.in_order(batch_size, max_rows=max_rows):
        for name, prediction in predict(batch).items():
            task = TASKS[name]
            origin = batch.origins[:, label_names.index(task.label)]
            weight = batch.weights[task.label]
            rows = torch.isin(origin, torch.tensor(JUDGES, dtype=origin.dtype)) & (weight > 0).any(1)
            if task.final and rows.any():
                if finite:
                    check_finite({f"predictions of {name}": prediction[rows]})
                tensors = (prediction[rows], batch.labels[task.label][rows], weight[rows])
                halves = np.array([zlib.crc32(batch.ids[i].encode()) % 2 for i in rows.nonzero()[:, 0].tolist()])
                parts.setdefault(name, []).append((*(t.numpy() for t in tensors), halves, batch.keys[rows].numpy()))
    return {n: Answers(*(np.concatenate(x) for x in zip(*p, strict=True))) for n, p in parts.items()}


def thresholds(dev: Answers) -> np.ndarray:
    """Per entry the threshold of the highest F1 on dev, [size]: halfway between the two predictions it parts, 0 where everything is
    above it. It is found among the ranks, so that a monotone map of the predictions (evaluation/calibration.py) chooses the same texts."""
    return np.array([_threshold(*entry) for entry in zip(dev.prediction.T, dev.target.T, dev.known.T, strict=True)])


def _threshold(prediction: np.ndarray, target: np.ndarray, known: np.ndarray) -> float:
    order = np.argsort(-prediction[known], kind="stable")
    said, true = prediction[known][order].astype(float), (target[known] > 0.5)[order]
    if not len(said):
        return 0.0
    below = np.append(said[1:], -said[-1])
    f1 = 2 * true.cumsum() / (np.arange(1, len(said) + 1) + true.sum())
    f1[said == below] = -1.0  # equal predictions are not parted
    best = len(f1) - 1 - int(f1[::-1].argmax())  # of equals the one that says yes more often
    return float(said[best] + below[best]) / 2


def cuts(dev: Answers, held_out: Answers, same_rows: bool) -> np.ndarray:
    """The thresholds that judge `held_out`, [size]: those that are best on dev; or [N, size] where it is dev itself (`same_rows`):
    for the rows of either half those that are best on the other, so that no row has a say in its own."""
    if not same_rows:
        return thresholds(dev)
    assert held_out.halves is not None
    first = held_out.halves == 0
    return np.where(first[:, None], thresholds(held_out.rows(~first)), thresholds(held_out.rows(first)))


def sums(kind: str, given: Answers, cut: np.ndarray | None) -> np.ndarray:
    """What the metric is made of, row by row: [N, terms, size]; metrics of any rows follow from sums over them."""
    p, t, known = given.prediction.astype(float), given.target.astype(float), given.known
    if kind == "multilabel":
        positive, true = p > cut, t > 0.5
        terms = [positive & true, positive & ~true, ~positive & true]
    elif kind == "binary":
        # who says neither is right half of the time (metrics.pair_tally)
        terms = [np.where(p == 0.5, 0.5, (p > 0.5) == (t > 0.5)), np.ones_like(known)]
    else:  # from a value of their own on: what does not vary is 0, and little variation keeps its digits
        p, t = (x - _first_known(x, known) for x in (p, t))
        terms = [np.ones_like(p), p, t, p * p, t * t, p * t]
    return np.stack([np.where(known, x, 0).astype(np.float32 if kind != "score" else float) for x in terms], 1)


def metric(kind: str, total: np.ndarray) -> np.ndarray:
    """Sums over rows [..., terms, size] -> macro-F1, accuracy or mean Pearson correlation [...]."""
    if kind == "multilabel":
        return macro_f1(*np.moveaxis(total, -2, 0))
    if kind == "binary":
        right, n = np.moveaxis(total, -2, 0)
        return right.sum(-1) / n.sum(-1)
    n, p, t, pp, tt, pt = np.moveaxis(total, -2, 0)
    var_p, var_t = _variance(n, p, pp), _variance(n, t, tt)
    moves = (var_t > 0).any(tuple(range(var_t.ndim - 1)))  # entries that people labelled at all
    moves = telling(n.reshape(-1, n.shape[-1])[0], moves)  # of a bootstrap the first are all rows
    varies = (var_p > 0) & (var_t > 0)
    r = np.where(varies, (n * pt - p * t) / np.sqrt(np.where(varies, var_p * var_t, 1.0)), 0.0)
    return r.clip(-1, 1)[..., moves].mean(-1)


def left_out(task: str, given: Answers) -> list[str]:
    """Of an answer that Pearson's r judges the entries that its mean leaves out (`telling`), and how many labels they have."""
    if TASKS[task].kind != "score":
        return []
    n, terms = given.known.sum(0), sums("score", given, None).sum(0)
    varies = _variance(terms[0], terms[2], terms[4]) > 0
    entries = zip(LABELS[TASKS[task].label].names, n.tolist(), varies & ~telling(n, varies), strict=True)
    return [f"{task}.{name} ({count})" for name, count, out in entries if out]


def _first_known(x: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Of every column [N, size] the first value that is known, [size]; 0 where none is."""
    return np.where(known.any(0), x[known.argmax(0), np.arange(x.shape[1])], 0.0)


def _variance(n: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """n² times the variance; none where the difference is no more than the rounding of what it is the difference of."""
    found: np.ndarray = n * squares - total * total
    return np.where(found > ROUNDING * n * squares, found, 0.0)


def resampled(kind: str, *sides: np.ndarray, resamples: int = 1000, seed: int = 0) -> list[np.ndarray]:
    """Of every side's rows [N, terms, size] the metric on all of them, then on each bootstrap sample, the same rows of every side:
    [1 + resamples] (Efron and Tibshirani 1993, ch. 13)."""
    flat, generator = np.concatenate([rows.reshape(len(rows), -1) for rows in sides], 1), np.random.default_rng(seed)
    total = [flat.sum(0, keepdims=True)]
    for start in range(0, resamples, 50):  # a sample of N rows is N counts
        draws = generator.multinomial(len(flat), np.full(len(flat), 1 / len(flat)), min(50, resamples - start))
        total.append(draws.astype(flat.dtype) @ flat)
    parts = np.split(np.concatenate(total), len(sides), 1)
    return [metric(kind, part.reshape(-1, *rows.shape[1:])) for part, rows in zip(parts, sides, strict=True)]


def tuned_macro_f1(dev: Answers, held_out: Answers, same_rows: bool = False) -> float:
    """Macro-F1 on `held_out` with the thresholds of `cuts`; NaN where it has no positive label."""
    return float(metric("multilabel", sums("multilabel", held_out, cuts(dev, held_out, same_rows)).sum(0)))
