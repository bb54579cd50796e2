"""A dense, softly gated mixture of experts: every expert sees every sample, so none can die unseen.

`inert` takes the gate away, to see what it is worth: that experts are used evenly says nothing, a gate that never learned does it
too. With one expert there is nothing to gate: the single network of equal size that the mixture is compared with.

Jacobs et al. (1991), "Adaptive Mixtures of Local Experts". The gate's n shares are counted n times: used evenly, the experts are one
network of their summed width, not its n-th part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from redheart.model.axes import Width
from redheart.model.layers import MLP, Linear, Masks


class DenseMixture(nn.Module):
    """x [B, K] -> (mixture [B, K], gate logits [B, n]); each expert is K -> hidden -> K with a GELU."""

    def __init__(self, width: Width, hidden: Width, num_experts: int, dropout: float):
        super().__init__()
        self.gate = Linear(width, num_experts) if num_experts > 1 else None
        self.experts = MLP(width, hidden, width, dropout=dropout, count=num_experts)
        with torch.no_grad():
            for linear in self.experts.linears:
                linear.get_parameter("bias").zero_()
            # as one layer of the summed width
            self.experts.linears[1].get_parameter("weight").div_(math.sqrt(num_experts))

    def forward(self, x: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor | None]:
        branches = self.experts(x, masks)  # [B, n, K]
        if self.gate is None:
            return branches[:, 0], None
        gate_logits = self.gate(x)
        shares = torch.softmax(gate_logits, -1)[:, None] * gate_logits.shape[-1]
        return torch.bmm(shares, branches).squeeze(1), gate_logits


@contextmanager
def inert(gate: nn.Linear) -> Iterator[None]:
    """Within it the gate says the same of every sample: all experts alike. What that costs is what the gate is worth."""
    handle = gate.register_forward_hook(lambda module, given, logits: torch.zeros_like(logits))
    try:
        yield
    finally:
        handle.remove()
