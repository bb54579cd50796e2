"""TASKS: every answer that is trained, derived from model/parts.py; losses, constant predictors and predictions of all of them.

A label's own name is its final, fused answer; `MODULE/LABEL` is what one module alone says of it. Losses are computed by kind: the
raw answers of all tasks that one function judges stand side by side in one tensor, and so do their labels and weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import pad

from redheart.causality.levels import LEVELS, level_of
from redheart.config import LossConfig
from redheart.losses.constant import best_constant
from redheart.losses.elementwise import SumCount, labelled, weighted
from redheart.losses.emotion import gate_balance, router_z
from redheart.model.analyzers import SUBSETS
from redheart.model.layers import full_precision
from redheart.model.outputs import RedHeartOutput
from redheart.model.parts import FUSION, PARTS, SHARES, Answer, Judgement, Part, units
from redheart.model.prior import Start
from redheart.schema import LABEL_COLUMNS, LABELS, NUM_LABEL_COLUMNS


@dataclass(frozen=True)
class Task:
    """`output`: the field of RedHeartOutput, or None where the answer is `module`'s reading. The rest as of parts.Answer."""

    label: str
    module: str
    output: str | None
    judged: Judgement
    weight: float = 1.0

    @property
    def kind(self) -> Literal["multilabel", "binary", "score"]:
        return self.judged.kind

    @property
    def final(self) -> bool:
        """Whether users see it; the others are what single modules say."""
        return self.output is not None and self.judged.link is not None

    @property
    def raw_size(self) -> int:
        return LABELS[self.label].size * self.judged.spread

    def reading(self, outputs: RedHeartOutput) -> torch.Tensor | None:
        """The raw answer as the network gives it; None where the module is left out."""
        own = (outputs.readings or {}).get(self.label, {})
        return own.get(self.module) if self.output is None else outputs.get(self.output)

    def raw(self, outputs: RedHeartOutput) -> torch.Tensor | None:
        """The same in float32 (or float64)."""
        reading = self.reading(outputs)
        return None if reading is None else full_precision(reading)

    def predict(self, outputs: RedHeartOutput) -> torch.Tensor | None:
        """In the label's units, [B, size]; None where the module is left out, and of a density, which is no value."""
        raw = self.raw(outputs) if self.judged.link else None
        return None if raw is None else self.judged.link.predict(raw)  # type: ignore[union-attr]

    def loss(self, raw: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, config: LossConfig) -> SumCount:
        """(Σ, count) of raw answers [B, raw size] for a label's targets and weights [B, size]."""
        raw = raw.flatten(1)
        known = _shared(self.label, weight).repeat_interleave(self.judged.spread, 1)
        raw, (_, target) = torch.where(known > 0, raw, 0.0), labelled(target, target, weight)
        return weighted(self.judged.entries(raw, target, config), weight)

    def constant(self, target: torch.Tensor, weight: torch.Tensor, config: LossConfig) -> torch.Tensor:
        """The raw answer of the predictor with the least loss of all that always say the same, for labels and weights [N, size].

        Of two texts it says that neither is better: any other answer would be the opposite of itself for the same two the other way
        round, and data that always name the better text first would make it look like knowledge (and its loss like 0).
        """
        link = self.judged.link
        if self.kind == "binary":
            return torch.zeros_like(target)
        if link is None:
            levels = level_of(target, config.regret_edges) == torch.arange(LEVELS, device=target.device)
            share = (levels * weight).sum(0) / weight.sum().clamp(min=1e-12)
            return share.clamp(min=1e-6).log().expand(len(target), len(SUBSETS), -1)
        label = LABELS[self.label]
        if link is SHARES:  # its entries hang together, and the least squared error is the mean's
            total = weight.sum(0)
            best = torch.where(total > 0, (target * weight).sum(0) / total.clamp(min=1e-12), 0.5)
        else:
            loss = lambda x, t, w: self.loss(x, t, w, config)  # noqa: E731
            best = best_constant(loss, link.inverse, target, weight, label.low, label.high).to(target.dtype)
        return link.inverse(best).expand_as(target)


def _shared(label: str, weight: torch.Tensor) -> torch.Tensor:
    """Above 0 where a raw answer counts: a simplex's entries hang together, so that all count where one is labelled."""
    return weight.amax(-1, keepdim=True).expand_as(weight) if LABELS[label].simplex else weight


def _tasks() -> dict[str, Task]:
    answers = [(part, answer) for part in PARTS for answer in part.answers]
    final = {a.label: (p, a) for p, a in reversed(answers) if not a.name}
    tasks = {label: _task(*final[label], alone=False) for label in LABELS}
    tasks |= {f"{p.name}/{a.label}": _task(p, a, alone=True) for p, a in answers if a.fused}
    return tasks | {f"{p.name}/{a.name}": _task(p, a, alone=False) for p, a in answers if a.name}


def _task(part: Part, answer: Answer, alone: bool) -> Task:
    module = part.name if alone or not answer.fused else FUSION
    return Task(answer.label, module, None if alone else answer.output_name, answer.judged, answer.weight)


TASKS: dict[str, Task] = _tasks()
GATES = tuple(part.gate for part in PARTS if part.gate)

LATENTS = {  # what has no label of its own, and the losses that reach it
    "expert_gate_logits": "emotion",
    "theory_gate_logits": "bentham",
    "branches of the emotion head": "emotion",
    "outcome mean and spread of the three observers": "regret_views",
    "trajectory of the emotions": "emotion",
    "presence of the stakeholders": "preference, bentham, acceptability",
    "utilities had and foregone": "regret",
    "DSP controls and signals": "emotion, through the Kalman filter and the fusion",
    "rates, noises and covariance of the Kalman filter": "emotion, through the gains and the fusion",
}


class Losses(NamedTuple):
    """Sums of one micro-batch, [names], and the sums of their weights."""

    names: tuple[str, ...]
    sums: torch.Tensor
    counts: torch.Tensor


class _Packing:
    """Where the raw answers, entries and sums of some tasks stand side by side, on one device; tasks are in order of their kind."""

    @torch.inference_mode(False)  # it serves a training pass as well
    def __init__(self, names: tuple[str, ...], device: torch.device):
        kinds = list(dict.fromkeys(TASKS[name].judged.entries for name in names))
        self.names = tuple(name for kind in kinds for name in names if TASKS[name].judged.entries == kind)
        tasks = [TASKS[name] for name in self.names]
        columns = [range(LABEL_COLUMNS[t.label].start, LABEL_COLUMNS[t.label].stop) for t in tasks]
        of_raw = [c for t, own in zip(tasks, columns, strict=True) for c in own for _ in range(t.judged.spread)]
        self.kinds = kinds
        self.raw_sizes = [sum(t.raw_size for t in tasks if t.judged.entries == kind) for kind in kinds]
        self.sizes = [sum(LABELS[t.label].size for t in tasks if t.judged.entries == kind) for kind in kinds]
        end, longest = sum(self.sizes), max(map(len, columns))
        places, start = [], 0
        for own in columns:  # a task's entries in one row, and behind them the column of zeros at the end
            places += [start + k if k < len(own) else end for k in range(longest)]
            start += len(own)
        hang_together = torch.eye(NUM_LABEL_COLUMNS)
        for label, where in LABEL_COLUMNS.items():
            if LABELS[label].simplex:
                hang_together[where, where] = 1.0
        self.columns = torch.tensor([c for own in columns for c in own], device=device)
        self.places = torch.tensor(places, device=device)
        self.of_raw = hang_together[:, of_raw].to(device)  # times weights: above 0 where a raw answer counts


_packings: dict[tuple[tuple[str, ...], torch.device], _Packing] = {}


def _packing(names: tuple[str, ...], values: torch.Tensor) -> _Packing:
    """Made once for a device; tensors of no memory (memory/activations.py) get their own, which nobody else could use."""
    if type(values) is not torch.Tensor:
        return _Packing(names, values.device)
    if (names, values.device) not in _packings:
        _packings[names, values.device] = _Packing(names, values.device)
    return _packings[names, values.device]


def packed_losses(outputs: RedHeartOutput, values: torch.Tensor, weights: torch.Tensor, config: LossConfig) -> Losses:
    """The losses of every task and the gates' regularisers (count: samples) of one micro-batch, from labels side by side:
    `values` and `weights` [B, NUM_LABEL_COLUMNS]. Tasks and gates of modules that are left out are left out too."""
    readings = {name: task.reading(outputs) for name, task in TASKS.items()}
    packing = _packing(tuple(name for name, reading in readings.items() if reading is not None), values)
    raw = full_precision(torch.cat([readings[name].flatten(1) for name in packing.names], 1))  # type: ignore[union-attr]
    unknown = torch.mm(weights, packing.of_raw.to(weights.dtype)) <= 0
    target, weight = values.index_select(1, packing.columns), weights.index_select(1, packing.columns)
    missing = weight <= 0
    # before the loss, so that a NaN where there is no label has no gradient either
    raw, target = raw.masked_fill(unknown, 0.0), target.masked_fill(missing, 0.0)
    parts = zip(packing.kinds, raw.split(packing.raw_sizes, 1), target.split(packing.sizes, 1), strict=True)
    entries = torch.cat([kind(x, t, config) for kind, x, t in parts], 1)
    entries = (entries * weight).masked_fill(missing, 0.0)
    both = pad(torch.stack([entries, weight.to(entries.dtype)]).sum(1), (0, 1))
    sums, counts = both.index_select(1, packing.places).unflatten(1, (len(packing.names), -1)).sum(-1).unbind()
    gates = [name for name in GATES if name in outputs]
    if not gates:
        return Losses(packing.names, sums, counts)
    regularisers = _regularisers([full_precision(outputs[name]) for name in gates], config)
    of_samples = pad(counts, (0, len(gates)), value=float(len(values)))
    return Losses((*packing.names, *gates), torch.cat([sums, regularisers]), of_samples)


def _regularisers(gates: Sequence[torch.Tensor], config: LossConfig) -> torch.Tensor:
    """Of the logits [B, n] of each gate, all at once -> [gates]."""
    most = max(logits.shape[1] for logits in gates)
    logits = torch.stack([pad(x, (0, most - x.shape[1]), value=float("-inf")) for x in gates])
    return (config.balance * gate_balance(logits)).add(router_z(logits), alpha=config.router_z).sum((1, 2))


def task_losses(
    outputs: RedHeartOutput, labels: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], config: LossConfig
) -> dict[str, SumCount]:
    """`packed_losses` by name, from labels and weights by name."""
    values, of_values = (torch.cat([by_label[label] for label in LABELS], 1) for by_label in (labels, weights))
    losses = packed_losses(outputs, values, of_values, config)
    return dict(zip(losses.names, zip(losses.sums.unbind(), losses.counts.unbind(), strict=True), strict=True))


def loss_counts(weights: Mapping[str, torch.Tensor], num_samples: int) -> dict[str, float]:
    """The counts of `task_losses`, from the labels alone: known before the forward pass."""
    by_label = {label: float(weights[label].numpy().sum(dtype="float64")) for label in LABELS}
    return {name: by_label[task.label] for name, task in TASKS.items()} | {gate: float(num_samples) for gate in GATES}


def task_weights(config: LossConfig) -> dict[str, float]:
    """Weight of every task (config `loss.weights` over the record's own, times its room's share) and 1 for the regularisers."""
    shares = config.shares.model_dump()
    weights = {
        name: config.weights.get(name, task.weight) * shares[task.module.split(".")[0]] for name, task in TASKS.items()
    }
    return weights | dict.fromkeys(GATES, 1.0)


def constant_answers(
    labels: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], config: LossConfig
) -> dict[str, torch.Tensor]:
    """Raw answer [size] of the best constant predictor of every label that is there, for labels[name] [N, size]; by label, and
    for a density by its task."""
    known = {n: t for n, t in TASKS.items() if (n in LABELS or t.judged.link is None) and weights[t.label].sum() > 0}
    answers = {n: t.constant(labels[t.label], weights[t.label], config)[0] for n, t in known.items()}
    return {n: a[0] if TASKS[n].judged.link is None else a for n, a in answers.items()}


def what_is_known(
    labels: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    losses: Mapping[str, float],
    config: LossConfig,
) -> Start:
    """Of labels[name] [N, size] and their `constant_losses`: what a fresh network starts with."""
    answers = constant_answers(labels, weights, config)
    return Start(answers, units({n: max(losses[n], config.constant_floor) for n in answers if n in LABELS}))


def constant_losses(
    labels: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], config: LossConfig
) -> dict[str, float]:
    """Loss of the best constant predictor on labels[name] [N, size]: the scale each task is divided by.

    A task without any label gets 1.0 (its loss is 0 throughout), and so do the regularisers, which have no constant predictor.
    """
    scales = dict.fromkeys(GATES, 1.0)
    known: dict[tuple[str, Judgement], float] = {}  # modules that answer for one label have one loss
    for name, task in TASKS.items():
        key, target, weight = (task.label, task.judged), labels[task.label], weights[task.label]
        if key not in known:
            known[key] = 1.0
            if weight.sum() > 0:
                value, count = task.loss(task.constant(target, weight, config), target, weight, config)
                known[key] = (value / count).item()
        scales[name] = known[key]
    return scales
