"""The shared reader: token features of the frozen encoder -> contextual tokens and one feature for each task.

features [B, T, E], mask [B, T]  ->  tokens [B, T, D], task features [B, 4, K] (order: schema.TASKS4).
Input projection, pre-LN encoder layers (Xiong et al. 2020) with SDPA, then per task attention pooling, a residual
specialisation, and attention across the tasks.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from redheart.model.layers import MLP, Attention, Keys, Residual, SampleDropout
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
    """Attention pooling with a learned query, projected to the task's width: tokens [B, T, D] -> [B, K]."""

    def __init__(self, width: int, task_width: int, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(heads, 1, task_width // heads) * 0.02)
        self.key = nn.Linear(width, task_width, bias=False)
        self.value = nn.Linear(width, task_width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = self.query.shape[0]
        k, v = (proj(x).unflatten(-1, (heads, -1)).transpose(1, 2) for proj in (self.key, self.value))
        q = self.query.to(x.dtype).expand(x.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).flatten(1)


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
        self.pooling = nn.ModuleDict({task: TaskPooling(width, task_width, task_heads) for task in TASKS4})
        self.specialise = nn.ModuleDict({task: Residual(task_width, task_width, dropout=dropout) for task in TASKS4})
        self.cross_norm = nn.LayerNorm(task_width)
        self.cross = Attention(task_width, task_heads)
        self.output_norm = nn.LayerNorm(task_width)
        self.gradient_checkpointing = False

    def forward(self, features: torch.Tensor, mask: torch.Tensor, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        if features.shape[1] > MAX_POSITIONS:
            raise ValueError(f"at most {MAX_POSITIONS} tokens: got {features.shape[1]}")
        x = self.input(self.input_norm(features), keys)
        x = x + self.positions[: x.shape[1]].to(x.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, mask, keys, use_reentrant=False)
            else:
                x = layer(x, mask, keys)
        tokens = self.norm(x)
        pooled = [self.specialise[task](self.pooling[task](tokens, mask), keys) for task in TASKS4]
        tasks = torch.stack(pooled, 1)
        normed = self.cross_norm(tasks)
        return tokens, self.output_norm(tasks + self.cross(normed, normed))
