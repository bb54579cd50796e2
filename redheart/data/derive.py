"""The derived label: pointwise SURD shares of what emotion, Bentham value and context tell about regret (DESIGN §4a).

Over the training split: target T = regret in levels (causality/levels.py); agents = emotion valence and net Bentham value in levels,
context (four clusters of the pooled features). A sample lacking one of the quantities gets no label, and none gets one where regret never
varies: then there is nothing that could be told. The edges of the levels stand in the index, for the losses that use the same levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from redheart.causality.levels import LEVELS, level_edges, level_of
from redheart.causality.surd import joint_pmf, pointwise_shares
from redheart.schema import EMOTIONS

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


def quantities(records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What has levels, [N] each, NaN where a record lacks it."""
    return {
        "regret": np.array([np.nan if r["regret"] is None else r["regret"] for r in records], dtype=float),
        "valence": np.array([valence(r["emotion"]) for r in records], dtype=float),
        "net_value": np.array([net_value(r["bentham"]) for r in records], dtype=float),
    }


def training_edges(records: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """The edges between the levels of every quantity, from the training records that have it."""
    train = np.array([r["split"] == "train" for r in records], dtype=bool)
    training = {name: values[train & ~np.isnan(values)] for name, values in quantities(records).items()}
    return {name: level_edges(torch.from_numpy(values)) for name, values in training.items()}


def surd_labels(
    records: Sequence[dict[str, Any]], pooled: np.ndarray, seed: int = 0
) -> list[list[float | None] | None]:
    """One label [redundant, unique, synergistic, leak] per record (None without one), pooled: [N, E].

    Edges, clusters and probabilities come from the training split alone.
    """
    values, edges = quantities(records), training_edges(records)
    complete = ~np.isnan(np.stack(list(values.values()))).any(0)
    train = complete & np.array([r["split"] == "train" for r in records], dtype=bool)
    levels = [level_of(torch.from_numpy(values[name]), edges[name]) for name in values]
    if train.sum() < CLUSTERS or len(levels[0][train].unique()) < 2:
        return [None] * len(records)
    codes = torch.stack([*levels, torch.from_numpy(_clusters(pooled, train, seed)).long()])
    pmf = joint_pmf(codes[:, train], [LEVELS, LEVELS, LEVELS, CLUSTERS])
    known: dict[tuple[int, ...], list[float | None] | None] = {}
    unknown: list[float | None] = [None] * 3
    labels: list[list[float | None] | None] = []
    for code, usable in zip(codes.T.tolist(), complete, strict=True):
        key = tuple(code)
        if usable and key not in known:
            shares, leak = pointwise_shares(pmf, key[0], key[1:])
            known[key] = None if leak is None else [*(shares or unknown), leak]
        labels.append(known[key] if usable else None)
    return labels


def _clusters(pooled: np.ndarray, train: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    means = KMeans(CLUSTERS, random_state=seed, n_init=4).fit(pooled[train].astype(np.float64))
    return means.predict(pooled.astype(np.float64))
