"""The SURD head: the states of the other three heads and its own feature -> shares [B, 3] and leak [B, 1].

It predicts the pointwise decomposition of causality/surd.py. Four tokens (emotion, Bentham, regret, own) exchange
information in two pre-LN layers; three readers then see what redundancy, uniqueness and synergy are about: the mean of
the sources, each source beside the others, and their product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from redheart.model.layers import MLP, Attention, Keys, Residual


class SurdReading(NamedTuple):
    surd_logits: (
        torch.Tensor
    )  # [B, 4]: softmax of three gives redundant, unique, synergistic, sigmoid of the last the leak
    state: torch.Tensor  # [B, K]


class SurdHead(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attentions = nn.ModuleList(Attention(width, heads) for _ in range(2))
        self.mlps = nn.ModuleList(Residual(width, 4 * width, dropout=dropout) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.redundant = MLP(2 * width, 5 * width // 2, width, dropout=dropout)
        self.unique = MLP(4 * width, 2 * width, width, dropout=dropout)
        self.synergistic = MLP(2 * width, 5 * width // 2, width, dropout=dropout)
        self.share = nn.ModuleList(nn.Linear(width, 1) for _ in range(3))
        self.leak = MLP(4 * width, 5 * width // 2, width, 1, dropout=dropout)

    def forward(self, feature: torch.Tensor, states: tuple[torch.Tensor, ...], keys: Keys) -> SurdReading:
        x = torch.stack([*states, feature], 1)  # [B, 4, K]
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            normed = norm(x)
            x = mlp(x + attention(normed, normed), keys)
        x = self.norm(x)
        sources, own, everything = x[:, :3], x[:, 3], x.flatten(1)
        readings = [
            self.redundant(torch.cat([sources.mean(1), own], -1), keys),
            self.unique(everything, keys),
            self.synergistic(torch.cat([sources.prod(1), own], -1), keys),
        ]
        shares = torch.cat([out(torch.tanh(r)) for out, r in zip(self.share, readings, strict=True)], -1)
        return SurdReading(torch.cat([shares, self.leak(everything, keys)], -1), own)
