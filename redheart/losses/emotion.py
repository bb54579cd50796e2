"""Losses of the emotion head."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from redheart.losses.elementwise import SumCount, labelled, weighted


def soft_focal(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, gamma: float) -> SumCount:
    """|t - σ(x)|^γ · BCE(x, t) for soft, multi-label targets in [0, 1]; [B, n].

    The continuous form of the focal loss (Li et al. 2020, "Generalized Focal Loss", eq. 3); γ = 0 is cross-entropy.
    """
    logits, target = labelled(logits, target, weight)
    return weighted(focal_entries(logits, target, gamma), weight)


def focal_entries(logits: torch.Tensor, target: torch.Tensor, gamma: float) -> torch.Tensor:
    """`soft_focal`, entry by entry."""
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    gap = (target - torch.sigmoid(logits)).abs()
    if gamma < 1:  # gap^γ has no slope at 0
        gap = gap.clamp(min=torch.finfo(logits.dtype).tiny)
    return bce * gap.pow(gamma)


def gate_balance(gate_logits: torch.Tensor) -> torch.Tensor:
    """n·Σ p² - 1 of each sample's gate [*, n] -> [*, 1]: 0 for a uniform gate, n - 1 for a one-hot one. -inf is no expert.

    Defined per sample, so that it does not depend on how a batch is cut (the batch form of Shazeer et al. 2017 does).
    """
    p = torch.softmax(gate_logits, -1)
    return (gate_logits > float("-inf")).sum(-1, keepdim=True) * p.square().sum(-1, keepdim=True) - 1


def router_z(gate_logits: torch.Tensor) -> torch.Tensor:
    """(log Σ exp x)² of each sample's gate [*, n] -> [*, 1]; keeps logits small (Zoph et al. 2022, ST-MoE, eq. 5)."""
    return torch.logsumexp(gate_logits, -1, keepdim=True).square()
