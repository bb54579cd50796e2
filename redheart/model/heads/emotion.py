"""The emotion head: its feature [B, K] -> emotion logits [B, 7], those of 28 finer ones, culture logits [B, 3] (jeong 정, han 한,
chemyeon 체면).

Six branches (base, mixture of experts, valence, basic, nuance, culture) are read by attention. The hierarchy refines:
valence feeds basic, basic feeds nuance. Latents: the branches and the expert gate; the emotion loss reaches them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from redheart.model.axes import Width
from redheart.model.layers import MLP, BranchAttention, Linear, Masks, Norm, Residual, ResidualChain
from redheart.model.moe import DenseMixture
from redheart.schema import CULTURE, EMOTIONS, EMOTIONS_FINE


class EmotionReading(NamedTuple):
    emotion_logits: torch.Tensor  # [B, 7]
    fine_logits: torch.Tensor  # [B, 28]
    culture_logits: torch.Tensor  # [B, 3]
    gate_logits: torch.Tensor | None  # [B, experts]; None with a single expert
    state: torch.Tensor  # [B, K]


class EmotionHead(nn.Module):
    def __init__(self, width: Width, heads: int, num_experts: int, dropout: float):
        super().__init__()
        self.base = MLP(width, 4 * width, 3 * width, width, dropout=dropout)
        self.experts = DenseMixture(width, 16 * width // num_experts, num_experts, dropout)
        self.hierarchy = ResidualChain(3, width, 5 * width // 2, dropout)  # valence, basic, nuance
        self.culture = Residual(width, 4 * width, dropout=dropout)
        self.branches = BranchAttention(width, heads, 2 * width, dropout)
        self.norm = Norm(width)
        self.emotion = MLP(width, 3 * width, len(EMOTIONS), dropout=dropout)
        self.fine = Linear(width, len(EMOTIONS_FINE))
        self.culture_out = Linear(width + width, len(CULTURE))

    def forward(self, feature: torch.Tensor, masks: Masks) -> EmotionReading:
        base = self.base(feature, masks)
        mixture, gate_logits = self.experts(feature, masks)
        hierarchy = self.hierarchy(feature, masks)
        culture = self.culture(feature, masks)
        branches = torch.stack([base, mixture, *hierarchy, culture], 1)
        state = self.norm(self.branches(feature, branches, masks))
        culture_logits = self.culture_out(torch.cat([state, culture], -1))
        return EmotionReading(self.emotion(state, masks), self.fine(state), culture_logits, gate_logits, state)
