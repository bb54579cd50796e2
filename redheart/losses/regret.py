"""Losses of the regret head: strengths in [0, 1], as logits or already probabilities."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from redheart.losses.elementwise import SumCount, huber, labelled, weighted

__all__ = ["huber", "matching_huber", "matching_huber_entries"]


def matching_huber(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, delta: float) -> SumCount:
    """Huber's loss of a strength σ(x), [B, n], whose slope in x is the error itself, cut at ±delta: ∫ clip(σ(x) - t, ±delta) dx.

    That is the loss which matches the logistic function (Auer, Herbster and Warmuth 1996, "Exponentially many local minima for single
    neurons"), with Huber's cut (1964): convex in x, least where Huber's loss of σ(x) is least, and 0 at σ(x) = t. Huber's own slope is
    σ'(x) times as large: next to nothing where an answer is close to 0, so that one that is rare is never found.
    """
    logits, target = labelled(logits, target, weight)
    return weighted(matching_huber_entries(logits, target, delta), weight)


def matching_huber_entries(logits: torch.Tensor, target: torch.Tensor, delta: float) -> torch.Tensor:
    """`matching_huber`, entry by entry: cross-entropy less the target's entropy as far as the error is within delta, then a line."""
    low, high = torch.logit((target - delta).clamp(min=0)), torch.logit((target + delta).clamp(max=1))
    near = logits.clamp(low, high)
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    inside = F.binary_cross_entropy_with_logits(near, target, reduction="none") - entropy
    return inside.add((logits - near).abs(), alpha=delta)
