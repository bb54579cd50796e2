"""What all losses share: a loss is a pure function (prediction, target, weight) -> (sum, count).

prediction, target and weight are [B, n]; weight is 0 where there is no label. The sum is over the labelled entries,
weighted; the count is the sum of the weights. The caller divides by the count over all ranks and micro-steps, never here.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

SumCount = tuple[torch.Tensor, torch.Tensor]


def weighted(loss: torch.Tensor, weight: torch.Tensor) -> SumCount:
    """(Σ loss·weight, Σ weight) of [B, n]; shapes must agree. Unlabelled entries are selected out."""
    if loss.shape != weight.shape:
        raise ValueError(f"loss {tuple(loss.shape)} and weight {tuple(weight.shape)} differ in shape")
    return torch.where(weight > 0, loss * weight, 0.0).sum(), weight.sum()


def labelled(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """prediction and target [B, n] with 0 where the weight is 0: before the loss, so that a NaN there has no gradient either."""
    if not prediction.shape == target.shape == weight.shape:
        shapes = [tuple(x.shape) for x in (prediction, target, weight)]
        raise ValueError(f"prediction {shapes[0]}, target {shapes[1]} and weight {shapes[2]} differ in shape")
    return torch.where(weight > 0, prediction, 0.0), torch.where(weight > 0, target, 0.0)


def squared(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> SumCount:
    """(p - t)² of probabilities [B, n]."""
    prediction, target = labelled(prediction, target, weight)
    return weighted((prediction - target).square(), weight)


def huber(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, delta: float) -> SumCount:
    """Huber (1964): quadratic within `delta`, linear beyond; [B, n]."""
    prediction, target = labelled(prediction, target, weight)
    return weighted(F.huber_loss(prediction, target, reduction="none", delta=delta), weight)


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> SumCount:
    """Binary cross-entropy of logits with soft targets in [0, 1]; [B, n]."""
    logits, target = labelled(logits, target, weight)
    return weighted(F.binary_cross_entropy_with_logits(logits, target, reduction="none"), weight)
