"""What a fresh network knows of its data: output biases that say what the best constant predictor says, so that no answer has to be
unlearned, and the units in which the fusion shifts answers.

With biases of zero an answer that is rare among the texts starts with a loss many times that of a constant, and the first
steps go into unlearning it. (Karpathy 2019, "A recipe for training neural networks"; Lin et al. 2017, "Focal loss for dense
object detection", section 3.3, for one class.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from redheart.model.fusion import Utility
from redheart.model.parts import PARTS
from redheart.model.readout import Readout

Raw = Mapping[str, torch.Tensor]  # label (or task) -> raw answer [size] of the best constant predictor


class Start(NamedTuple):
    answers: Raw
    units: Mapping[str, float]  # parts.units


@torch.no_grad()
def start_at(name: str, module: nn.Module, start: Start) -> None:
    """Sets the output biases of the freshly built module `name`, those that its answers' records name and those of a readout, or the
    fusion's units; labels that `start` does not name keep what they have."""
    if isinstance(module, Utility):
        return module.count_in(start.units)
    raw = start.answers
    answers = [answer for part in PARTS if part.name == name for answer in part.answers]
    inner = module.part if isinstance(module, Readout) else module
    assert isinstance(inner, nn.Module)
    for answer in answers:
        label = f"{name}/{answer.name}" if answer.name else answer.label
        if answer.prior is not None and label in raw:
            bias = inner.get_parameter(answer.prior.bias)
            bias.copy_(answer.prior.value(raw[label].to(bias.dtype)).view_as(bias))
    if isinstance(module, Readout):
        for label, bias in zip(module.labels, module.readout.bias.split(module.sizes), strict=True):
            if label in raw:
                bias.copy_(raw[label].to(bias.dtype))
