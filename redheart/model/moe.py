"""A dense, softly gated mixture of experts: every expert sees every sample, so none can die unseen.

`inert` takes the gate away, to see what it is worth: that experts are used evenly says nothing, a gate that never learned does it
too. With one expert there is nothing to gate: the single network of equal size that
the mixture is compared with.

Jacobs et al. (1991), "Adaptive Mixtures of Local Experts". Experts are stacked into two tensors, one batched product each. The
gate's n shares are counted n times: used evenly, the experts are one network of their summed width, not its n-th part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from redheart.model.layers import Keys, SampleDropout


class DenseMixture(nn.Module):
    """x [B, K] -> (mixture [B, K], gate logits [B, n]); each expert is K -> hidden -> K with a GELU."""

    def __init__(self, width: int, hidden: int, num_experts: int, dropout: float):
        super().__init__()
        self.gate = nn.Linear(width, num_experts) if num_experts > 1 else None
        self.in_weight = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.in_bias = nn.Parameter(torch.zeros(num_experts, hidden))
        self.out_weight = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.out_bias = nn.Parameter(torch.zeros(num_experts, width))
        self.dropout = SampleDropout(dropout)
        for weight in (self.in_weight, self.out_weight):
            for expert in weight:
                nn.init.kaiming_uniform_(expert, a=math.sqrt(5))  # as nn.Linear does
        with torch.no_grad():
            self.out_weight.div_(math.sqrt(num_experts))  # as one layer of the summed width

    def forward(self, x: torch.Tensor, keys: Keys) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = F.gelu(torch.einsum("bk,nhk->bnh", x, self.in_weight) + self.in_bias)
        expert = torch.einsum("bnh,nkh->bnk", self.dropout(hidden, keys), self.out_weight) + self.out_bias
        if self.gate is None:
            return expert[:, 0], None
        gate_logits = self.gate(x)
        share = gate_logits.shape[-1] * torch.softmax(gate_logits, -1)
        return (share[..., None] * expert).sum(1), gate_logits


@contextmanager
def inert(gate: nn.Linear) -> Iterator[None]:
    """Within it the gate says the same of every sample: all experts alike. What that costs is what the gate is worth."""
    handle = gate.register_forward_hook(lambda module, given, logits: torch.zeros_like(logits))
    try:
        yield
    finally:
        handle.remove()
