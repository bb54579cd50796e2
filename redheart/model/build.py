"""From a run's configuration to a fresh network, with nothing else imported: GPU machines without data libraries use it too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from redheart.config import RunConfig
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.model.select import ExecutionMode


def build_model(
    config: RunConfig, encoder: dict[str, Any] | None, place: Callable[[nn.Module], None] = lambda module: None
) -> RedHeartModel:
    """A fresh network of the configured size, in training mode. `encoder`: fingerprint of the features it will read.

    `place`: as of RedHeartModel.
    """
    sizes = config.model.model_dump()
    recompute = sizes.pop("activation_checkpointing")
    model = RedHeartModel(RedHeartConfig(**sizes, encoder=encoder), place)
    model.backbone.gradient_checkpointing = recompute
    model.set_mode(ExecutionMode.TRAINING)
    return model
