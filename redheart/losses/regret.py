"""Losses of the regret head: strengths in [0, 1], as logits or already probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from redheart.losses.elementwise import SumCount, huber, labelled, weighted

EPS = 1e-7  # entropies of what is nearer to 0 or 1 are those of this

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
    """`matching_huber`, entry by entry."""
    entries: torch.Tensor = _MatchingHuber.apply(logits, target, delta)[0]
    return entries


class _MatchingHuber(torch.autograd.Function):
    """With H the entropy of a yes or no, g the cut error and q = t + g: H(q) - H(t) + g x, whose slope in x is g. Where nothing is cut,
    q = σ(x), and that is the cross-entropy less what the target's entropy makes of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: torch.Tensor, target: torch.Tensor, delta: float) -> tuple[torch.Tensor, torch.Tensor]:
        cut = (torch.sigmoid(logits) - target).clamp(-delta, delta)
        both = torch.stack([target + cut, target])
        # entropies; binary_cross_entropy would do without logits, but ends the process where a GPU gives it a NaN
        of_reached, of_target = F.binary_cross_entropy_with_logits(torch.logit(both, EPS), both, reduction="none")
        return torch.addcmul(of_reached - of_target, cut, logits), cut

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, of_cut: None) -> tuple[torch.Tensor | None, None, None]:
        (cut,) = ctx.saved_tensors
        return None if grad is None else grad * cut, None, None
