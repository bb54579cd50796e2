"""The output biases a fresh network starts with: what the best constant predictor says, so that no answer has to be unlearned.

With biases of zero an answer that is rare among the texts starts with a loss many times that of a constant, and its gradients
fill Adam's second moments for a thousand steps: every other answer then learns the slower. (Karpathy 2019, "A recipe for
training neural networks"; Lin et al. 2017, "Focal loss for dense object detection", section 3.3, for one class.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

Raw = Mapping[str, torch.Tensor]  # label (or task) -> raw answer [size] of the best constant predictor
SPREAD = 0.1  # of the weights that answers are read with, against torch's initialisation: they start near the constant
UNBIASED_VIEW_LOGIT = 0.4  # of the mean of the three views that the regret head starts with


def start_at(name: str, module: nn.Module, raw: Raw) -> None:
    """Sets the output biases of the freshly built module `name`; labels that `raw` does not name keep what they have."""
    for label, parameter, entries, value in PLACES.get(name, ()):
        if label in raw:
            bias = module.get_parameter(parameter)
            with torch.no_grad():
                bias[entries] = value(raw[label].to(bias.dtype)).expand_as(bias[entries])
                if parameter.endswith(".bias"):
                    module.get_parameter(parameter.removesuffix("bias") + "weight")[entries] *= SPREAD


def _same(raw: torch.Tensor) -> torch.Tensor:
    return raw


def _shared(raw: torch.Tensor) -> torch.Tensor:
    """One bias for all entries: of their mean probability."""
    return torch.logit(torch.sigmoid(raw).mean(0, keepdim=True))


def _entry(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda raw: raw[i : i + 1]


ALL = slice(None)
Place = tuple[
    str, str, slice | int, Callable[[torch.Tensor], torch.Tensor]
]  # label, parameter, its entries, their value
PLACES: dict[str, tuple[Place, ...]] = {
    "heads.emotion": (
        ("emotion", "emotion.linears.1.bias", ALL, _same),
        ("culture", "culture_out.bias", ALL, _same),
    ),
    "heads.bentham": (
        ("bentham", "bentham.linears.1.bias", ALL, _same),
        ("acceptability", "acceptability.linears.1.bias", ALL, _same),
        # the utilitarian logit is part of the utility, whose constant nothing could train: it stays at zero
        ("ethics", "verdicts.deontological.bias", ALL, _entry(1)),
        ("ethics", "verdicts.virtue.bias", ALL, _entry(2)),
        ("ethics", "verdicts.justice.bias", ALL, _entry(3)),
    ),
    "heads.regret": (("regret", "regret.linears.2.bias", ALL, lambda raw: raw - UNBIASED_VIEW_LOGIT),),
    "analyzers.emotion": (
        ("emotion_fine", "fine.linears.1.bias", ALL, _same),
        ("vad", "vad.linears.1.bias", ALL, _same),
        ("emotion", "level.bias", ALL, _shared),
    ),
    "analyzers.bentham": (
        ("bentham", "variables.linears.1.bias", ALL, _same),
        ("acceptability", "acceptability.linears.1.bias", ALL, _same),
    ),
    "analyzers.regret": (
        ("regret", "threshold", ALL, lambda raw: -raw),
        ("counterfactual", "counterfactual.linears.1.bias", ALL, _same),
    ),
    "analyzers.surd": (("analyzers.surd/density", "level.bias", ALL, _same),),
    "aux.kalman": (  # the state before the first token, and what its three readings are off by: head, analyzer, DSP
        ("emotion", "prior.linears.2.bias", slice(0, 7), _same),
        ("emotion", "observation_bias", 1, lambda raw: _shared(raw) - raw),
        ("emotion", "observation_bias", 2, lambda raw: -raw),
    ),
}
