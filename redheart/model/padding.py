"""Masks as users give them, and padding wherever it stands: the modules are given bool masks with the real tokens in front."""

from __future__ import annotations

import torch
from torch import nn


def checked_mask(name: str, features: torch.Tensor, mask: torch.Tensor | None, width: int) -> torch.Tensor:
    """The mask of `features` [B, T, width] as bool [B, T]; ValueError, naming what is wrong, where they do not fit."""
    if features.dim() != 3 or features.shape[-1] != width:
        raise ValueError(
            f"{name} must be [texts, tokens, {width}], token states of the encoder: got {list(features.shape)}"
        )
    if mask is None:
        return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    if mask.shape != features.shape[:2]:
        raise ValueError(
            f"the mask of {name} must be {list(features.shape[:2])}, one entry a token: got {list(mask.shape)}"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"the mask of {name} must be bool or of integers, not 0 where a token is real: got {mask.dtype}"
        )
    return mask if mask.dtype == torch.bool else mask != 0


def check_rows(rows: torch.Tensor, num_contrasts: int) -> None:
    """ValueError where `rows` are not the texts' numbers [C] of so many contrasts. That they differ nobody looks at: it would wait for
    the device."""
    if rows.shape != (num_contrasts,) or rows.dtype != torch.int64:
        raise ValueError(
            f"contrast_rows must be int64 [{num_contrasts}], the number of the text that each contrast is of: got {rows.dtype} "
            f"{list(rows.shape)}"
        )


def stacked(texts: torch.Tensor, contrasts: torch.Tensor) -> torch.Tensor:
    """[B, T, …] and [C, T', …] -> [B + C, max(T, T'), …], padded behind."""
    longest = max(texts.shape[1], contrasts.shape[1])
    rest = [0] * (2 * (texts.dim() - 2))
    padded = [
        x if x.shape[1] == longest else nn.functional.pad(x, (*rest, 0, longest - x.shape[1]))
        for x in (texts, contrasts)
    ]
    return torch.cat(padded)


def real_tokens_first(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, T, n] and its mask [B, T] with every row's real tokens in front, in their order, and where each token went, [B, T].

    `rows_of(moved, places)` puts back what was moved. Without a look at the mask, which would wait for the device.
    """
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    texts = torch.arange(len(mask), device=mask.device)[:, None]
    rows = torch.add(order, texts, alpha=mask.shape[1]).flatten()  # whole tokens are copied: half the time of an index
    moved, of_mask = (a.flatten(0, 1).index_select(0, rows).view(a.shape) for a in (x, mask))
    return moved, of_mask, order.argsort(dim=1)


def rows_of(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x [B, T, …] and places [B, T'] -> [B, T', …]: of each text the tokens at its places."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]
