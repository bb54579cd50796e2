"""Rows of a shard -> one padded Batch with label masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from redheart.schema import LABELS, NUM_LABEL_COLUMNS, Batch

_SIZES = [label.size for label in LABELS.values()]
# tokens: the step by which lengths differ where shapes are few; what tensor cores and fused attention want, too
EIGHT = 8
_OWNER = np.repeat(np.arange(len(LABELS)), _SIZES)  # the label of each column


def pad(
    states: Sequence[np.ndarray], encoder_width: int, num_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 [T_i, E] arrays -> (features [B, T, E] float16, zero beyond each length; mask [B, T]). No state: [0, 1, E].

    T is that of the longest, or `num_tokens`.
    """
    lengths = np.array([len(s) for s in states], dtype=np.int64)
    longest = num_tokens or (int(lengths.max()) if len(lengths) else 1)
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


def rounded_tokens(longest: int, max_tokens: int) -> int:
    """The next multiple of EIGHT, but not beyond `max_tokens`."""
    return max(longest, min(-(-longest // EIGHT) * EIGHT, max_tokens))


def collate(
    features: Sequence[np.ndarray],
    contrasts: Sequence[np.ndarray | None],
    values: np.ndarray,
    label_weights: np.ndarray,
    origins: np.ndarray,
    keys: np.ndarray,
    ids: Sequence[str],
    encoder_width: int,
    max_tokens: int | None = None,
) -> Batch:
    """Token features [T_i, E] with or without contrast, and labels as in `label_tensors` -> a Batch on the CPU.

    With `max_tokens` it is of one of few shapes, and means the same: texts and contrasts have one number of tokens, a multiple of 8
    up to `max_tokens`, and contrasts are there for no row or for all. Where rows with and without one meet (at a seam of the order),
    a text that has none is its own: as no such row has a preference, that enters no loss.
    """
    num_tokens = None
    if max_tokens is not None:
        if any(c is not None for c in contrasts):
            contrasts = [f if c is None else c for f, c in zip(features, contrasts, strict=True)]
        num_tokens = rounded_tokens(max(len(s) for s in (*features, *contrasts) if s is not None), max_tokens)
    padded, mask = pad(features, encoder_width, num_tokens)
    with_contrast = [i for i, c in enumerate(contrasts) if c is not None]
    contrast, contrast_mask = pad([c for c in contrasts if c is not None], encoder_width, num_tokens)
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
