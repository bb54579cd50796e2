"""The shared reader: token features of the frozen encoder -> contextual tokens and one feature for each task.

features [B, T, E], mask [B, T]  ->  tokens [B, T, D], task features [B, 4, K] (order: schema.TASKS4).
Input projection, pre-LN encoder layers (Xiong et al. 2020) with SDPA, then per task attention pooling, a residual
specialisation, and attention across the tasks.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from redheart.model.layers import MLP, Attention, Keys, Residual, SampleDropout, attend_tokens
from redheart.schema import TASKS4

MAX_POSITIONS = 512


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Position table [length, width] of Vaswani et al. (2017), sines in the even channels and cosines in the odd ones."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class EncoderLayer(nn.Module):
    """Pre-LN: x + Attention(LN(x)), then x + MLP(LN(x)); tokens [B, T, D]."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.dropout = SampleDropout(dropout)
        self.mlp = Residual(width, 4 * width, dropout=dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, keys: Keys) -> torch.Tensor:
        normed = self.norm(x)
        x = x + self.dropout(self.attention(normed, normed, mask), keys)
        return self.mlp(x, keys)


class TaskPooling(nn.Module):
    """Attention pooling with learned queries, one set of heads per task: tokens [B, T, D] -> [B, 4, K].

    As in layers.FoldedAttention, keys and values are not projected per token: the queries are, once.
    """

    def __init__(self, width: int, task_width: int, heads: int, tasks: int = len(TASKS4)):
        super().__init__()
        head_width = task_width // heads
        self.query = nn.Parameter(torch.randn(tasks, heads, head_width) * 0.02)
        self.key_weight = nn.Parameter(torch.empty(tasks, heads, head_width, width))
        self.value_weight = nn.Parameter(torch.empty(tasks, heads, head_width, width))
        self.value_bias = nn.Parameter(torch.zeros(tasks, heads, head_width))
        for weight in (self.key_weight, self.value_weight):
            nn.init.uniform_(weight, -(width**-0.5), width**-0.5)  # as nn.Linear does

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tasks, heads, head_width = self.query.shape
        folded = torch.einsum("thd,thdn->thn", self.query, self.key_weight).flatten(0, 1).to(x.dtype)
        pooled = attend_tokens(folded.expand(x.shape[0], -1, -1), x, mask, head_width).unflatten(1, (tasks, heads))
        values = torch.einsum("bthn,thdn->bthd", pooled, self.value_weight.to(x.dtype)) + self.value_bias.to(x.dtype)
        return values.flatten(2)


class Backbone(nn.Module):
    """See the module's docstring. Gradient checkpointing recomputes each encoder layer in the backward pass."""

    positions: torch.Tensor

    def __init__(
        self, encoder_width: int, width: int, heads: int, layers: int, task_width: int, task_heads: int, dropout: float
    ):
        super().__init__()
        self.input_norm = nn.LayerNorm(encoder_width)
        self.input = MLP(encoder_width, width, width, dropout=dropout)
        self.register_buffer("positions", sinusoids(MAX_POSITIONS, width), persistent=True)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pooling = TaskPooling(width, task_width, task_heads)
        self.specialise = nn.ModuleDict({task: Residual(task_width, task_width, dropout=dropout) for task in TASKS4})
        self.cross_norm = nn.LayerNorm(task_width)
        self.cross = Attention(task_width, task_heads)
        self.output_norm = nn.LayerNorm(task_width)
        self.gradient_checkpointing = False  # Transformers' gradient_checkpointing_enable() sets this and the function
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(
        self, features: torch.Tensor, mask: torch.Tensor, keys: Keys, states: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`states`, where given, is appended what enters the first layer and what leaves each layer, [B, T, D]."""
        if features.shape[1] > MAX_POSITIONS:
            raise ValueError(f"at most {MAX_POSITIONS} tokens: got {features.shape[1]}")
        x = self.input(self.input_norm(features), keys)
        x = x + self.positions[: x.shape[1]].to(x.dtype)
        if states is not None:
            states.append(x)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, mask, keys)
            else:
                x = layer(x, mask, keys)
            if states is not None:
                states.append(x)
        tokens = self.norm(x)
        pooled = self.pooling(tokens, mask)
        tasks = torch.stack([self.specialise[task](pooled[:, i], keys) for i, task in enumerate(TASKS4)], 1)
        normed = self.cross_norm(tasks)
        return tokens, self.output_norm(tasks + self.cross(normed, normed))
