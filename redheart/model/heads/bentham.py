"""The Bentham head: its feature [B, K] -> seven hedonic values, a utility, acceptability, and four ethical verdicts.

Four experts stand for the utilitarian, deontological, virtue and justice theories; each has its own logit (`ethics`), a linear reading of
the feature added, and a gate weighs their states into the shared one (Bentham 1789, ch. IV, for the seven values). The utility is an
unbounded scalar: only differences of it mean anything, and pairs of texts train it. The utilitarian expert's logit is
part of it: which of two texts is the more pleasant is what that theory of ETHICS asks (Hendrycks et al. 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from redheart.model.axes import Width
from redheart.model.layers import MLP, BranchAttention, Fan, Linear, Masks, Norm, StackedLinear
from redheart.schema import BENTHAM, ETHICS


class BenthamReading(NamedTuple):
    bentham_logits: torch.Tensor  # [B, 7]
    utility: torch.Tensor  # [B, 1], unbounded
    acceptability_logits: torch.Tensor  # [B, 1]
    ethics_logits: torch.Tensor  # [B, 4]
    gate_logits: torch.Tensor  # [B, 4]
    state: torch.Tensor  # [B, K]


class BenthamHead(nn.Module):
    def __init__(self, width: Width, heads: int, dropout: float):
        super().__init__()
        self.theories = MLP(width, 4 * width, 2 * width, width, dropout=dropout, count=len(ETHICS))
        self.verdict = StackedLinear(len(ETHICS), width, 1)
        # past the experts: through their three layers alone a verdict would hardly hear the text at first, and a rare one never would
        self.direct = Linear(width, len(ETHICS), bias=False)
        self.gate = Linear(width, len(ETHICS))
        self.branches = BranchAttention(width, heads, 4 * width, dropout)
        self.norm = Norm(width)
        # hedonic values, utility, acceptability. A constant in every utility cancels in every difference: no bias, it would never
        # get a gradient
        self.outputs = Fan(width, 5 * width // 2, (len(BENTHAM), 1, 1), dropout, (True, False, True))

    def forward(self, feature: torch.Tensor, masks: Masks) -> BenthamReading:
        views = self.theories(feature, masks)  # [B, 4, K]
        ethics = self.direct(feature, self.verdict(views).squeeze(-1))
        gate_logits = self.gate(feature)
        mixture = torch.bmm(torch.softmax(gate_logits, -1)[:, None], views).squeeze(1)
        state = self.norm(self.branches(feature + mixture, views, masks))
        bentham, utility, acceptability = self.outputs(state, masks)
        return BenthamReading(bentham, utility + ethics[:, :1], acceptability, ethics, gate_logits, state)
