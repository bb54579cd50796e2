"""Losses and metrics of a model on one split: sums over all ranks, kept apart by who made the label.

Only labels of people (`human`, and `author` in a line of its own) judge the model; `llm` and `derived` lines say how
far it agrees with labels of that kind, and are marked so wherever they are printed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from redheart.config import LossConfig
from redheart.data.stream import SampleStream
from redheart.metrics import FIELDS, Tally, empty_tally, not_finite, pair_tally, summarise, tally, unexplained
from redheart.model.outputs import RedHeartOutput
from redheart.ranks import sum_over_ranks, together
from redheart.schema import LABELS, ORIGINS, Batch, RedHeartError
from redheart.tasks import TASKS, packed_losses

Row = tuple[str, str]  # task, origin
UNEXPLAINED = "unexplained"  # of training.best_metric
METRICS = {
    "multilabel": ("macro_f1", "mae"),
    "binary": ("accuracy",),
    "score": ("mae", "pearson"),
}  # that are shown, by kind
SAID = 8  # of how many rows predictions are kept


class Said(NamedTuple):
    """What was predicted of a few rows: their numbers in the split [n], and predictions [n, size] by task."""

    rows: np.ndarray
    predictions: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    """`losses`: loss ÷ labels per task; `total`: Σ factor·loss; `metrics`: by (task, origin), see metrics.summarise.

    `not_finite`: how many labelled entries a task answered with a NaN or an infinity; it has no metrics for that origin. `said`: on
    the first rank, what was said of the first rows. `unexplained`: of final answers, metrics.unexplained, whoever made the labels.
    """

    rows: int
    losses: dict[str, float]
    total: float
    metrics: dict[Row, dict[str, float]]
    not_finite: dict[Row, int]
    unexplained: dict[str, float]
    said: Said | None = field(default=None, compare=False)

    def value(self, metric: str, weights: Mapping[str, float]) -> float:
        """What `training.best_metric` is lowest of: lower is better. `weights`: tasks.task_weights."""
        if metric == UNEXPLAINED:
            shares = {name: weights[name] for name in self.unexplained if weights[name]}
            total = sum(share * self.unexplained[name] for name, share in shares.items())
            return total / sum(shares.values()) if shares else math.nan
        return self.total if metric == "loss" else self.losses[metric]

    def check_finite(self) -> None:
        """Raises RedHeartError that names the answers or losses that are not finite."""
        causes = [f"{task} of {n} labels by {origin}" for (task, origin), n in self.not_finite.items()]
        causes += [f"the loss of {task}" for task, value in self.losses.items() if not math.isfinite(value)]
        if causes:
            raise RedHeartError(f"not finite: {', '.join(causes)}; judge an earlier checkpoint")


def evaluate(
    model: nn.Module,
    stream: SampleStream,
    config: LossConfig,
    factors: Mapping[str, float],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    max_rows: int | None = None,
    forward_has_collectives: bool = False,
) -> Evaluation:
    """Evaluates on the whole split, or on `max_rows` rows evenly spread over it. Collective; the model's mode is restored.

    `forward_has_collectives`: ranks wait for one another in every forward pass (ZeRO-3), so all of them make as many.
    Raises ranks.OutOfMemory on every rank where `batch_size` rows are too many for one of them.
    """
    sums = dict.fromkeys(TASKS, 0.0)
    counts = dict.fromkeys(TASKS, 0.0)  # stays 0 for tasks of modules that are left out
    names: tuple[str, ...] = ()
    totals: torch.Tensor | None = None  # on the device: reading them at every batch would wait for it
    tallies = {row: empty_tally(LABELS[TASKS[row[0]].label].size) for row in _rows()}
    seen, said = 0, None
    was_training = model.training
    model.eval()
    with together(forward_has_collectives):
        for batch, is_counted in _batches(stream, batch_size, rank, world_size, max_rows, forward_has_collectives):
            on_device = batch.to(device, dtype)
            outputs = forward(model, on_device)
            if not is_counted:
                continue
            seen += len(batch)
            names, *parts = packed_losses(outputs, *on_device.side_by_side(), config)
            own = torch.stack(parts).double()
            totals = own if totals is None else totals + own
            predictions = predict_all(outputs)
            add_tallies(tallies, predictions, batch)
            if said is None and rank == 0:
                said = Said(batch.keys[:SAID].numpy(), {name: p[:SAID] for name, p in predictions.items()})
    model.train(was_training)
    if totals is not None:
        for name, value, count in zip(names, *totals.tolist(), strict=True):
            if name in TASKS:
                sums[name], counts[name] = value, count
    return replace(_merge(seen, sums, counts, tallies, factors), said=said)


def _batches(
    stream: SampleStream, batch_size: int, rank: int, world_size: int, max_rows: int | None, in_step: bool
) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, and whether they count. `in_step`: as many as any rank has, for forward passes that wait for one another.

    A rank that has run out goes through the split's first batch again, uncounted.
    """
    turns = 0
    for batch in stream.in_order(batch_size, rank, world_size, max_rows):
        turns += 1
        yield batch, True
    rows = stream.num_rows if max_rows is None else min(max_rows, stream.num_rows)
    most = -(-rows // (batch_size * world_size))
    if in_step and turns < most:
        yield next(stream.in_order(batch_size, 0, 1, max_rows)), False


@torch.no_grad()
def forward(model: nn.Module, batch: Batch, without: Collection[str] = ()) -> RedHeartOutput:
    """The answers for a batch, without dropout and gradients; `without`: modules to do without."""
    contrast = (batch.contrast_features, batch.contrast_mask, batch.contrast_rows)
    return model(batch.features, batch.mask, *contrast, without=without)


def predict_all(outputs: RedHeartOutput) -> dict[str, torch.Tensor]:
    """Predictions [B, size] by task, on the CPU, of the tasks whose modules are there."""
    predictions = {name: task.predict(outputs) for name, task in TASKS.items()}
    return {name: p.cpu() for name, p in predictions.items() if p is not None}


def add_tallies(tallies: dict[Row, Tally], predictions: Mapping[str, torch.Tensor], batch: Batch) -> None:
    """Adds predictions [B, size] by task to the tallies of the origin of each row's label."""
    columns = {label: batch.origins[:, i] for i, label in enumerate(LABELS)}
    for name, prediction in predictions.items():
        task = TASKS[name]
        for code, origin in enumerate(ORIGINS):
            rows = columns[task.label] == code
            if rows.any():
                labelled = batch.weights[task.label] * rows[:, None]
                count = pair_tally if task.kind == "binary" else tally
                tallies[name, origin] += count(prediction, batch.labels[task.label], labelled)


def _rows() -> list[Row]:
    return [(task, origin) for task in TASKS for origin in ORIGINS]


def _merge(
    seen: int, sums: dict[str, float], counts: dict[str, float], tallies: dict[Row, Tally], factors: Mapping[str, float]
) -> Evaluation:
    flat = [float(seen), *sums.values(), *counts.values()]
    for row in _rows():
        flat += tallies[row].flatten().tolist()
    flat = sum_over_ranks(flat)
    rows, flat = int(flat[0]), flat[1:]
    total_sums = dict(zip(TASKS, flat[: len(TASKS)], strict=True))
    total_counts = dict(zip(TASKS, flat[len(TASKS) : 2 * len(TASKS)], strict=True))
    flat = flat[2 * len(TASKS) :]
    metrics, bad = {}, {}
    whole = {name: empty_tally(LABELS[task.label].size) for name, task in TASKS.items() if task.final}
    for row in _rows():
        size = LABELS[TASKS[row[0]].label].size * len(FIELDS)
        merged, flat = torch.tensor(flat[:size], dtype=torch.float64).view(len(FIELDS), -1), flat[size:]
        if row[0] in whole:
            whole[row[0]] += merged
        if count := not_finite(merged):
            bad[row] = count
        elif summary := summarise(merged):
            metrics[row] = summary
    losses = {n: total_sums[n] / total_counts[n] for n in TASKS if total_counts[n] > 0}
    left = {name: unexplained(sums) for name, sums in whole.items() if sums[FIELDS.index("n")].any()}
    return Evaluation(rows, losses, sum(factors[n] * v for n, v in losses.items()), metrics, bad, left)
