"""Building blocks of every module. All grow by tiling (no block mixes positions of a vector); equal parts are stacked.

A stacked part has its parameters once, with a leading axis, and is one batched product. `masks` are a pass's dropout masks
(model/dropout.py), None outside training. Growth axes come from the sizes: see model/axes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from redheart.model.axes import COPY, FIXED, READ, Axis, Width, making, reading
from redheart.model.dropout import SampleDropout, dropped
from redheart.model.stacks import Recomputed

Masks = torch.Tensor | None  # [B, columns], see model/dropout.py


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or in fp64 where it is that already: for exponentials and losses of a bf16 network."""
    return x if x.dtype == torch.float64 else x.float()


def attention_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """mask [B, T], True where a token is real -> [B, 1, 1, T], what attention adds to its scores: 0, or -inf."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return bias[:, None, None]


def mean_of_tokens(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Mean of [B, T, n] over the real tokens, `bias` as of `attention_bias` -> [B, n]."""
    return torch.bmm(F.softmax(bias.squeeze(1), -1), x).squeeze(1)


def drawn(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter as nn.Linear draws its own: uniform in ±fan_in^-1/2."""
    return nn.Parameter(torch.empty(*map(int, shape)).uniform_(-(fan_in**-0.5), fan_in**-0.5))


def query(*shape: int) -> nn.Parameter:
    """Learned vectors that start small."""
    return nn.Parameter(torch.randn(*map(int, shape)) * 0.02)


def faint(*weights: torch.Tensor) -> None:
    """The last weights of a residual branch start at a tenth of what is drawn: at first a block passes on what
    it reads, so that the first answers are read from the text and not from many random layers (De and Smith 2020, "Batch
    normalization biases residual blocks towards the identity function"; a tenth and not zero, so that every layer learns at once)."""
    for weight in weights:
        weight.detach().mul_(0.1)


class Linear(nn.Linear):
    """nn.Linear that says how it grows; `makes` where that does not follow from its size."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, makes: Axis | None = None):
        super().__init__(int(inputs), int(outputs), bias)
        makes = makes or making(outputs)
        self.axes = {"weight": (makes, reading(inputs)), "bias": (makes,)}

    def forward(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """`onto`: what a layer without bias is added to."""
        return super().forward(x) if onto is None else added(onto, x, self.weight)


def added(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x + y Wᵀ in one product, [..., n]: what a residual branch, whose last layer has no bias, adds to the stream."""
    if torch.is_autocast_enabled(x.device.type):  # which would round the stream, too
        return x + F.linear(y, weight)
    return torch.addmm(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), weight.mT).view(x.shape)


class StackedLinear(nn.Module):
    """`count` Linear layers side by side: [B, count, inputs], or [B, inputs] that all of them read -> [B, count, outputs]."""

    def __init__(self, count: int, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        self.weight = drawn(count, outputs, inputs, fan_in=inputs)
        self.bias = drawn(count, outputs, fan_in=inputs) if bias else None
        self.axes = {"weight": (FIXED, making(outputs), reading(inputs)), "bias": (FIXED, making(outputs))}

    def forward(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        y = stacked_linear(x, self.weight, self.bias)
        return y if onto is None else onto + y


def stacked_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See StackedLinear: weight [count, outputs, inputs], bias [count, outputs]."""
    if x.dim() == 2:
        y = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return y.unflatten(-1, weight.shape[:2])
    return side_by_side(x, weight.mT, bias)


def side_by_side(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, count, a] times weight [count, a, b], each place with its own matrix, plus bias [count, b] -> [N, count, b]."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    if torch.compiler.is_compiling():  # a compiler lays out what it writes as it sees fit
        y = x.transpose(0, 1) @ weight if bias is None else torch.baddbmm(bias[:, None], x.transpose(0, 1), weight)
        return y.transpose(0, 1)
    return _SideBySide.apply(x, weight, bias)


class _SideBySide(torch.autograd.Function):
    """One batched product that reads and writes [N, count, …] where it lies; bmm alone would want `count` in front, and copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = x.new_empty(len(x), len(weight), weight.shape[-1])
        if bias is None:
            torch.bmm(x.transpose(0, 1), weight, out=y.transpose(0, 1))
        else:
            torch.baddbmm(bias[:, None], x.transpose(0, 1), weight, out=y.transpose(0, 1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = x.new_empty(x.shape)
        torch.bmm(grad.transpose(0, 1), weight.mT, out=grad_x.transpose(0, 1))
        if weight.stride(-1) == 1:
            grad_weight = torch.bmm(x.permute(1, 2, 0), grad.transpose(0, 1))
        else:  # of a transposed weight, in the layout of the weight itself
            grad_weight = torch.bmm(grad.permute(1, 2, 0), x.transpose(0, 1)).mT
        return grad_x, grad_weight, grad.sum(0) if ctx.has_bias else None


class Norm(nn.LayerNorm):
    """LayerNorm over a grown vector, or over one that keeps its size."""

    def __init__(self, width: int):
        super().__init__(int(width))
        self.axes = {"weight": (making(width),), "bias": (making(width),)}


class StackedNorm(nn.Module):
    """LayerNorm of [B, count, width] with a weight and a bias for each of the `count`."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, int(width)))
        self.bias = nn.Parameter(torch.zeros(count, int(width)))
        self.axes = {"weight": (FIXED, making(width)), "bias": (FIXED, making(width))}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


class MLP(nn.Module):
    """Linear, GELU, dropout, …, Linear: [..., dims[0]] -> [..., dims[-1]].

    With `count`, as many of them side by side: [B, count, dims[0]], or [B, dims[0]] for all -> [B, count, dims[-1]].
    """

    def __init__(self, *dims: int, dropout: float, last_bias: bool = True, count: int = 0):
        super().__init__()
        *hidden, last = pairwise(dims)
        sizes = [*((a, b, True) for a, b in hidden), (*last, last_bias)]
        self.linears = nn.ModuleList(StackedLinear(count, *s) if count else Linear(*s) for s in sizes)
        self.dropouts = nn.ModuleList(SampleDropout(b, dropout, count or 1) for _, b in hidden)

    def forward(self, x: torch.Tensor, masks: Masks, onto: torch.Tensor | None = None) -> torch.Tensor:
        """`onto`: what it is added to, where the last layer has no bias."""
        for linear, dropout in zip(self.linears[:-1], self.dropouts, strict=True):
            x = dropout(F.gelu(linear(x)), masks)
        return self.linears[-1](x, onto)


class Residual(nn.Module):
    """x + MLP(LayerNorm(x)): [..., width] -> [..., width]; with `count` as many of them: [B, count, width]."""

    def __init__(self, width: int, *hidden: int, dropout: float, count: int = 0):
        super().__init__()
        self.norm = StackedNorm(count, width) if count else Norm(width)
        self.mlp = MLP(width, *hidden, width, dropout=dropout, last_bias=False, count=count)
        faint(self.mlp.linears[-1].get_parameter("weight"))

    def forward(self, x: torch.Tensor, masks: Masks) -> torch.Tensor:
        return self.mlp(self.norm(x), masks, x)


class ResidualChain(nn.Module):
    """`count` residual blocks, each after the last: x -> [x₁, x₂, …], x_i = x_{i-1} + MLP(LayerNorm(x_{i-1})), [..., width] each."""

    def __init__(self, count: int, width: Width, hidden: Width, dropout: float):
        super().__init__()
        self.norms = nn.Parameter(torch.stack([torch.ones(int(width)), torch.zeros(int(width))]).repeat(count, 1, 1))
        self.up_weight, self.up_bias = drawn(count, hidden, width, fan_in=width), drawn(count, hidden, fan_in=width)
        self.down_weight = drawn(count, width, hidden, fan_in=hidden)
        faint(self.down_weight)
        self.dropout = SampleDropout(hidden, dropout, count)
        self.axes = {
            "norms": (FIXED, FIXED, COPY),
            **dict.fromkeys(("up_weight", "down_weight"), (FIXED, COPY, READ)),
            "up_bias": (FIXED, COPY),
        }

    def forward(self, x: torch.Tensor, masks: Masks) -> list[torch.Tensor]:
        norms, states = self.norms.flatten(0, 1).unbind(), []
        layers = zip(self.up_weight.unbind(), self.up_bias.unbind(), self.down_weight.unbind(), strict=True)
        for i, (up, up_bias, down) in enumerate(layers):
            hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], norms[2 * i], norms[2 * i + 1]), up, up_bias))
            x = added(x, self.dropout.at(i, hidden, masks), down)
            states.append(x)
        return states


class Fan(nn.Module):
    """MLPs with one hidden layer that read the same [..., width], one for each of `outputs`; their first layers are one product.

    -> [[..., outputs[0]], …]. `last_bias` says of each whether it has one.
    """

    def __init__(self, width: int, hidden: int, outputs: Sequence[int], dropout: float, last_bias: Sequence[bool]):
        super().__init__()
        self.first = StackedLinear(len(outputs), width, hidden)
        self.dropout = SampleDropout(hidden, dropout, len(outputs))
        self.last = nn.ModuleList(Linear(hidden, n, bias) for n, bias in zip(outputs, last_bias, strict=True))

    def forward(self, x: torch.Tensor, masks: Masks) -> list[torch.Tensor]:
        hidden = self.dropout(F.gelu(self.first(x)), masks).unbind(-2)
        return [linear(h) for linear, h in zip(self.last, hidden, strict=True)]


def attend(projected: torch.Tensor, heads: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Self-attention, heads side by side: projected [B, T, 3·n] (query, value, key) -> [B, T, n]."""
    q, v, k = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """x + multi-head self-attention of LayerNorm(x): [B, T, n] -> [B, T, n].

    Attention has no biases, here and below: the norm's bias before it gives the query one; a constant added to every key leaves the
    softmax as it is; what a value's would add, to every token alike, the stream has from elsewhere.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = Norm(width)
        self.weight = drawn(3, width, width, fan_in=width)  # query, value, key
        self.out_weight = drawn(width, width, fan_in=width)
        faint(self.out_weight)
        self.axes = {"weight": (FIXED, COPY, READ), "out_weight": (COPY, READ)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return added(x, attend(F.linear(self.norm(x), self.weight.flatten(0, 1)), self.heads), self.out_weight)


class BranchAttention(nn.Module):
    """Reads several branches of one task: the feature [B, K] attends to the branches [B, N, K] -> [B, K]."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = Norm(width)
        self.weight = drawn(3, width, width, fan_in=width)  # query, value, key
        self.out_weight = drawn(width, width, fan_in=width)
        faint(self.out_weight)
        self.mlp = Residual(width, hidden, dropout=dropout)
        self.axes = {"weight": (FIXED, COPY, READ), "out_weight": (COPY, READ)}

    def forward(self, feature: torch.Tensor, branches: torch.Tensor, masks: Masks) -> torch.Tensor:
        of_query, of_branches = self.weight.split([1, 2])
        q = F.linear(feature, of_query[0]).unflatten(-1, (1, self.heads, -1)).transpose(1, 2)
        read = F.linear(self.norm(branches), of_branches.flatten(0, 1))
        v, k = read.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)
        return self.mlp(added(feature, attended, self.out_weight), masks)


def attend_tokens(
    queries: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None, head_width: int
) -> torch.Tensor:
    """softmax(queries · tokens / √head_width) tokens: [B, N, n] and [B, T, n] -> [B, N, n]; `bias` as of `attention_bias`."""
    tokens = tokens.to(queries.dtype)[:, None]
    return F.scaled_dot_product_attention(
        queries[:, None], tokens, tokens, attn_mask=bias, scale=head_width**-0.5
    ).squeeze(1)


class QueryStack(Recomputed):
    """Layers of queries [B, Q, n] that read a memory [B, M, n], then each other, then think: three pre-LN residual blocks each,
    16·n² weights. Equal layers are one parameter with a leading axis.

    Reading folds the projections onto the queries' side: q·(W_k x) = (W_kᵀ q)·x and Σ_t a_t W_v x_t = W_v Σ_t a_t x_t, so that keys
    and values are never projected per token: with Q queries and h heads about 2·Q·h·M·n products replace 2·M·n², which is less for
    Q·h < n. With `sides` = 2 the queries are two sets of equal size, and each attends to the other instead of to itself.
    """

    def __init__(self, layers: int, width: Width, heads: int, dropout: float, sides: int = 1):
        super().__init__()
        self.heads, self.sides, n = heads, sides, width
        self.norms = nn.Parameter(torch.stack([torch.ones(int(n)), torch.zeros(int(n))]).repeat(layers, 3, 1, 1))
        self.square_weight = drawn(layers, 5, n, n, fan_in=n)  # reading's query, key, value, out; exchange's out
        self.exchange_weight = drawn(layers, 3, n, n, fan_in=n)  # query, value, key
        self.up_weight, self.up_bias = drawn(layers, 4 * n, n, fan_in=n), drawn(layers, 4 * n, fan_in=n)
        self.down_weight = drawn(layers, n, 4 * n, fan_in=4 * n)
        faint(self.square_weight[:, 3:], self.down_weight)
        self.read_dropout = SampleDropout(n, dropout, layers)
        self.dropout = SampleDropout(4 * n, dropout, layers)
        self.axes = {
            "norms": (FIXED, FIXED, FIXED, COPY),
            **dict.fromkeys(("square_weight", "exchange_weight"), (FIXED, FIXED, COPY, READ)),
            **dict.fromkeys(("up_weight", "down_weight"), (FIXED, COPY, READ)),
            "up_bias": (FIXED, COPY),
        }

    def forward(self, x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, masks: Masks) -> torch.Tensor:
        """x [B, Q, n] or [Q, n], the same for all; `bias` of the memory as of `attention_bias`."""
        x = x.to(memory.dtype).expand(len(memory), -1, -1)
        norms, squares = self.norms.flatten(0, 2).unbind(), self.apart(self.square_weight.flatten(0, 1))
        others = None if self.sides == 1 else of_other_sides(x.shape[1], self.sides, x)
        parameters = self.exchange_weight.flatten(1, 2), self.up_weight, self.down_weight
        layer = self.runs(query_layer)
        for i, weights in enumerate(zip(self.up_bias.unbind(), *map(self.apart, parameters), strict=True)):
            drops = self.read_dropout.mask(i, masks), self.dropout.mask(i, masks)
            own = *norms[6 * i : 6 * i + 6], *squares[5 * i : 5 * i + 5], *weights
            x = layer(x, memory, bias, others, self.heads, *drops, *own)
        return x


def of_other_sides(queries: int, sides: int, like: torch.Tensor) -> torch.Tensor:
    """[queries, queries], added to scores: 0 where two queries are of different sides, -inf within one; in `like`'s dtype and place."""
    side = torch.arange(queries, device=like.device) // (queries // sides)
    return like.new_zeros(queries, queries).masked_fill_(side[:, None] == side, float("-inf"))


def query_layer(
    x: torch.Tensor,
    memory: torch.Tensor,
    bias: torch.Tensor | None,
    others: torch.Tensor | None,
    heads: int,
    read_mask: torch.Tensor | None,
    hidden_mask: torch.Tensor | None,
    *weights: torch.Tensor,
) -> torch.Tensor:
    """One layer of a QueryStack; the masks are of what reading adds [B, n] and of the MLP's inside [B, 4·n]."""
    a, b, c, d, e, f, *read_weights, out_weight, up_bias, exchange_weight, up_weight, down_weight = weights
    shape = x.shape[-1:]
    x = x + dropped(_read(F.layer_norm(x, shape, a, b), memory, bias, heads, read_weights), read_mask)
    heard = attend(F.linear(F.layer_norm(x, shape, c, d), exchange_weight), heads, others)
    x = added(x, heard, out_weight)
    hidden = F.gelu(F.linear(F.layer_norm(x, shape, e, f), up_weight, up_bias))
    return added(x, dropped(hidden, hidden_mask), down_weight)


def _read(
    x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, heads: int, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    of_query, of_key, of_value, of_out = weights
    batch, queries, width = x.shape
    q = F.linear(x, of_query).view(batch * queries, heads, -1)
    folded = side_by_side(q, of_key.view(heads, -1, width)).reshape(batch, queries * heads, width)
    pooled = attend_tokens(folded, memory, bias, width // heads).reshape(batch * queries, heads, width)
    values = side_by_side(pooled, of_value.view(heads, -1, width).mT)
    return F.linear(values.reshape(batch, queries, width), of_out)
