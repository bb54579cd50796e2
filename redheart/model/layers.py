"""Building blocks of every module: exact dropout, MLPs, attention. All grow by tiling (no block mixes positions of a vector)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

Keys = torch.Tensor | None  # [B] int64, the samples' positions in the run; None outside training


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or in fp64 where it is that already: for exponentials and losses of a bf16 network."""
    return x if x.dtype == torch.float64 else x.float()


def mix_bits(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash with good avalanche, element-wise on int64 in [0, 2³²)."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


class SampleDropout(nn.Module):
    """Drops whole channels of a sample, by a mask that is a pure function of (sample position, site, channel).

    So a run does not depend on its world size, its micro-batch or on when it was interrupted. Sharing one mask over all
    tokens is the variational dropout of Gal and Ghahramani (2016). x: [B, …, n] -> the same shape.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.site = 0  # numbered by `number_dropout_sites` once the network is assembled

    def forward(self, x: torch.Tensor, keys: Keys) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if keys is None:
            raise ValueError("training with dropout needs `sample_keys`: the samples' positions in the run")
        channel = torch.arange(x.shape[-1], device=x.device)
        row = mix_bits((keys + 0x9E3779B1 * (self.site + 1)) & 0xFFFFFFFF)
        keep = mix_bits(row[:, None] ^ mix_bits(channel)[None]) >= int(self.p * 2**32)  # [B, n]
        scale = keep.to(x.dtype) / (1 - self.p)
        return x * scale.view(x.shape[0], *[1] * (x.dim() - 2), -1)


def number_dropout_sites(model: nn.Module) -> None:
    """Gives every dropout of an assembled network its own number, in the order of the modules."""
    for site, module in enumerate(m for m in model.modules() if isinstance(m, SampleDropout)):
        module.site = site


class MLP(nn.Module):
    """Linear, GELU, dropout, …, Linear: [..., dims[0]] -> [..., dims[-1]]."""

    def __init__(self, *dims: int, dropout: float, last_bias: bool = True):
        super().__init__()
        *hidden, last = pairwise(dims)
        self.linears = nn.ModuleList([*(nn.Linear(a, b) for a, b in hidden), nn.Linear(*last, bias=last_bias)])
        self.dropouts = nn.ModuleList(SampleDropout(dropout) for _ in hidden)  # a mask is its site's: one per layer

    def forward(self, x: torch.Tensor, keys: Keys) -> torch.Tensor:
        for linear, dropout in zip(self.linears[:-1], self.dropouts, strict=True):
            x = dropout(F.gelu(linear(x)), keys)
        return self.linears[-1](x)


class Residual(nn.Module):
    """x + MLP(LayerNorm(x)): [..., width] -> [..., width]."""

    def __init__(self, width: int, *hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = MLP(width, *hidden, width, dropout=dropout)

    def forward(self, x: torch.Tensor, keys: Keys) -> torch.Tensor:
        return x + self.mlp(self.norm(x), keys)


class Attention(nn.Module):
    """Multi-head attention of queries [B, Q, n] over memory [B, M, n] -> [B, Q, n]; mask [B, M] is True where memory is real.

    Keys have no bias: a constant added to every key leaves the softmax unchanged, so it would never get a gradient.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (
            proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, y in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.out(attended.transpose(1, 2).flatten(2))


class HeadWeights(nn.Module):
    """The weights of a Linear from `width` to `width`, for products that go head by head; abstract.

    They are read in this module's own forward alone: whatever gathers, moves or quantises weights module by module (ZeRO-3,
    Accelerate's offload, bitsandbytes) finds them where it looks.
    """

    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        linear = nn.Linear(width, width, bias=bias)  # for its initialisation
        self.weight, self.bias = linear.weight, linear.bias

    def per_head(self, dtype: torch.dtype) -> torch.Tensor:
        """[h, d, n]"""
        return self.weight.unflatten(0, (self.heads, -1)).to(dtype)


class FoldedKeys(HeadWeights):
    """Queries [B, Q, h, d] -> the tokens' directions that they look for, [B, h, Q, n]."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bqhd,hdn->bhqn", q, self.per_head(q.dtype))


class FoldedValues(HeadWeights):
    """What each head has gathered of the tokens [B, h, Q, n] -> its values [B, Q, h·d]."""

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        values = torch.einsum("bhqn,hdn->bqhd", pooled, self.per_head(pooled.dtype)).flatten(2)
        return values + self.bias.to(values.dtype)


class FoldedAttention(nn.Module):
    """`Attention` of few queries [B, Q, n] over many tokens [B, T, n]: the same function with the projections on the other side.

    q·(W_k x) = (W_kᵀ q)·x and Σ_t a_t W_v x_t = W_v Σ_t a_t x_t, so keys and values are never projected per token: with Q
    queries and h heads about 2·Q·h·T·n products replace 2·T·n², which is less for Q·h < n.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = FoldedKeys(width, heads, bias=False)
        self.value = FoldedValues(width, heads, bias=True)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = self.query(x).unflatten(-1, (self.heads, -1))  # [B, Q, h, d]
        folded = self.key(q)
        pooled = attend_tokens(folded.flatten(1, 2), memory, mask, q.shape[-1]).unflatten(1, (self.heads, -1))
        return self.out(self.value(pooled))


def attend_tokens(queries: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, head_width: int) -> torch.Tensor:
    """softmax(queries · tokens / √head_width) tokens: [B, N, n] and [B, T, n] -> [B, N, n]; the mask is True for real tokens."""
    tokens = tokens.to(queries.dtype)[:, None]
    return F.scaled_dot_product_attention(
        queries[:, None], tokens, tokens, attn_mask=mask[:, None, None], scale=head_width**-0.5
    )[:, 0]


class QueryLayer(nn.Module):
    """Queries [B, Q, n] read a memory [B, M, n], then each other, then think: three pre-LN residual blocks, 16·n² weights.

    `folded`: the memory is long (layers.FoldedAttention). With `sides` = 2 the queries are two sets of equal size, and each
    attends to the other instead of to itself, by the same weights.
    """

    def __init__(self, width: int, heads: int, dropout: float, folded: bool = True, sides: int = 1):
        super().__init__()
        self.sides = sides
        self.norm = nn.LayerNorm(width)
        self.read = FoldedAttention(width, heads) if folded else Attention(width, heads)
        self.exchange_norm = nn.LayerNorm(width)
        self.exchange = Attention(width, heads)
        self.dropout = SampleDropout(dropout)
        self.mlp = Residual(width, 4 * width, dropout=dropout)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None, keys: Keys) -> torch.Tensor:
        x = x + self.dropout(self.read(self.norm(x), memory, mask), keys)
        normed = self.exchange_norm(x).unflatten(1, (self.sides, -1))
        heard = self.exchange(normed.flatten(0, 1), normed.flip(1).flatten(0, 1))
        return self.mlp(x + heard.view_as(x), keys)


class BranchAttention(nn.Module):
    """Reads several branches of one task: the feature [B, K] attends to the branches [B, N, K] -> [B, K]."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = Residual(width, hidden, dropout=dropout)

    def forward(self, feature: torch.Tensor, branches: torch.Tensor, keys: Keys) -> torch.Tensor:
        state = feature + self.attention(feature[:, None], self.norm(branches))[:, 0]
        return self.mlp(state, keys)
