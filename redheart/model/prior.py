"""The output biases a fresh network starts with: what the best constant predictor says, so that no answer has to be unlearned.

With biases of zero an answer that is rare among the texts starts with a loss many times that of a constant, and the first
steps go into unlearning it. (Karpathy 2019, "A recipe for training neural networks"; Lin et al. 2017, "Focal loss for dense
object detection", section 3.3, for one class.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from redheart.model.analyzers import VAD_SCALE
from redheart.model.heads.regret import seen_by_observers
from redheart.schema import ETHICS

Raw = Mapping[str, torch.Tensor]  # label (or task) -> raw answer [size] of the best constant predictor
VIEWS = torch.logit(
    seen_by_observers(torch.zeros(3, 2))[2].mean()
)  # what the regret head adds while its outcomes are near zero


def start_at(name: str, module: nn.Module, raw: Raw) -> None:
    """Sets the output biases of the freshly built module `name`; labels that `raw` does not name keep what they have."""
    for label, parameter, value in PLACES.get(name, ()):
        if label in raw:
            bias = module.get_parameter(parameter)
            with torch.no_grad():
                bias.copy_(value(raw[label].to(bias.dtype)))


def _same(raw: torch.Tensor) -> torch.Tensor:
    return raw


def _entry(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda raw: raw[i : i + 1]


# module -> label, bias, its value. Emotions start at zero: the focal loss makes little of what is wrong at first.
PLACES: dict[str, tuple[tuple[str, str, Callable[[torch.Tensor], torch.Tensor]], ...]] = {
    "heads.emotion": (("culture", "culture_out.bias", _same),),
    "heads.bentham": (
        ("bentham", "bentham.linears.1.bias", _same),
        ("acceptability", "acceptability.linears.1.bias", _same),
        *(("ethics", f"verdicts.{theory}.bias", _entry(i)) for i, theory in enumerate(ETHICS)),
    ),
    "heads.regret": (("regret", "regret.linears.2.bias", lambda raw: raw - VIEWS),),
    "analyzers.emotion": (("vad", "vad.linears.1.bias", lambda raw: raw / VAD_SCALE),),
    "analyzers.bentham": (
        ("bentham", "variables.linears.1.bias", _same),
        ("acceptability", "acceptability.linears.1.bias", _same),
    ),
    "analyzers.regret": (
        ("regret", "threshold", lambda raw: -raw),
        ("counterfactual", "counterfactual.linears.1.bias", _same),
    ),
    "analyzers.surd": (("analyzers.surd/density", "level.bias", _same),),
}
