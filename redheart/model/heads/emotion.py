"""The emotion head: its feature [B, K] -> emotion logits [B, 7], culture logits [B, 3] (jeong 정, han 한, chemyeon 체면).

Six branches (base, mixture of experts, valence, basic, nuance, culture) are read by attention. The hierarchy refines:
valence feeds basic, basic feeds nuance. Latents: the branches and the expert gate; the emotion loss reaches them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from redheart.model.layers import MLP, BranchAttention, Keys, Residual
from redheart.model.moe import DenseMixture
from redheart.schema import CULTURE, EMOTIONS


class EmotionReading(NamedTuple):
    emotion_logits: torch.Tensor  # [B, 7]
    culture_logits: torch.Tensor  # [B, 3]
    gate_logits: torch.Tensor | None  # [B, experts]; None with a single expert
    state: torch.Tensor  # [B, K]


class EmotionHead(nn.Module):
    def __init__(self, width: int, heads: int, num_experts: int, dropout: float):
        super().__init__()
        self.base = MLP(width, 4 * width, 3 * width, width, dropout=dropout)
        self.experts = DenseMixture(width, 16 * width // num_experts, num_experts, dropout)
        self.valence = Residual(width, 5 * width // 2, dropout=dropout)
        self.basic = Residual(width, 5 * width // 2, dropout=dropout)
        self.nuance = Residual(width, 5 * width // 2, dropout=dropout)
        self.culture = Residual(width, 4 * width, dropout=dropout)
        self.branches = BranchAttention(width, heads, 2 * width, dropout)
        self.norm = nn.LayerNorm(width)
        self.emotion = MLP(width, 3 * width, len(EMOTIONS), dropout=dropout)
        self.culture_out = nn.Linear(2 * width, len(CULTURE))

    def forward(self, feature: torch.Tensor, keys: Keys) -> EmotionReading:
        base = self.base(feature, keys)
        mixture, gate_logits = self.experts(feature, keys)
        valence = self.valence(feature, keys)
        basic = self.basic(valence, keys)
        nuance = self.nuance(basic, keys)
        culture = self.culture(feature, keys)
        branches = torch.stack([base, mixture, valence, basic, nuance, culture], 1)
        state = self.norm(self.branches(feature, branches, keys))
        culture_logits = self.culture_out(torch.cat([state, culture], -1))
        return EmotionReading(self.emotion(state, keys), culture_logits, gate_logits, state)
