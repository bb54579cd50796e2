"""Rows of a shard -> one padded Batch with label masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from redheart.schema import LABELS, NUM_LABEL_COLUMNS, Batch

_SIZES = [label.size for label in LABELS.values()]
_OWNER = np.repeat(np.arange(len(LABELS)), _SIZES)  # the label of each column


def pad(states: Sequence[np.ndarray], encoder_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 [T_i, E] arrays -> (features [B, T, E] float16, zero beyond each length; mask [B, T]). No state: [0, 1, E]."""
    lengths = np.array([len(s) for s in states], dtype=np.int64)
    longest = int(lengths.max()) if len(lengths) else 1
    features = np.empty((len(states), longest, encoder_width), np.float16)
    for row, state in zip(features, states, strict=True):
        row[: len(state)] = state
        row[len(state) :] = 0
    return torch.from_numpy(features), torch.from_numpy(np.arange(longest) < lengths[:, None])


def label_tensors(
    values: np.ndarray, label_weights: np.ndarray
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """labels and weights, float32 [B, size] each; an entry without a label has value 0 and weight 0.

    `values` is [B, NUM_LABEL_COLUMNS], NaN where there is no label; `label_weights` is [B, number of labels].
    """
    assert values.shape[1] == NUM_LABEL_COLUMNS
    known = ~np.isnan(values)
    filled = torch.from_numpy(np.where(known, values, np.float32(0)))
    weights = torch.from_numpy(np.where(known, label_weights[:, _OWNER], np.float32(0)))
    return (
        dict(zip(LABELS, filled.split(_SIZES, 1), strict=True)),
        dict(zip(LABELS, weights.split(_SIZES, 1), strict=True)),
    )


def collate(
    features: Sequence[np.ndarray],
    contrasts: Sequence[np.ndarray | None],
    values: np.ndarray,
    label_weights: np.ndarray,
    origins: np.ndarray,
    keys: np.ndarray,
    ids: Sequence[str],
    encoder_width: int,
) -> Batch:
    """Token features [T_i, E] with or without contrast, and labels as in `label_tensors` -> a Batch on the CPU."""
    padded, mask = pad(features, encoder_width)
    with_contrast = [i for i, c in enumerate(contrasts) if c is not None]
    contrast, contrast_mask = pad([c for c in contrasts if c is not None], encoder_width)
    labels, weights = label_tensors(values, label_weights)
    return Batch(
        features=padded,
        mask=mask,
        contrast_features=contrast,
        contrast_mask=contrast_mask,
        contrast_rows=torch.tensor(with_contrast, dtype=torch.long),
        labels=labels,
        weights=weights,
        keys=torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        origins=torch.from_numpy(origins),
        ids=tuple(ids),
    )
