"""Rows of a shard -> one padded Batch with label masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from redheart.schema import LABELS, Batch


def pad(states: Sequence[np.ndarray], encoder_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T_i, E] arrays -> (features [B, T, E] float32, mask [B, T]); zero rows give [0, 1, E]."""
    longest = max((len(s) for s in states), default=1)
    features = torch.zeros(len(states), longest, encoder_width)
    mask = torch.zeros(len(states), longest, dtype=torch.bool)
    for i, state in enumerate(states):
        features[i, : len(state)] = torch.from_numpy(state.astype(np.float32))
        mask[i, : len(state)] = True
    return features, mask


def label_tensors(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """labels and weights, float32 [B, size] each; a null entry has value 0 and weight 0."""
    labels, weights = {}, {}
    for name, label in LABELS.items():
        values = np.zeros((len(rows), label.size), np.float32)
        weight = np.zeros_like(values)
        for i, row in enumerate(rows):
            value = row[name]
            if value is None:
                continue
            entries = np.array([value] if label.scalar else value, dtype=np.float32)  # None becomes NaN
            known = ~np.isnan(entries)
            values[i, known] = entries[known]
            weight[i, known] = row["label_weight"][name]
        labels[name], weights[name] = torch.from_numpy(values), torch.from_numpy(weight)
    return labels, weights


def collate(rows: Sequence[Mapping[str, Any]], keys: np.ndarray, encoder_width: int) -> Batch:
    """Rows (with `features` as [T, E] arrays) and their positions in the run -> a Batch, float32 on the CPU."""
    features, mask = pad([row["features"] for row in rows], encoder_width)
    with_contrast = [i for i, row in enumerate(rows) if row["contrast_features"] is not None]
    contrast, contrast_mask = pad([rows[i]["contrast_features"] for i in with_contrast], encoder_width)
    labels, weights = label_tensors(rows)
    return Batch(
        features=features,
        mask=mask,
        contrast_features=contrast,
        contrast_mask=contrast_mask,
        contrast_rows=torch.tensor(with_contrast, dtype=torch.long),
        labels=labels,
        weights=weights,
        keys=torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        ids=tuple(row["id"] for row in rows),
    )
