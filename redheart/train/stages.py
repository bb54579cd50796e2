"""The three stages of a training step, and the window of micro-batches they work on.

FORWARD  batch -> outputs        COMPUTE  outputs -> losses (pure)        UPDATE  gradients checked, clipped, applied
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from redheart.config import LossConfig, OptimizerConfig
from redheart.losses.combine import combine
from redheart.model.redheart import RedHeartOutput
from redheart.ranks import sum_over_ranks
from redheart.schema import Batch, RedHeartError
from redheart.tasks import loss_counts, task_losses
from redheart.train.engine import Engine


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step on this rank, and what all ranks know about the whole step."""

    batches: list[Batch]
    counts: dict[str, float]  # per loss, over all ranks and micro-batches: the divisors
    stop: bool  # some rank was asked to stop

    @property
    def num_micro_batches(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class Update:
    applied: bool
    grad_norm: float  # global, before clipping
    module_norms: dict[str, float] | None  # where they were asked for, or where something is not finite


def open_window(batches: list[Batch], stop: bool) -> Window:
    """One collective per step: the sums of label weights over all ranks, and whether anyone wants to stop."""
    parts = [loss_counts(b.weights, len(b)) for b in batches]
    names = list(parts[0])
    *totals, stops = sum_over_ranks([*(sum(p[n] for p in parts) for n in names), float(stop)])
    return Window(batches, dict(zip(names, totals, strict=True)), stops > 0)


def forward(engine: Engine, batch: Batch) -> RedHeartOutput:
    """FORWARD: the training pass of one micro-batch (already on the engine's device)."""
    return engine(
        features=batch.features,
        attention_mask=batch.mask,
        contrast_features=batch.contrast_features,
        contrast_mask=batch.contrast_mask,
        contrast_rows=batch.contrast_rows,
        sample_keys=batch.keys,
    )


def compute(
    outputs: RedHeartOutput,
    batch: Batch,
    counts: Mapping[str, float],
    factors: Mapping[str, float],
    num_micro_batches: int,
    config: LossConfig,
) -> tuple[torch.Tensor, dict[str, float]]:
    """COMPUTE: (the scalar for backward, Σ loss per task of this micro-batch). Pure.

    `num_micro_batches` = accumulation steps × ranks, over which engines average.
    """
    losses = task_losses(outputs, batch.labels, batch.weights, config)
    sums = {name: value for name, (value, _) in losses.items()}
    told = torch.stack(
        [v.detach().double() for v in sums.values()]
    ).tolist()  # one wait for the device, not one per task
    return combine(sums, counts, factors, num_micro_batches), dict(zip(sums, told, strict=True))


def update(engine: Engine, learning_rate: float, want_norms: bool) -> Update:
    """UPDATE: after the last backward of a window. A non-finite gradient is not applied, and its modules' norms are read."""
    engine.set_learning_rate(learning_rate)
    norms = engine.grad_norms() if engine.non_finite() or want_norms else None
    applied, grad_norm = engine.step()
    return Update(applied, grad_norm, norms)


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up to `learning_rate`, then a cosine to `final_learning_rate`; a pure function of the step (from 0)."""
    warmup = max(1, round(total_steps * config.warmup_fraction))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total_steps - warmup)
    low = min(config.final_learning_rate, config.learning_rate)
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def split_global_batch(global_batch_size: int, micro_batch_size: int, world_size: int) -> tuple[int, int]:
    """(micro-batch, accumulation steps) with micro-batch × accumulation × ranks = global batch, the largest micro-batch allowed.

    Raises RedHeartError where the ranks cannot share the global batch equally.
    """
    if global_batch_size % world_size:
        raise RedHeartError(
            f"training.global_batch_size = {global_batch_size} cannot be shared by {world_size} ranks: "
            f"choose a multiple, for instance {math.ceil(global_batch_size / world_size) * world_size}"
        )
    share = global_batch_size // world_size
    micro = next(m for m in range(min(micro_batch_size, share), 0, -1) if share % m == 0)
    return micro, share // micro
