"""TASKS: one record per answer of the network. To add a task, add a record here; trainer, evaluation and report follow.

A record names the label that supervises the answer, the module that gives it, how a loss and a prediction are read from
RedHeartOutput. A label's own name is its final, fused answer; `MODULE/LABEL` is what one module alone says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from redheart.causality.levels import LEVELS, level_of
from redheart.config import LossConfig
from redheart.losses.bentham import hedonic, pair_logistic
from redheart.losses.constant import best_constant
from redheart.losses.elementwise import SumCount, cross_entropy, squared
from redheart.losses.emotion import gate_balance, router_z, soft_focal
from redheart.losses.regret import huber
from redheart.losses.surd import density_cross_entropy, squared_shares, surd_probabilities
from redheart.model.analyzers import SUBSETS
from redheart.model.fusion import FINAL, UTILITY
from redheart.model.layers import full_precision
from redheart.model.redheart import ANSWERS, RedHeartOutput
from redheart.schema import LABELS

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, LossConfig], SumCount]
Link = Literal["sigmoid", "tanh", "none", "surd", "density"]
INVERSE: dict[
    str, Callable[[torch.Tensor], torch.Tensor]
] = {  # the raw answer of who says `value`, of any shape; [4] of shares and leak
    "sigmoid": lambda value: torch.logit(value, eps=1e-4),
    "tanh": lambda value: torch.atanh(value.clamp(-0.999, 0.999)),
    "none": lambda value: value,
    "surd": lambda value: torch.cat([value[:3].clamp(min=1e-4).log(), torch.logit(value[3:], eps=1e-4)]),
}
LINKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "none": lambda raw: raw,
    "surd": surd_probabilities,
}


@dataclass(frozen=True)
class Task:
    """`output`: the field of RedHeartOutput, or None where the answer is `module`'s reading; `link` makes it a prediction."""

    label: str
    module: str
    output: str | None
    loss: Loss
    link: Link
    kind: Literal["multilabel", "binary", "score"]  # which metrics and which baseline judge it
    weight: float = 1.0

    @property
    def final(self) -> bool:
        """Whether users see it; the others are what single modules say."""
        return self.output is not None and self.link != "density"

    def raw(self, outputs: RedHeartOutput) -> torch.Tensor | None:
        """What the loss takes, float32 (or float64), [B, size] for most; None where the module is left out."""
        own = (outputs.readings or {}).get(self.label, {})
        found = own.get(self.module) if self.output is None else outputs.get(self.output)
        return None if found is None else full_precision(found)

    def predict(self, outputs: RedHeartOutput) -> torch.Tensor | None:
        """In the label's units, [B, size]; None where the module is left out, and of a density, which is no value."""
        raw = self.raw(outputs) if self.link in LINKS else None
        return None if raw is None else LINKS[self.link](raw)

    def constant(self, target: torch.Tensor, weight: torch.Tensor, config: LossConfig) -> torch.Tensor:
        """The raw answer of the predictor with the least loss of all that always say the same, for labels and weights [N, size]."""
        if self.link == "density":
            levels = level_of(target, config.regret_edges) == torch.arange(LEVELS, device=target.device)
            share = (levels * weight).sum(0) / weight.sum().clamp(min=1e-12)
            return share.clamp(min=1e-6).log().expand(len(target), len(SUBSETS), -1)
        label, raw = LABELS[self.label], INVERSE[self.link]
        if self.link == "surd":  # its entries hang together, and the least squared error is the mean's
            total = weight.sum(0)
            best = torch.where(total > 0, (target * weight).sum(0) / total.clamp(min=1e-12), 0.5)
        else:
            loss = lambda x, t, w: self.loss(x, t, w, config)  # noqa: E731
            best = best_constant(loss, raw, target, weight, label.low, label.high).to(target.dtype)
        return raw(best).expand_as(target)


JUDGEMENTS: dict[str, tuple[Loss, Link, Literal["multilabel", "binary", "score"]]] = {  # by label
    "emotion": (lambda x, t, w, c: soft_focal(x, t, w, c.focal_gamma), "sigmoid", "multilabel"),
    "emotion_fine": (lambda x, t, w, c: soft_focal(x, t, w, c.focal_gamma), "sigmoid", "multilabel"),
    "vad": (lambda x, t, w, c: squared(torch.tanh(x), t, w), "tanh", "score"),
    "culture": (lambda x, t, w, c: cross_entropy(x, t, w), "sigmoid", "score"),
    "bentham": (lambda x, t, w, c: hedonic(x, t, w, c.extreme_penalty), "sigmoid", "score"),
    "preference": (lambda x, t, w, c: pair_logistic(x, t, w), "sigmoid", "binary"),
    "acceptability": (lambda x, t, w, c: cross_entropy(x, t, w), "sigmoid", "score"),
    "ethics": (lambda x, t, w, c: cross_entropy(x, t, w), "sigmoid", "score"),
    "regret": (lambda x, t, w, c: huber(torch.sigmoid(x), t, w, c.huber_delta), "sigmoid", "score"),
    "regret_views": (lambda x, t, w, c: huber(x, t, w, c.huber_delta), "none", "score"),
    "counterfactual": (lambda x, t, w, c: cross_entropy(x, t, w), "sigmoid", "score"),
    "surd": (lambda x, t, w, c: squared_shares(x, t, w), "surd", "score"),
}
OUTPUTS = {**ANSWERS, "preference": "utility_difference", "regret_views": "regret_views"}
TASKS: dict[str, Task] = {
    label: Task(label, "heads.regret" if label == "regret_views" else "aux.utility", OUTPUTS[label], *JUDGEMENTS[label])
    for label in LABELS
}
TASKS |= {
    f"{module}/{label}": Task(label, module, None, *JUDGEMENTS[label])
    for label, modules in {**FINAL, "preference": UTILITY}.items()
    for module in modules
}
TASKS["analyzers.surd/density"] = Task(
    "regret",
    "analyzers.surd",
    "density_logits",
    lambda x, t, w, c: density_cross_entropy(x, t, w, c.regret_edges),
    "density",
    "score",
)

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
GATES = ("expert_gate_logits", "theory_gate_logits")


def task_losses(
    outputs: RedHeartOutput, labels: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], config: LossConfig
) -> dict[str, SumCount]:
    """(sum, count) of every task and of the gates' regularisers (count: samples), for one micro-batch.

    Tasks and gates of modules that are left out are left out too.
    """
    losses = {}
    for name, task in TASKS.items():
        raw = task.raw(outputs)
        if raw is not None:
            losses[name] = task.loss(raw, labels[task.label], weights[task.label], config)
    for gate in GATES:
        if gate in outputs:
            logits = full_precision(outputs[gate])
            regulariser = config.balance * gate_balance(logits) + config.router_z * router_z(logits)
            losses[gate] = (regulariser.sum(), torch.tensor(float(len(logits))))
    return losses


def loss_counts(weights: Mapping[str, torch.Tensor], num_samples: int) -> dict[str, float]:
    """The counts of `task_losses`, from the labels alone: known before the forward pass."""
    by_label = {label: float(weights[label].sum()) for label in LABELS}
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
    for the SURD analyzer's density by its task."""
    known = {n: t for n, t in TASKS.items() if (n in LABELS or t.link == "density") and weights[t.label].sum() > 0}
    answers = {n: t.constant(labels[t.label], weights[t.label], config)[0] for n, t in known.items()}
    return {n: a[0] if TASKS[n].link == "density" else a for n, a in answers.items()}


def constant_losses(
    labels: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], config: LossConfig
) -> dict[str, float]:
    """Loss of the best constant predictor on labels[name] [N, size]: the scale each task is divided by.

    A task without any label gets 1.0 (its loss is 0 throughout), and so do the regularisers, which have no constant predictor.
    """
    scales = dict.fromkeys(GATES, 1.0)
    found: dict[tuple[str, Link], float] = {}  # modules that answer for one label have one loss
    for name, task in TASKS.items():
        key, target, weight = (task.label, task.link), labels[task.label], weights[task.label]
        if key not in found:
            found[key] = 1.0
            if weight.sum() > 0:
                value, count = task.loss(task.constant(target, weight, config), target, weight, config)
                found[key] = (value / count).item()
        scales[name] = found[key]
    return scales
