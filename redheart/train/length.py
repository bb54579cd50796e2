"""How long a run is, in optimizer steps, and when it looks at dev: from its configuration and the rows there are."""

from __future__ import annotations

import math

from redheart.config import RunConfig

PASSES = 4  # over the training split, where nobody says otherwise: dev losses have bent upwards by then, or nearly
LEAST_STEPS = 100  # of few rows even four passes teach nothing


def steps_of(config: RunConfig, num_rows: int) -> int:
    """max_steps, or as many as `epochs` passes over the rows take; without either PASSES, and at least LEAST_STEPS."""
    settings = config.training
    if settings.max_steps:
        return settings.max_steps
    if settings.epochs:
        return max(1, math.ceil(settings.epochs * num_rows / settings.global_batch_size))
    return max(LEAST_STEPS, math.ceil(PASSES * num_rows / settings.global_batch_size))


def looking_ten_times(config: RunConfig, total_steps: int) -> RunConfig:
    """The configuration with the number of steps that evaluate_every = 0 stands for."""
    every = config.training.evaluate_every or max(1, total_steps // 10)
    return config.model_copy(update={"training": config.training.model_copy(update={"evaluate_every": every})})
