"""The regret head: its feature [B, K] -> regret [B, 1] and regret seen by three observers [B, 3].

Each observer v (optimistic, neutral, pessimistic) sees the outcome foregone minus the outcome had as a normal variable
N(μ_v, σ_v²), and regrets what he expects to have missed:  r_v = 1 - exp(-E[max(X_v, 0)]),
E[max(X, 0)] = μ Φ(μ/σ) + σ φ(μ/σ), which grows in μ and in σ. Both are built by adding positive steps from the
optimist to the pessimist, so r is ordered by construction. Latents: μ and σ; the losses of `regret_views` and
`regret` reach them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from redheart.model.axes import Width
from redheart.model.layers import MLP, BranchAttention, Linear, Masks, Norm, Residual, StackedLinear, full_precision
from redheart.schema import REGRET_VIEWS


class RegretReading(NamedTuple):
    regret_logits: torch.Tensor  # [B, 1]
    regret_views: torch.Tensor  # [B, 3] in [0, 1), ascending
    outcome_mean: torch.Tensor  # [B, 3], foregone minus had, ascending
    outcome_spread: torch.Tensor  # [B, 3], positive, ascending
    state: torch.Tensor  # [B, K]


def expected_excess(mean: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """E[max(X, 0)] of X ~ N(mean, spread²); any shape, spread > 0."""
    return _ExpectedExcess.apply(mean, spread)


class _ExpectedExcess(torch.autograd.Function):
    """Its slopes in mean and spread are Φ and φ of mean / spread, which autograd would not see."""

    @staticmethod
    def forward(ctx: Any, mean: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
        z = mean / spread
        below, density = torch.special.ndtr(z), torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        ctx.save_for_backward(below, density)
        return (mean * below + spread * density).clamp(min=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        below, density = ctx.saved_tensors
        return grad * below, grad * density


def seen_by_observers(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw outcomes [..., 3, 2] -> (mean, spread, regret views) [..., 3] each, all three ascending."""
    means, spreads = raw.unbind(-1)
    first, rises = means.split([1, means.shape[-1] - 1], -1)
    mean = torch.cat([first, F.softplus(rises)], -1).cumsum(-1)
    spread = F.softplus(spreads).cumsum(-1) + 0.05
    return mean, spread, -torch.expm1(-expected_excess(mean, spread))


class RegretHead(nn.Module):
    def __init__(self, width: Width, heads: int, dropout: float):
        super().__init__()
        self.had = Residual(width, 3 * width // 2, dropout=dropout)
        self.views = MLP(width, 4 * width, 3 * width, width, dropout=dropout, count=len(REGRET_VIEWS))
        self.outcome = StackedLinear(len(REGRET_VIEWS), width, 2)
        self.branches = BranchAttention(width, heads, 4 * width, dropout)
        self.norm = Norm(width)
        self.regret = MLP(width, 4 * width, 2 * width, 1, dropout=dropout)
        self.mix = Linear(width, len(REGRET_VIEWS))

    def forward(self, feature: torch.Tensor, masks: Masks) -> RegretReading:
        had = self.had(feature, masks)
        views = self.views(had, masks)  # [B, 3, K]
        mean, spread, regret_views = seen_by_observers(full_precision(self.outcome(views)))
        state = self.norm(self.branches(had, views, masks))
        mixed = (torch.softmax(full_precision(self.mix(state)), -1) * regret_views).sum(-1, keepdim=True)
        logits = full_precision(self.regret(state, masks)) + torch.logit(mixed, eps=1e-4)
        return RegretReading(logits, regret_views, mean, spread, state)
