"""Synergy analysis (part of COMPUTE, every `training.synergy_every` steps): how the tasks pull on the backbone and inform regret.

To TensorBoard, under 3_synergy: cosine/A~B, the cosine between two tasks' gradients at the backbone's output (near 1: they want the same of
it; below 0: they are in conflict), over the first rows of every rank's first micro-batch, and regret/KIND, SURD above
chance of the recent predictions of regret given those of emotion (valence), Bentham (net value) and acceptability. Few rows and
passes of the bare model keep it cheap; parameters get no gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import torch

from redheart.causality.synergy import gradient_cosines, informing
from redheart.config import LossConfig
from redheart.evaluation.trained import LabelWeights, trained_entries
from redheart.model.layers import attention_bias
from redheart.model.redheart import RedHeartModel, RedHeartOutput
from redheart.ranks import sum_over_ranks
from redheart.schema import EMOTIONS, Batch
from redheart.tasks import TASKS, task_losses
from redheart.train.engine import Engine

COMPARED = [name for name, task in TASKS.items() if task.final and name != "preference"]  # the last is of two texts
ROWS = 4  # of a micro-batch, for the gradients
RECENT = 1024  # predictions that SURD looks at
LEAST = 128
AGENTS = ("emotion", "bentham", "acceptability")
SAID = ("regret", *AGENTS)
NEGATIVE = [EMOTIONS.index(e) for e in ("sadness", "anger", "fear", "disgust")]


def predictions(outputs: RedHeartOutput) -> list[torch.Tensor]:
    """A micro-batch's predictions [B, 4] on their device (reading them would wait for it); nothing where an answer is missing."""
    found = [TASKS[name].predict(outputs) for name in SAID]
    known = [p.detach() for p in found if p is not None]
    if len(known) < len(found):
        return []
    regret, emotion, bentham, acceptability = known
    valence = emotion[:, EMOTIONS.index("joy")] - torch.stack([emotion[:, i] for i in NEGATIVE], -1).amax(-1)
    return [torch.stack([regret[:, 0], valence, bentham.mean(-1), acceptability[:, 0]], 1)]


class Synergy:
    """Remembers recent predictions; `remember` every step, `analyse` now and then."""

    def __init__(self, config: LossConfig, labels: LabelWeights | None = None):
        """`labels`: what trains the answers; those that nothing, or not all of whose entries anything trains, inform nobody."""
        self._config = config
        trained = trained_entries(labels, config) if labels else {}
        self._left_out = {name for name, entries in trained.items() if not all(entries)}
        self._recent: deque[torch.Tensor] = deque()  # [B, 4]: regret, emotion, bentham, acceptability

    def remember(self, said: Iterable[torch.Tensor]) -> None:
        """Keeps what `predictions` gave for the micro-batches of a step."""
        self._recent.extend(said)
        while self._recent and sum(map(len, self._recent)) - len(self._recent[0]) >= RECENT:
            self._recent.popleft()

    def analyse(self, engine: Engine, batch: Batch, factors: Mapping[str, float]) -> dict[str, float]:
        """Tags and values; `batch` is this rank's, on the engine's device. Collective.

        Nothing of it stays: no parameter gets a gradient, the model keeps its mode, ZeRO-3 its partitions.
        """
        with engine.aside():
            mine = self._products(engine.model, batch, factors)
        products = torch.tensor(sum_over_ranks(mine.flatten().tolist()), dtype=torch.float64).view_as(mine)
        finite = [i for i in range(len(COMPARED)) if products[i, i].isfinite()]  # the guard names the others
        cosines = gradient_cosines([COMPARED[i] for i in finite], products[finite][:, finite])
        values = {f"cosine/{a}~{b}": c for (a, b), c in cosines.items()}
        recent = torch.cat(list(self._recent))[-RECENT:].double().cpu() if self._recent else torch.empty(0, 4)
        recent = recent[recent.isfinite().all(1)]  # of a step that the guard has skipped and counted
        said = dict(zip(SAID, recent.T, strict=True))
        agents = {name: said[name] for name in AGENTS if name not in self._left_out}
        if len(recent) >= LEAST and len(agents) > 1 and "regret" not in self._left_out:
            told = informing("regret", said["regret"], agents, repeats=8)
            values |= {f"regret/{kind}_share": v for kind, v in told.shares().items()}
            values |= {"regret/bits": told.mutual_information, "regret/leak": told.leak}
        return values

    def _products(self, model: RedHeartModel, batch: Batch, factors: Mapping[str, float]) -> torch.Tensor:
        """Inner products [N, N] of the gradients of COMPARED over this rank's rows, float64; 0 for a task without labels there.

        Rows know nothing of one another. So a row is copied for every task, the loss of a copy is that task's alone, and one
        backward pass gives the gradients of many tasks. Every rank makes as many passes, over the same modules, whatever its
        labels are: under ZeRO-3 a pass gathers parameters from all ranks, once on its way forward and once on its way back.
        """
        size = len(batch)
        if model.backbone.layers.gradient_checkpointing:
            # nothing is recomputed here: a row takes up to four times what it takes in training
            size = max(1, size // 4)
        mask = batch.mask[:ROWS]
        features = batch.features[:ROWS, : int(mask.sum(1).max())]
        mask = mask[:, : features.shape[1]]
        task, row = torch.cartesian_prod(torch.arange(len(COMPARED)), torch.arange(len(mask))).to(mask.device).T
        was_training = model.training
        model.eval()
        with torch.no_grad():
            read = model.backbone(features, attention_bias(mask, features.dtype), None)
        found = []
        for tasks, rows in zip(task.split(size), row.split(size), strict=True):
            leaves = [x[rows].requires_grad_() for x in read]  # tokens, task features
            outputs = model.answer(leaves[0], leaves[1], mask[rows])
            labels = {n: v[rows] for n, v in batch.labels.items()}
            mine = {n: tasks == COMPARED.index(n) for n in COMPARED}
            weights = {n: v[rows] * mine[n][:, None] if n in mine else v[rows] for n, v in batch.weights.items()}
            losses = task_losses(outputs, labels, weights, self._config)
            loss = torch.stack([factors[n] * losses[n][0] for n in COMPARED if n in losses]).sum()
            parts = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            found.append(torch.cat([p.flatten(1).double() for p in parts], 1))
        model.train(was_training)
        gradients = torch.cat(found).view(len(COMPARED), -1)
        return gradients @ gradients.T
