"""How many optimizer steps a run takes. Without torch: `redheart init` asks, on its way to a terminal."""

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
