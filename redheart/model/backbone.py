"""The shared reader: token features of the frozen encoder -> contextual tokens and one feature for each task.

features [B, T, E], mask [B, T]  ->  tokens [B, T, D], task features [B, 4, K] (order: schema.TASKS4).
Input projection and its norm, pre-LN encoder layers (Xiong et al. 2020) with SDPA, then per task attention pooling, a residual
specialisation, and attention across the tasks.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from redheart.model.axes import ADDS, COPY, DEPTH, FIXED, READ, Width
from redheart.model.layers import (
    Attention,
    Linear,
    Masks,
    Norm,
    Residual,
    added,
    attend,
    attend_tokens,
    drawn,
    faint,
    stacked_linear,
)
from redheart.model.stacks import Recomputed
from redheart.schema import MAX_POSITIONS, TASKS4

# of the tokens' own scale: the encoder's features know their order already, and larger positions drown what tells texts apart
POSITION_SCALE = 0.3


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Position table [length, width] of Vaswani et al. (2017), sines in the even channels and cosines in the odd ones."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class EncoderStack(Recomputed):
    """Pre-LN encoder layers: x + Attention(LN(x)), then x + MLP(LN(x)); tokens [B, T, n]. Layers are stacked in each parameter.

    No dropout here: one mask for all tokens of a text (see
    model/dropout.py) hides a channel from every layer that could restore it, and costs more than it regularises.
    """

    def __init__(self, layers: int, width: Width, heads: int):
        super().__init__()
        self.heads, n = heads, width
        self.norms = nn.Parameter(torch.stack([torch.ones(int(n)), torch.zeros(int(n))]).repeat(layers, 2, 1, 1))
        self.attention_weight = drawn(layers, 3, n, n, fan_in=n)  # query, value, key
        self.out_weight = drawn(layers, n, n, fan_in=n)
        self.up_weight, self.up_bias = drawn(layers, 4 * n, n, fan_in=n), drawn(layers, 4 * n, fan_in=n)
        self.down_weight = drawn(layers, n, 4 * n, fan_in=4 * n)
        faint(self.out_weight, self.down_weight)
        self.axes = {
            "norms": (DEPTH, FIXED, FIXED, COPY),
            "attention_weight": (DEPTH, FIXED, COPY, READ),
            "up_weight": (DEPTH, COPY, READ),
            "up_bias": (DEPTH, COPY),
            **dict.fromkeys(("out_weight", "down_weight"), (ADDS, COPY, READ)),
        }

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, states: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """`states`, where given, is appended what leaves each layer."""
        attention_weight = self.attention_weight.flatten(1, 2)
        parameters = attention_weight, self.out_weight, self.up_weight, self.up_bias, self.down_weight
        norms = self.norms.flatten(0, 2).unbind()  # a weight and a bias for both blocks of a layer
        layer = self.runs(encoder_layer)
        for i, weights in enumerate(zip(*map(self.apart, parameters), strict=True)):
            x = layer(x, bias, self.heads, *norms[4 * i : 4 * i + 4], *weights)
            if states is not None:
                states.append(x)
        return x


def encoder_layer(x: torch.Tensor, bias: torch.Tensor | None, heads: int, *weights: torch.Tensor) -> torch.Tensor:
    """One layer of an EncoderStack."""
    a, b, c, d, attention_weight, out_weight, up_weight, up_bias, down_weight = weights
    shape = x.shape[-1:]
    x = added(x, attend(F.linear(F.layer_norm(x, shape, a, b), attention_weight), heads, bias), out_weight)
    hidden = F.gelu(F.linear(F.layer_norm(x, shape, c, d), up_weight, up_bias))
    return added(x, hidden, down_weight)


class TaskPooling(nn.Module):
    """Attention pooling with learned queries, one set of heads per task: tokens [B, T, D] -> [B, 4, K].

    As in layers.QueryStack, keys and values are not projected per token: the queries are, once.
    """

    def __init__(self, width: Width, task_width: Width, heads: int, tasks: int = len(TASKS4)):
        super().__init__()
        head_width = task_width // heads
        # of the size of what it meets: a small one would take a thousand steps to look anywhere but everywhere
        self.query = nn.Parameter(torch.randn(tasks, heads, int(head_width)))
        self.key_weight = drawn(tasks, heads, head_width, width, fan_in=width)
        self.value_weight = drawn(tasks, heads, head_width, width, fan_in=width)
        self.value_bias = nn.Parameter(torch.zeros(tasks, heads, int(head_width)))
        self.axes = {
            **dict.fromkeys(("query", "value_bias"), (FIXED, COPY, FIXED)),
            **dict.fromkeys(("key_weight", "value_weight"), (FIXED, COPY, FIXED, READ)),
        }

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        tasks, _, head_width = self.query.shape
        folded = torch.bmm(self.query.view(-1, 1, head_width), self.key_weight.flatten(0, 1))[:, 0].to(x.dtype)
        pooled = attend_tokens(folded.expand(len(x), -1, -1), x, bias, head_width)  # [B, tasks · heads, D]
        values = stacked_linear(
            pooled, self.value_weight.flatten(0, 1).to(x.dtype), self.value_bias.flatten(0, 1).to(x.dtype)
        )
        return values.reshape(len(x), tasks, -1)


class Backbone(nn.Module):
    """See the module's docstring."""

    positions: torch.Tensor

    def __init__(
        self,
        encoder_width: int,
        width: Width,
        heads: int,
        layers: int,
        task_width: Width,
        task_heads: int,
        dropout: float,
    ):
        super().__init__()
        self.input_norm = Norm(encoder_width)
        self.input = Linear(encoder_width, width)
        self.refine = Linear(width, width)
        faint(self.refine.weight, self.refine.bias)  # at first the features pass nearly as they are
        self.token_norm = Norm(width)
        self.register_buffer("positions", POSITION_SCALE * sinusoids(MAX_POSITIONS, int(width)), persistent=True)
        self.axes = {"positions": (FIXED, COPY)}
        self.layers = EncoderStack(layers, width, heads)
        self.norm = Norm(width)
        self.pooling = TaskPooling(width, task_width, task_heads)
        self.specialise = Residual(task_width, task_width, dropout=dropout, count=len(TASKS4))
        self.cross = Attention(task_width, task_heads)
        self.output_norm = Norm(task_width)

    def forward(
        self, features: torch.Tensor, bias: torch.Tensor, masks: Masks, states: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`bias` as of layers.attention_bias. `states`, where given, is appended what enters the first layer and what leaves each."""
        if features.shape[1] > MAX_POSITIONS:
            raise ValueError(f"at most {MAX_POSITIONS} tokens: got {features.shape[1]}")
        x = self.input(self.input_norm(features))
        x = self.token_norm(x + self.refine(F.gelu(x)))
        x = x + self.positions[: x.shape[1]].to(x.dtype)
        if states is not None:
            states.append(x)
        tokens = self.norm(self.layers(x, bias, states))
        tasks = self.specialise(self.pooling(tokens, bias), masks)
        return tokens, self.output_norm(self.cross(tasks))
