"""Synergy analysis (part of COMPUTE, every `training.synergy_every` steps): how the tasks pull on the backbone and inform regret.

To TensorBoard: synergy/cosine/A~B, the cosine between two tasks' gradients at the backbone's output (near 1: they want the same of
it; below 0: they are in conflict), and synergy/regret/KIND, SURD above chance of the recent predictions of regret given those of
emotion (valence), Bentham (net value) and acceptability. Few rows and a bare forward pass keep it cheap; parameters get no gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import torch

from redheart.causality.synergy import gradient_cosines, informing
from redheart.config import LossConfig
from redheart.model.redheart import RedHeartModel, RedHeartOutput
from redheart.schema import EMOTIONS, Batch
from redheart.tasks import TASKS, task_losses

ROWS = 4  # of a micro-batch, for the gradients
RECENT = 1024  # predictions that SURD looks at
LEAST = 128
NEGATIVE = [EMOTIONS.index(e) for e in ("sadness", "anger", "fear", "disgust")]


def predictions(outputs: RedHeartOutput) -> list[torch.Tensor]:
    """A micro-batch's predictions [B, 4] on their device (reading them would wait for it); nothing where an answer is missing."""
    found = [TASKS[name].predict(outputs) for name in ("regret", "emotion", "bentham", "acceptability")]
    known = [p.detach() for p in found if p is not None]
    if len(known) < len(found):
        return []
    regret, emotion, bentham, acceptability = known
    valence = emotion[:, EMOTIONS.index("joy")] - emotion[:, NEGATIVE].amax(-1)
    return [torch.stack([regret[:, 0], valence, bentham.mean(-1), acceptability[:, 0]], 1)]


class Synergy:
    """Remembers recent predictions; `remember` every step, `analyse` now and then."""

    def __init__(self, config: LossConfig):
        self._config = config
        self._recent: deque[torch.Tensor] = deque()  # [B, 4]: regret, emotion, bentham, acceptability

    def remember(self, said: Iterable[torch.Tensor]) -> None:
        """Keeps what `predictions` gave for the micro-batches of a step."""
        self._recent.extend(said)
        while self._recent and sum(map(len, self._recent)) - len(self._recent[0]) >= RECENT:
            self._recent.popleft()

    def analyse(self, model: RedHeartModel, batch: Batch, factors: Mapping[str, float]) -> dict[str, float]:
        """Tags and values. The model's mode is kept; nothing is added to any parameter's gradient."""
        values = {f"cosine/{a}~{b}": c for (a, b), c in self._cosines(model, batch, factors).items()}
        recent = torch.cat(list(self._recent))[-RECENT:].double().cpu() if self._recent else torch.empty(0, 4)
        recent = recent[recent.isfinite().all(1)]  # of a step that the guard has skipped and counted
        if len(recent) >= LEAST:
            regret, emotion, bentham, acceptability = recent.T
            agents = {"emotion": emotion, "bentham": bentham, "acceptability": acceptability}
            told = informing("regret", regret, agents, repeats=8)
            values |= {f"regret/{kind}_share": v for kind, v in told.shares().items()}
            values |= {"regret/bits": told.mutual_information, "regret/leak": told.leak}
        return values

    def _cosines(
        self, model: RedHeartModel, batch: Batch, factors: Mapping[str, float]
    ) -> dict[tuple[str, str], float]:
        rows = slice(0, ROWS)
        mask = batch.mask[rows]
        features = batch.features[rows, : int(mask.sum(1).max())]
        mask = mask[:, : features.shape[1]]
        was_training = model.training
        model.eval()
        with torch.no_grad():
            tokens, tasks = model.backbone(features, mask, None)
        leaves = [tokens.requires_grad_(), tasks.requires_grad_()]
        outputs = model.answer(tokens, tasks, mask)
        labels = {n: v[rows] for n, v in batch.labels.items()}
        weights = {n: v[rows] for n, v in batch.weights.items()}
        losses = task_losses(outputs, labels, weights, self._config)
        model.train(was_training)
        gradients = {}
        for name, task in TASKS.items():
            if task.final and name != "preference" and name in losses and float(losses[name][1]) > 0:
                found = torch.autograd.grad(
                    factors[name] * losses[name][0], leaves, retain_graph=True, allow_unused=True
                )
                parts = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
                gradients[name] = torch.cat([p.flatten().float() for p in parts])
        finite = {name: g for name, g in gradients.items() if g.isfinite().all()}  # the guard names the others
        return gradient_cosines(finite)
