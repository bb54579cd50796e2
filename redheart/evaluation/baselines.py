"""What the network has to beat: the constant predictor, and linear models on the same frozen features, mean-pooled.

Scores: ridge regression per entry. Emotions (yes or no at 0.5): logistic regression per entry. Pairs: logistic
regression on the difference of the pooled vectors, without intercept, so that swapping the texts swaps the answer.
All are fitted on the training split with the same label weights, and judged by the same tallies as the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from redheart.data.stream import SampleStream
from redheart.evaluation.evaluate import Row, add_tallies
from redheart.metrics import Tally, empty_tally, summarise
from redheart.schema import LABELS, ORIGINS, Batch
from redheart.tasks import TASKS, Task

Predictor = Callable[[np.ndarray], np.ndarray]  # [B, E] -> [B]
ALPHAS = (10.0, 100.0, 1000.0, 10000.0)  # ridge chooses among these by leave-one-out
MAX_FIT = 20_000  # labelled rows a line is fitted to, evenly spread where there are more


@dataclass(frozen=True)
class Pooled:
    """One split: mean-pooled features [N, E], pooled text minus pooled contrast [N, E], labels and weights as in Batch."""

    features: np.ndarray
    differences: np.ndarray
    labels: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


def pool(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(mean over tokens [B, E], the same minus the contrast's, zero where there is none)."""
    mean = (batch.features.float() * batch.mask[..., None]).sum(1) / batch.mask.sum(1, keepdim=True)
    difference = torch.zeros_like(mean)
    if len(batch.contrast_rows):
        contrast = (batch.contrast_features.float() * batch.contrast_mask[..., None]).sum(1)
        difference[batch.contrast_rows] = mean[batch.contrast_rows] - contrast / batch.contrast_mask.sum(
            1, keepdim=True
        )
    return mean.numpy(), difference.numpy()


def pool_split(stream: SampleStream) -> Pooled:
    pooled, labels, weights = [], [], []
    for batch in stream.in_order(256):
        pooled.append(pool(batch))
        labels.append(batch.labels)
        weights.append(batch.weights)
    return Pooled(
        np.concatenate([p for p, _ in pooled]),
        np.concatenate([d for _, d in pooled]),
        {n: np.concatenate([x[n].numpy() for x in labels]) for n in LABELS},
        {n: np.concatenate([x[n].numpy() for x in weights]) for n in LABELS},
    )


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline: one predictor per entry of every final answer."""

    predictors: dict[str, list[Predictor]]

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Predictions [B, size] by task."""
        features, differences = pool(batch)
        return {
            name: torch.from_numpy(
                np.stack([p(differences if TASKS[name].kind == "binary" else features) for p in predictors], 1)
            )
            for name, predictors in self.predictors.items()
        }

    def metrics(self, held_out: SampleStream) -> dict[Row, dict[str, float]]:
        """By (task, origin), as Evaluation.metrics."""
        tallies: dict[Row, Tally] = {
            (n, o): empty_tally(LABELS[TASKS[n].label].size) for n in self.predictors for o in ORIGINS
        }
        for batch in held_out.in_order(256):
            add_tallies(tallies, self(batch), batch)
        return {row: summary for row, sums in tallies.items() if (summary := summarise(sums))}


def baselines(train: SampleStream) -> dict[str, Baseline]:
    """`constant` and `linear`, fitted on the training split."""
    data = pool_split(train)
    return {
        kind: Baseline(
            {
                name: [fit(task, data, column) for column in range(LABELS[task.label].size)]
                for name, task in TASKS.items()
                if task.final
            }
        )
        for kind, fit in (("constant", _constant), ("linear", _linear))
    }


def _constant(task: Task, data: Pooled, column: int) -> Predictor:
    target, weight = data.labels[task.label][:, column], data.weights[task.label][:, column]
    mean = float((target * weight).sum() / weight.sum()) if weight.sum() > 0 else 0.5
    return lambda x: np.full(len(x), mean)


def _linear(task: Task, data: Pooled, column: int) -> Predictor:
    """Falls to the constant only where no line can be drawn: fewer than two labels, or all alike."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    weight = data.weights[task.label][:, column]
    known = np.flatnonzero(weight > 0)
    known = known[:: max(1, len(known) // MAX_FIT)]
    x = (data.differences if task.kind == "binary" else data.features)[known]
    y, weight = data.labels[task.label][known, column], weight[known]
    classes = task.kind in ("binary", "multilabel")
    if len(y) < 2 or len(np.unique(y > 0.5 if classes else y)) < 2:
        return _constant(task, data, column)
    if not classes:
        ridge = make_pipeline(StandardScaler(), RidgeCV(ALPHAS)).fit(x, y, ridgecv__sample_weight=weight)
        low, high = LABELS[task.label].low, LABELS[task.label].high
        return lambda z: np.clip(ridge.predict(z), low, high)
    pair = task.kind == "binary"
    model = make_pipeline(
        StandardScaler(with_mean=not pair), LogisticRegression(C=0.01, max_iter=2000, fit_intercept=not pair)
    ).fit(x, y > 0.5, logisticregression__sample_weight=weight)
    return lambda z: model.predict_proba(z)[:, 1]
