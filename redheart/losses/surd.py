"""Losses of the SURD head and analyzer.

The constraint that redundant + unique + synergistic = 1 holds by construction (a softmax), so no penalty term is needed for
it; the leak is a fourth, separate probability.
"""

from __future__ import annotations

import torch

from redheart.losses.elementwise import SumCount, labelled, squared, weighted


def surd_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """[B, 4] logits -> three shares that sum to one, and the leak in [0, 1]."""
    return torch.cat([logits[:, :3].softmax(-1), logits[:, 3:].sigmoid()], -1)


def squared_shares(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> SumCount:
    """Squared error of the shares and the leak, [B, 4]; entries may lack a label one by one."""
    some = weight.amax(-1, keepdim=True).expand_as(weight)
    logits, _ = labelled(
        logits, target, some
    )  # a row's shares hang together: all its logits count if one entry is labelled
    return squared(surd_probabilities(logits), target, weight)


def levels(target: torch.Tensor, num_levels: int) -> torch.Tensor:
    """Soft assignment of values [B, 1] in [0, 1] to equally spaced levels: linear between neighbours -> [B, num_levels]."""
    centres = torch.linspace(0, 1, num_levels, dtype=target.dtype, device=target.device)
    return (1 - (target - centres).abs() * (num_levels - 1)).clamp(min=0)


def expected_level(density_logits: torch.Tensor) -> torch.Tensor:
    """Mean level [B, 1] under the density given all sources, the last of [B, subsets, levels]."""
    p = density_logits[:, -1].softmax(-1)
    return p @ torch.linspace(0, 1, p.shape[-1], dtype=p.dtype, device=p.device)[:, None]


def density_cross_entropy(density_logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> SumCount:
    """Cross-entropy (nats) of every subset's density [B, subsets, levels] with the target's soft level, mean over subsets."""
    known = weight > 0
    logits = torch.where(known[..., None], density_logits, 0.0)
    target = torch.where(known, target, 0.0)
    soft = levels(target, logits.shape[-1])[:, None]
    return weighted(-(soft * logits.log_softmax(-1)).sum(-1).mean(1, keepdim=True), weight)
