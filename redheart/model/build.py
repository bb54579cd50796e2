"""From a run's configuration to a fresh network, with nothing else imported: GPU machines without data libraries use it too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from redheart.config import RunConfig
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.model.select import ExecutionMode

Place = Callable[[str, nn.Module], None]  # called with a module's name and the module as soon as it is built


def model_config(config: RunConfig, encoder: dict[str, Any] | None) -> RedHeartConfig:
    """The network's sizes. `encoder`: fingerprint of the features it will read."""
    sizes = config.model.model_dump()
    del sizes["activation_checkpointing"]
    return RedHeartConfig(**sizes, encoder=encoder)


def build_model(
    config: RunConfig, encoder: dict[str, Any] | None, place: Place = lambda name, module: None
) -> RedHeartModel:
    """A fresh network of the configured size, in training mode. `place`: as of RedHeartModel."""
    model = RedHeartModel(model_config(config, encoder), place)
    model.checkpoint_activations(config.model.activation_checkpointing)
    model.set_mode(ExecutionMode.TRAINING)
    return model
