"""Losses of the Bentham head: seven hedonic values in [0, 1], and pairs of texts."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from redheart.losses.elementwise import SumCount, labelled, weighted

EDGE = 0.02  # a value nearer to 0 or 1 than this counts as extreme


def hedonic(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, extreme_penalty: float) -> SumCount:
    """Squared error of σ(x) plus a penalty on needlessly extreme values; [B, 7].

    The penalty is the squared distance by which σ(x) lies beyond both [EDGE, 1 - EDGE] and the target.
    """
    logits, target = labelled(logits, target, weight)
    return weighted(hedonic_entries(logits, target, extreme_penalty), weight)


def hedonic_entries(logits: torch.Tensor, target: torch.Tensor, extreme_penalty: float) -> torch.Tensor:
    """`hedonic`, entry by entry."""
    p = torch.sigmoid(logits)
    # what p is clamped to has no slope where it is not p itself
    inside = p.detach().clamp(target.clamp(max=EDGE), target.clamp(min=1 - EDGE))
    squared = F.mse_loss(p, target, reduction="none")
    return squared.add(F.mse_loss(p, inside, reduction="none"), alpha=extreme_penalty / EDGE**2)


def pair_logistic(difference: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> SumCount:
    """-log σ(±(u(text) - u(contrast))), + where target is 1 (Bradley and Terry 1952); [C, 1]."""
    difference, target = labelled(difference, target, weight)
    return weighted(F.binary_cross_entropy_with_logits(difference, target, reduction="none"), weight)
