"""Stacks of equal layers, each parameter of which holds what all of them have: taken apart for the layers, and recomputed.

`unbind` alone keeps the gradient of every layer's piece until the last one is there, and then copies them into one tensor beside
them. `apart` makes that tensor with the first piece, and each piece is written into it and freed: where layers are recomputed, so
that nothing else is held, a micro-step's peak is smaller by the largest stack.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """A stack whose layers the backward pass recomputes where `gradient_checkpointing` is set, by us or by Transformers'
    gradient_checkpointing_enable(), which sets the function too."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.compiled_layer: Any = None  # model/regional.py sets it; training uses it

    def runs(self, layer: Any) -> Any:
        """What to call for each layer."""
        layer = self.compiled_layer if self.compiled_layer and self.training else layer
        return partial(self._gradient_checkpointing_func, layer) if self.recomputes else layer

    @property
    def recomputes(self) -> bool:
        return self.gradient_checkpointing and self.training

    def apart(self, stack: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """stack [L, …] -> the L pieces; gradients are those of `unbind`."""
        if not (self.recomputes and torch.is_grad_enabled() and stack.requires_grad):
            return stack.unbind()
        # the view's own place in the graph sums the gradients of this pass and of no other
        stack, whole = stack.view_as(stack), _Whole(len(stack))
        return tuple(_Piece.apply(stack, i, whole) for i in range(len(stack)))


class _Whole:
    """The gradient of a stack while pieces of it are to come; nobody is in the way of its being freed after that."""

    def __init__(self, pieces: int):
        self.missing = pieces
        self.gradient: torch.Tensor | None = None

    def take(self, i: int, piece: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        first = self.gradient is None
        gradient = piece.new_zeros(shape) if self.gradient is None else self.gradient
        gradient[i] = piece
        self.missing -= 1
        self.gradient = gradient if self.missing else None
        return gradient if first else None


class _Piece(torch.autograd.Function):
    """The first piece whose gradient comes gives the engine the whole one, zeros elsewhere; those that follow write into it what is
    theirs and give nothing. It is passed on when all pieces that have a gradient have come."""

    @staticmethod
    def forward(ctx: Any, stack: torch.Tensor, i: int, whole: _Whole) -> torch.Tensor:
        ctx.shape, ctx.i, ctx.whole = stack.shape, i, whole
        return stack[i]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        return ctx.whole.take(ctx.i, gradient, ctx.shape), None, None
