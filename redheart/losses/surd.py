"""Losses of the SURD head and analyzer.

The constraint that redundant + unique + synergistic = 1 holds by construction (a softmax), so no penalty term is needed for
it; the leak is a fourth, separate probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from redheart.causality.levels import level_of
from redheart.losses.elementwise import SumCount, labelled, squared, weighted


def surd_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """[B, 4] logits -> three shares that sum to one, and the leak in [0, 1]."""
    return torch.cat([logits[:, :3].softmax(-1), logits[:, 3:].sigmoid()], -1)


def squared_shares(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> SumCount:
    """Squared error of the shares and the leak, [B, 4]; entries may lack a label one by one."""
    some = weight.amax(-1, keepdim=True).expand_as(weight)
    # a row's shares hang together: all its logits count if one entry is labelled
    logits, _ = labelled(logits, target, some)
    return squared(surd_probabilities(logits), target, weight)


def density_cross_entropy(
    density_logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, edges: Sequence[float]
) -> SumCount:
    """Cross-entropy (nats) of every subset's density [B, subsets, levels] with the target's level, mean over subsets.

    target, weight [B, 1]; `edges` part the levels, as they do in the label (causality/levels.py).
    """
    known = weight > 0
    logits = torch.where(known[..., None], density_logits, 0.0)
    return weighted(density_entries(logits, torch.where(known, target, 0.0), edges), weight)


def density_entries(density_logits: torch.Tensor, target: torch.Tensor, edges: Sequence[float]) -> torch.Tensor:
    """`density_cross_entropy`, row by row: [B, 1]."""
    level = level_of(target, edges)[:, None].expand(-1, density_logits.shape[1], -1)
    return -density_logits.log_softmax(-1).gather(-1, level).mean(1)
