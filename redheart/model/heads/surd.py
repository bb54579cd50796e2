"""The SURD head: the states of the other three heads and its own feature -> shares [B, 3] and leak [B, 1].

It predicts the pointwise decomposition of causality/surd.py. Four tokens (emotion, Bentham, regret, own) exchange
information in two pre-LN layers; three readers then see what redundancy, uniqueness and synergy are about: the mean of
the sources, each source beside the others, and their product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from redheart.model.axes import Width
from redheart.model.backbone import EncoderStack
from redheart.model.layers import MLP, Masks, Norm, StackedLinear


class SurdReading(NamedTuple):
    # [B, 4]: softmax of three gives redundant, unique, synergistic, sigmoid of the last the leak
    surd_logits: torch.Tensor
    state: torch.Tensor  # [B, K]


class SurdHead(nn.Module):
    def __init__(self, width: Width, heads: int, dropout: float):
        super().__init__()
        self.layers = EncoderStack(2, width, heads)
        self.norm = Norm(width)
        pair, everything = width + width, width + width + width + width
        self.common = MLP(pair, 5 * width // 2, width, dropout=dropout, count=2)  # redundant and synergistic
        self.unique = MLP(everything, 2 * width, width, dropout=dropout)
        self.share = StackedLinear(3, width, 1)  # redundant, unique, synergistic
        self.leak = MLP(everything, 5 * width // 2, width, 1, dropout=dropout)

    def forward(
        self,
        feature: torch.Tensor,
        emotion: torch.Tensor | None,
        bentham: torch.Tensor | None,
        regret: torch.Tensor | None,
        masks: Masks,
    ) -> SurdReading:
        """The other heads' states [B, K]; zeros stand for those of a head that is left out."""
        others = [feature * 0 if x is None else x for x in (emotion, bentham, regret)]
        x = torch.stack([*others, feature], 1)  # [B, 4, K]
        x = self.norm(self.layers(x, None))
        everything, (*sources, own) = x.flatten(1), x.unbind(1)
        mean, product = x[:, :3].mean(1), sources[0] * sources[1] * sources[2]
        common = torch.stack([torch.cat([mean, own], -1), torch.cat([product, own], -1)], 1)
        redundant, synergistic = self.common(common, masks).unbind(1)
        readings = torch.stack([redundant, self.unique(everything, masks), synergistic], 1)
        shares = self.share(torch.tanh(readings)).squeeze(-1)
        return SurdReading(torch.cat([shares, self.leak(everything, masks)], -1), own)
