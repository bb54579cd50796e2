"""The derived label: pointwise SURD shares of what emotion, Bentham value and context tell about regret (DESIGN §4a).

Over the training split: target T = regret in three levels; agents = emotion valence in three levels, net Bentham value
in three levels, context (four clusters of the pooled features). A sample lacking one of the quantities gets no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from redheart.causality.surd import joint_pmf, pointwise_shares
from redheart.schema import EMOTIONS

LEVELS = 3
CLUSTERS = 4
NEGATIVE = [EMOTIONS.index(e) for e in ("sadness", "anger", "fear", "disgust")]


def valence(emotion: Sequence[float | None] | None) -> float:
    """joy minus the strongest negative emotion, in [-1, 1]; NaN where one of them is unlabelled."""
    if emotion is None:
        return float("nan")
    values = np.array(emotion, dtype=float)
    return float(values[EMOTIONS.index("joy")] - values[NEGATIVE].max())


def net_value(bentham: Sequence[float | None] | None) -> float:
    """Mean of the seven hedonic values, in [0, 1]; NaN where one of them is unlabelled."""
    return float("nan") if bentham is None else float(np.array(bentham, dtype=float).mean())


def surd_labels(
    records: Sequence[dict[str, Any]], pooled: np.ndarray, seed: int = 0
) -> list[list[float | None] | None]:
    """One label [redundant, unique, synergistic, leak] per record (None without one), pooled: [N, E].

    Levels, clusters and probabilities come from the training split alone.
    """
    quantities = np.array([[_number(r["regret"]), valence(r["emotion"]), net_value(r["bentham"])] for r in records])
    complete = ~np.isnan(quantities).any(1)
    train = complete & np.array([r["split"] == "train" for r in records])
    if train.sum() < CLUSTERS:
        return [None] * len(records)
    levels = np.zeros((len(records), 3), dtype=int)
    for column in range(3):
        edges = np.quantile(quantities[train, column], [1 / LEVELS, 2 / LEVELS])
        levels[complete, column] = np.digitize(quantities[complete, column], edges)
    codes = np.concatenate([levels, _clusters(pooled, train, seed)[:, None]], 1)
    pmf = joint_pmf(torch.from_numpy(codes[train].T.copy()), [LEVELS, LEVELS, LEVELS, CLUSTERS])
    known: dict[tuple[int, ...], list[float | None] | None] = {}
    unknown: list[float | None] = [None] * 3
    labels: list[list[float | None] | None] = []
    for code, usable in zip(codes.tolist(), complete, strict=True):
        key = tuple(code)
        if usable and key not in known:
            shares, leak = pointwise_shares(pmf, key[0], key[1:])
            known[key] = None if leak is None else [*(shares or unknown), leak]
        labels.append(known[key] if usable else None)
    return labels


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _clusters(pooled: np.ndarray, train: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    means = KMeans(CLUSTERS, random_state=seed, n_init=4).fit(pooled[train].astype(np.float64))
    return means.predict(pooled.astype(np.float64))
