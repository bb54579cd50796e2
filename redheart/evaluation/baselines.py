"""What the network has to beat: for every metric the constant that is best for it, and linear models on the same frozen features,
mean-pooled; SURD's shares also a look-up by the predicted regret.

Scores: ridge regression per entry. Emotions (yes or no at 0.5): logistic regression per entry. Pairs: logistic
regression on the difference of the pooled vectors, without intercept, so that swapping the texts swaps the answer.
All are fitted on the training split with the same label weights, and judged by the same tallies as the model. An entry without a label
there has no baseline, which is said as NaN, and an answer none where such an entry is to be judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from redheart.causality.levels import level_of
from redheart.data.stream import SampleStream
from redheart.evaluation.answers import Answers, collect
from redheart.evaluation.evaluate import Row, add_tallies
from redheart.metrics import empty_tally, not_finite, summarise
from redheart.schema import LABELS, ORIGINS, Batch
from redheart.tasks import TASKS, Task

Predictor = Callable[[np.ndarray], np.ndarray]  # [B, E] -> [B]
Predict = Callable[[Batch], dict[str, torch.Tensor]]  # a batch -> [B, size] by task
Best = Callable[[np.ndarray, np.ndarray], float]  # values and weights [n] -> what to say of all
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


def judged(predictors: Mapping[str, Predict], held_out: SampleStream) -> dict[str, dict[Row, dict[str, float]]]:
    """Metrics by (task, origin), as Evaluation.metrics, of each of those who predict a batch: [B, size] by task, NaN where they cannot."""
    rows = [(n, o) for n, task in TASKS.items() if task.final for o in ORIGINS]
    tallies = {kind: {row: empty_tally(LABELS[TASKS[row[0]].label].size) for row in rows} for kind in predictors}
    for batch in held_out.in_order(256):
        for kind, predict in predictors.items():
            add_tallies(tallies[kind], predict(batch), batch)
    return {
        kind: {row: s for row, sums in rows_.items() if not not_finite(sums) and (s := summarise(sums))}
        for kind, rows_ in tallies.items()
    }


def answered(baseline: Baseline, held_out: SampleStream) -> dict[str, Answers]:
    """What it says there, without answers that have a labelled entry of which it says nothing."""
    said = collect(baseline, held_out, finite=False)
    return {name: a for name, a in said.items() if np.isfinite(a.prediction[a.known]).all()}


def baselines(train: SampleStream) -> dict[str, Baseline]:
    """`linear`, and per metric the best constant for it, `constant/METRIC`; fitted on the training split."""
    data = pool_split(train)
    fits: dict[str, Callable[[Task, Pooled], list[Predictor]]] = {
        f"constant/{metric}": partial(_constants, best=best) for metric, best in CONSTANTS.items()
    }
    return {
        kind: Baseline({name: fit(task, data) for name, task in TASKS.items() if task.final})
        for kind, fit in (fits | {"linear": _linear}).items()
    }


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    """The constant of least squared error."""
    return float((values * weights).sum() / weights.sum())


def median(values: np.ndarray, weights: np.ndarray) -> float:
    """The constant of least absolute error: half of the weight lies at or below it."""
    order = values.argsort(kind="stable")
    below = weights[order].cumsum()
    return float(values[order][np.searchsorted(below, below[-1] / 2)])


def majority(values: np.ndarray, weights: np.ndarray) -> float:
    """0 or 1, what the heavier side says: the constant of the highest accuracy."""
    return float((weights * (values > 0.5)).sum() > weights.sum() / 2)


def always(values: np.ndarray, weights: np.ndarray) -> float:
    """Yes: with a share p of positives its F1 is 2 p / (1 + p), and that of never saying yes is 0."""
    return 1.0


# of a constant there is no correlation
CONSTANTS: dict[str, Best] = {"mse": mean, "mae": median, "accuracy": majority, "macro_f1": always}


def _constants(task: Task, data: Pooled, best: Best) -> list[Predictor]:
    return [_constant(task, data, column, best) for column in range(LABELS[task.label].size)]


def _constant(task: Task, data: Pooled, column: int, best: Best = mean) -> Predictor:
    target, weight = data.labels[task.label][:, column], data.weights[task.label][:, column]
    known = weight > 0
    if task.kind == "binary":
        return lambda x: np.full(len(x), 0.5)  # of two texts: neither
    value = best(target[known], weight[known]) if known.any() else np.nan
    return lambda x: np.full(len(x), value)


def look_up(train: SampleStream, model: Predict) -> Predict | None:
    """What DESIGN §4a asks SURD's answer to beat beside a constant: the mean label of the training texts whose regret has the level that
    `model` predicts. None where no training text has both labels."""
    edges = train.index["levels"]["regret"]
    size = LABELS["surd"].size
    sums, weights = (torch.zeros(len(edges) + 1, size, dtype=torch.float64) for _ in range(2))
    for batch in train.in_order(256):
        known = batch.weights["regret"][:, 0] > 0
        level = level_of(batch.labels["regret"][known, 0], edges)
        weight = batch.weights["surd"][known].double()
        sums.index_add_(0, level, weight * batch.labels["surd"][known])
        weights.index_add_(0, level, weight)
    if not weights.sum():
        return None
    overall = sums.sum(0) / weights.sum(0).clamp(min=1e-12)
    table = torch.where(weights > 0, sums / weights.clamp(min=1e-12), overall)
    return lambda batch: {"surd": table[level_of(model(batch)["regret"][:, 0], edges)]}


def _linear(task: Task, data: Pooled) -> list[Predictor]:
    """One per entry; ridge for the entries of the same labelled rows is solved at once, each with an alpha of its own.

    Falls to the constant only where no line can be drawn: fewer than two labels, or all alike; of none there is none."""
    weights = data.weights[task.label]
    alike: dict[bytes, list[int]] = {}
    for column in range(weights.shape[1]):
        alike.setdefault(weights[:, column].tobytes() if task.kind == "score" else bytes([column]), []).append(column)
    found: dict[int, Predictor] = {}
    for columns in alike.values():
        known = np.flatnonzero(weights[:, columns[0]] > 0)
        known = known[:: max(1, len(known) // MAX_FIT)]
        x = (data.differences if task.kind == "binary" else data.features)[known]
        y = data.labels[task.label][known][:, columns]
        if task.kind != "score":
            y = y > 0.5
        sides = 1 if task.kind == "binary" else 2  # a pair is read either way round
        drawn = [i for i in range(len(columns)) if len(np.unique(y[:, i])) >= sides]
        found |= {c: _constant(task, data, c) if known.size else _none for i, c in enumerate(columns) if i not in drawn}
        if drawn:
            fit = _ridge if task.kind == "score" else _logistic
            predict = fit(task, x, y[:, drawn], weights[known, columns[0]])
            found |= {columns[i]: partial(_entry, predict, place) for place, i in enumerate(drawn)}
    return [found[column] for column in range(weights.shape[1])]


def _none(x: np.ndarray) -> np.ndarray:
    return np.full(len(x), np.nan)


def _entry(predict: Predictor, place: int, x: np.ndarray) -> np.ndarray:
    values: np.ndarray = predict(x)[:, place]
    return values


def _ridge(task: Task, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Predictor:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(ALPHAS, alpha_per_target=True))
    model.fit(x, y, ridgecv__sample_weight=weight)
    low, high = LABELS[task.label].low, LABELS[task.label].high
    return lambda z: np.clip(model.predict(z), low, high).reshape(len(z), -1)


def _logistic(task: Task, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Predictor:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pair = task.kind == "binary"
    if pair:  # either way round: a data set may always name the better text first
        x, y, weight = np.concatenate([x, -x]), np.concatenate([y, ~y]), np.concatenate([weight, weight]) / 2
    model = make_pipeline(
        StandardScaler(with_mean=not pair), LogisticRegression(C=0.01, max_iter=2000, fit_intercept=not pair)
    ).fit(x, y[:, 0], logisticregression__sample_weight=weight)
    return lambda z: model.predict_proba(z)[:, 1:]
