"""What growth does along each axis of a parameter, declared where the parameter is made (model/growth.py carries it out).

A size that growth multiplies is a `Width`; a plain int keeps its size. A module that owns parameters says in `axes` what happens
along each axis of each: `Linear(width, 7)` has the axes (FIXED, READ) because of its sizes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn


class Width(int):
    """The size of a grown vector. A product is one longer vector; a sum is a concatenation, whose segments grow each for itself."""

    segments: tuple[int, ...]

    def __new__(cls, value: int, segments: tuple[int, ...] = ()) -> Width:
        self = super().__new__(cls, value)
        self.segments = segments or (int(value),)
        return self

    def __mul__(self, factor: int) -> Width:
        return Width(int(self) * factor)

    __rmul__ = __mul__

    def __floordiv__(self, divisor: int) -> Width:
        return Width(int(self) // divisor)

    def __add__(self, other: int) -> Width:
        assert isinstance(other, Width), (
            "a concatenation of a grown vector and one of fixed size has no axis of its own"
        )
        return Width(int(self) + int(other), self.segments + other.segments)


class Axis(NamedTuple):
    """`kind` says what happens with ratio r of the sizes; `segments` are the sizes of the vectors concatenated along a READ axis.

    fixed  keeps its size                 copy   a grown vector, or the rows that make one: r copies
    read   summed against a grown vector: r copies, each a share 1/r, with noise that cancels
    match  summed against a grown vector under a factor width^-1/2: r copies, each r^-1/2 of it
    depth  the layers of a stack that may become deeper: a new layer copies the one beneath it
    adds   the same for what a layer adds to the residual stream: of a new layer it is the noise alone, which cancels
    """

    kind: str
    segments: tuple[int, ...] = ()


FIXED, COPY, READ, MATCH, DEPTH, ADDS = map(Axis, ("fixed", "copy", "read", "match", "depth", "adds"))


def making(size: int) -> Axis:
    """The axis of rows that make a vector of this size."""
    return COPY if isinstance(size, Width) else FIXED


def reading(size: int) -> Axis:
    """The axis that is summed against a vector of this size."""
    return Axis("read", size.segments) if isinstance(size, Width) else FIXED


def decays(name: str, dimensions: int) -> bool:
    """Whether AdamW's weight decay is for a parameter: weights and queries, of stacked parts too; no vectors, biases and norms."""
    own, *module = reversed(name.split("."))
    return not (dimensions < 2 or own.endswith("bias") or "norm" in own or any("norm" in part for part in module[:1]))


def axes_of(model: nn.Module) -> Iterator[tuple[str, tuple[Axis, ...]]]:
    """(name, what happens along each axis) of every parameter and persistent buffer of a network; all must be declared."""
    for prefix, module in model.named_modules():
        kept = {n: x for n, x in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
        for name, tensor in (dict(module.named_parameters(recurse=False)) | kept).items():
            axes = getattr(module, "axes", {}).get(name)
            assert axes is not None, f"{type(module).__name__} declares no growth axes for {prefix}.{name}"
            assert len(axes) == tensor.dim(), f"{prefix}.{name} has {tensor.dim()} axes and {len(axes)} are declared"
            yield f"{prefix}.{name}", axes
