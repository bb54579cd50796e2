"""TASKS: one record per answer of the network. To add a task, add a record here; trainer, evaluation and report follow.

A record names the label that supervises the answer, the module that gives it, how a loss and a prediction are read from
RedHeartOutput, and what a constant predictor would put in place of the raw prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from redheart.config import LossConfig
from redheart.losses.bentham import hedonic, pair_logistic
from redheart.losses.elementwise import SumCount, cross_entropy
from redheart.losses.emotion import gate_balance, router_z, soft_focal
from redheart.losses.regret import huber
from redheart.losses.surd import squared
from redheart.model.layers import full_precision
from redheart.model.redheart import RedHeartOutput
from redheart.schema import LABELS

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, LossConfig], SumCount]


@dataclass(frozen=True)
class Task:
    """`output` names the field of RedHeartOutput, [B, size]; `logits` says whether a sigmoid makes it a prediction."""

    label: str
    module: str
    output: str
    loss: Loss
    logits: bool
    kind: Literal["multilabel", "binary", "score"]  # which metrics and which baseline judge it
    weight: float = 1.0

    def raw(self, outputs: RedHeartOutput) -> torch.Tensor:
        """What the loss takes, float32 (or float64) [B, size]."""
        return full_precision(outputs[self.output])

    def predict(self, outputs: RedHeartOutput) -> torch.Tensor:
        """In the label's units, [B, size]."""
        raw = self.raw(outputs)
        return torch.sigmoid(raw) if self.logits else raw

    def constant(self, mean: torch.Tensor) -> torch.Tensor:
        """The raw value of a predictor that always says `mean` [size]."""
        return torch.logit(mean, eps=1e-4) if self.logits else mean


TASKS: dict[str, Task] = {
    "emotion": Task(
        "emotion",
        "heads.emotion",
        "emotion_logits",
        lambda x, t, w, c: soft_focal(x, t, w, c.focal_gamma),
        True,
        "multilabel",
    ),
    "culture": Task(
        "culture", "heads.emotion", "culture_logits", lambda x, t, w, c: cross_entropy(x, t, w), True, "score"
    ),
    "bentham": Task(
        "bentham",
        "heads.bentham",
        "bentham_logits",
        lambda x, t, w, c: hedonic(x, t, w, c.extreme_penalty),
        True,
        "score",
    ),
    "preference": Task(
        "preference", "heads.bentham", "utility_difference", lambda x, t, w, c: pair_logistic(x, t, w), True, "binary"
    ),
    "acceptability": Task(
        "acceptability",
        "heads.bentham",
        "acceptability_logits",
        lambda x, t, w, c: cross_entropy(x, t, w),
        True,
        "score",
    ),
    "ethics": Task(
        "ethics", "heads.bentham", "ethics_logits", lambda x, t, w, c: cross_entropy(x, t, w), True, "score"
    ),
    "regret": Task(
        "regret",
        "heads.regret",
        "regret_logits",
        lambda x, t, w, c: huber(torch.sigmoid(x), t, w, c.huber_delta),
        True,
        "score",
    ),
    "regret_views": Task(
        "regret_views", "heads.regret", "regret_views", lambda x, t, w, c: huber(x, t, w, c.huber_delta), False, "score"
    ),
    "surd": Task("surd", "heads.surd", "surd", lambda x, t, w, c: squared(x, t, w), False, "score"),
}
assert all(task.label in LABELS for task in TASKS.values())

LATENTS = {  # what has no label of its own, and the loss that reaches it
    "expert_gate_logits": "emotion",
    "theory_gate_logits": "bentham",
    "outcome mean and spread of the three observers": "regret_views",
    "branches of the emotion head": "emotion",
}
GATES = ("expert_gate_logits", "theory_gate_logits")


def task_losses(
    outputs: RedHeartOutput, labels: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], config: LossConfig
) -> dict[str, SumCount]:
    """(sum, count) of every task and of the gates' regularisers (count: samples), for one micro-batch."""
    losses = {
        name: task.loss(task.raw(outputs), labels[task.label], weights[task.label], config)
        for name, task in TASKS.items()
    }
    for gate in GATES:
        logits = full_precision(outputs[gate])
        regulariser = config.balance * gate_balance(logits) + config.router_z * router_z(logits)
        losses[gate] = (regulariser.sum(), torch.tensor(float(len(logits))))
    return losses


def loss_counts(weights: Mapping[str, torch.Tensor], num_samples: int) -> dict[str, float]:
    """The counts of `task_losses`, from the labels alone: known before the forward pass."""
    counts = {name: float(weights[task.label].sum()) for name, task in TASKS.items()}
    return counts | {gate: float(num_samples) for gate in GATES}


def task_weights(config: LossConfig) -> dict[str, float]:
    """Weight of every task (config `loss.weights` over the record's own) and 1 for the regularisers."""
    weights = {name: config.weights.get(name, task.weight) for name, task in TASKS.items()}
    return weights | dict.fromkeys(GATES, 1.0)


def constant_losses(
    labels: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], config: LossConfig
) -> dict[str, float]:
    """Loss of the weighted-mean predictor on labels[name] [N, size]: the scale each task is divided by.

    A task without any label gets 1.0 (its loss is 0 throughout), and so do the regularisers, which have no constant predictor.
    """
    scales = dict.fromkeys(GATES, 1.0)
    for name, task in TASKS.items():
        target, weight = labels[task.label], weights[task.label]
        total = weight.sum(0)
        mean = torch.where(total > 0, (target * weight).sum(0) / total.clamp(min=1e-12), 0.5)
        value, count = task.loss(task.constant(mean).expand_as(target), target, weight, config)
        scales[name] = (value / count).item() if count > 0 else 1.0
    return scales
