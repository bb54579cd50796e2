"""The three stages of a training step, and the window of micro-batches they work on.

FORWARD  batch -> outputs        COMPUTE  outputs -> losses (pure)        UPDATE  gradients checked, clipped, applied
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from redheart.config import LossConfig, OptimizerConfig, RunConfig
from redheart.losses.combine import combine
from redheart.model.redheart import RedHeartModel, RedHeartOutput
from redheart.ranks import is_out_of_memory, sum_over_ranks, together
from redheart.schema import Batch, RedHeartError
from redheart.tasks import loss_counts, packed_losses
from redheart.train.engine import Engine, Update
from redheart.train.synergy import predictions


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step on this rank, and what all ranks know about the whole step."""

    batches: list[Batch]  # not on the device yet
    counts: dict[str, float]  # per loss, over all ranks and micro-batches: the divisors
    stop: bool  # some rank was asked to stop
    rehearse: bool  # some rank has a micro-batch of a shape that is new to it
    asked: list[float]  # of what else ranks had to say: how many said it

    @property
    def num_micro_batches(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class LossSums:
    """Σ loss per task over micro-batches of this rank, on the device until someone reads it."""

    names: tuple[str, ...]
    values: torch.Tensor  # [names]

    def __add__(self, other: LossSums) -> LossSums:
        assert self.names == other.names, "modules do not come and go within a step"
        return LossSums(self.names, self.values + other.values)

    def read(self) -> dict[str, float]:
        """By task. Waits for the device."""
        return dict(zip(self.names, self.values.tolist(), strict=True))


def open_window(batches: list[Batch], stop: bool, rehearse: bool = False, asks: Sequence[bool] = ()) -> Window:
    """One collective per step: the sums of label weights over all ranks, and who wants to stop, to rehearse, or `asks` anything else."""
    parts = [loss_counts(b.weights, len(b)) for b in batches]
    names = list(parts[0])
    mine = [sum(p[n] for p in parts) for n in names]
    totals = sum_over_ranks([*mine, float(stop), float(rehearse), *map(float, asks)])
    stops, new, *asked = totals[len(names) :]
    return Window(batches, dict(zip(names, totals, strict=False)), stops > 0, new > 0, asked)


def accumulate(
    engine: Engine, window: Window, factors: Mapping[str, float], config: LossConfig
) -> tuple[LossSums, list[torch.Tensor]]:
    """FORWARD, COMPUTE and backward of a window's micro-batches: Σ loss per task on this rank, and what was predicted.

    Raises OutOfMemory on every rank where the micro-batch is too large for one of them (train/oom.py).
    """
    sums: LossSums | None = None
    predicted: list[torch.Tensor] = []
    for i, batch in enumerate(window.batches):
        with together(engine.forward_has_collectives):
            outputs, loss, parts = loss_of(engine, engine, batch, window, factors, config)
        with together(has_collectives=True):
            engine.backward(loss, is_last=i == window.num_micro_batches - 1)
        predicted += predictions(outputs)
        sums = parts if sums is None else sums + parts
    assert sums is not None, "a window has a micro-batch"
    return sums, predicted


def loss_of(
    model: Engine | RedHeartModel,
    engine: Engine,
    batch: Batch,
    window: Window,
    factors: Mapping[str, float],
    config: LossConfig,
) -> tuple[RedHeartOutput, torch.Tensor, LossSums]:
    """FORWARD and COMPUTE of one micro-batch by `model`: the engine, or its bare model. See `compute` for what is returned."""
    on_device = batch.to(engine.device, engine.dtype)
    outputs = forward(model, on_device)
    shares = window.num_micro_batches * engine.world_size
    return outputs, *compute(outputs, on_device, window.counts, factors, shares, config)


def forward(engine: Engine | RedHeartModel, batch: Batch) -> RedHeartOutput:
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
) -> tuple[torch.Tensor, LossSums]:
    """COMPUTE: (the scalar for backward, Σ loss per task of this micro-batch). Pure.

    `num_micro_batches` = accumulation steps × ranks, over which engines average.
    """
    names, sums, _ = packed_losses(outputs, *batch.side_by_side(), config)
    total = combine(dict(zip(names, sums.unbind(), strict=True)), counts, factors, num_micro_batches)
    return total, LossSums(names, sums.detach().double())


def update(engine: Engine, learning_rate: float) -> Update:
    """UPDATE: after the last backward of a window. A gradient that is not finite is not applied; its modules' norms are not finite."""
    engine.set_learning_rate(learning_rate)
    try:
        return engine.step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RedHeartError(  # half of the parameters may be updated, and the micro-batch has no part in it
            f"out of memory in the optimizer's step ({str(error).splitlines()[0]}): choose a memory.strategy that keeps "
            "more on the host (redheart plan names those that fit), and go on with --resume"
        ) from None


def global_losses(sums: LossSums, counts: Mapping[str, float]) -> dict[str, float]:
    """Loss per label over the whole global batch, for the tasks that had labels in it. Collective; waits for the device."""
    totals = dict(zip(sums.names, sum_over_ranks(sums.values.tolist()), strict=True))
    return {name: totals[name] / counts[name] for name in totals if counts[name] > 0}


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up to `learning_rate`, then a cosine that comes to `final_learning_rate` at step `total_steps`, one after the last; a
    pure function of the step (from 0)."""
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


def looking_ten_times(config: RunConfig, total_steps: int) -> RunConfig:
    """The configuration with the number of steps that evaluate_every = 0 stands for."""
    every = config.training.evaluate_every or max(1, total_steps // 10)
    return config.model_copy(update={"training": config.training.model_copy(update={"evaluate_every": every})})
