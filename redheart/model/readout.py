"""A linear layer on a part's state, for the answers that its record names and the part does not compute itself."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

from torch import nn

from redheart.model.layers import Linear
from redheart.model.parts import Part
from redheart.schema import LABELS


def with_readout(part: Part, module: nn.Module, width: int) -> nn.Module:
    """`module`, or, where some answer of the part has no field to be read from, `Readout` around it."""
    labels = [answer.label for answer in part.answers if not answer.read]
    return Readout(module, width, labels) if labels else module


class Readout(nn.Module):
    """The part's reading with a field more for each of `labels`, [B, size], read from its state [B, width]."""

    def __init__(self, part: nn.Module, width: int, labels: Sequence[str]):
        super().__init__()
        self.part, self.labels, self.sizes = part, list(labels), [LABELS[name].size for name in labels]
        self.readout = Linear(width, sum(self.sizes))

    def forward(self, *inputs: Any) -> Any:
        reading = self.part(*inputs)._asdict()
        answers = dict(zip(self.labels, self.readout(reading["state"]).split(self.sizes, -1), strict=True))
        return namedtuple("Reading", [*reading, *answers])(**reading, **answers)
