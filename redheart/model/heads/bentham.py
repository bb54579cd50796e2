"""The Bentham head: its feature [B, K] -> seven hedonic values, a utility, acceptability, and four ethical verdicts.

Four experts stand for the utilitarian, deontological, virtue and justice theories; each has its own logit (`ethics`)
and a gate weighs their states into the shared one (Bentham 1789, ch. IV, for the seven values). The utility is an
unbounded scalar: only differences of it mean anything, and pairs of texts train it. The utilitarian expert's logit is
part of it: which of two texts is the more pleasant is what that theory of ETHICS asks (Hendrycks et al. 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from redheart.model.layers import MLP, BranchAttention, Keys
from redheart.schema import BENTHAM, ETHICS


class BenthamReading(NamedTuple):
    bentham_logits: torch.Tensor  # [B, 7]
    utility: torch.Tensor  # [B, 1], unbounded
    acceptability_logits: torch.Tensor  # [B, 1]
    ethics_logits: torch.Tensor  # [B, 4]
    gate_logits: torch.Tensor  # [B, 4]
    state: torch.Tensor  # [B, K]


class BenthamHead(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.theories = nn.ModuleDict(
            {theory: MLP(width, 4 * width, 2 * width, width, dropout=dropout) for theory in ETHICS}
        )
        self.verdicts = nn.ModuleDict({theory: nn.Linear(width, 1) for theory in ETHICS})
        self.gate = nn.Linear(width, len(ETHICS))
        self.branches = BranchAttention(width, heads, 4 * width, dropout)
        self.norm = nn.LayerNorm(width)
        self.bentham = MLP(width, 5 * width // 2, len(BENTHAM), dropout=dropout)
        # no last bias: a constant in every utility cancels in every difference, so it would never get a gradient
        self.utility = MLP(width, 5 * width // 2, 1, dropout=dropout, last_bias=False)
        self.acceptability = MLP(width, 5 * width // 2, 1, dropout=dropout)

    def forward(self, feature: torch.Tensor, keys: Keys) -> BenthamReading:
        views = torch.stack([self.theories[theory](feature, keys) for theory in ETHICS], 1)  # [B, 4, K]
        ethics = torch.cat([self.verdicts[theory](views[:, i]) for i, theory in enumerate(ETHICS)], -1)
        gate_logits = self.gate(feature)
        mixture = (torch.softmax(gate_logits, -1)[..., None] * views).sum(1)
        state = self.norm(self.branches(feature + mixture, views, keys))
        return BenthamReading(
            self.bentham(state, keys),
            self.utility(state, keys) + ethics[:, :1],
            self.acceptability(state, keys),
            ethics,
            gate_logits,
            state,
        )
