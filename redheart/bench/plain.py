"""The plain transformer that every part of the network is held against, and its training: nothing in it knows what its labels mean.

x = E→D linear + sinusoids;  3 × torch's TransformerEncoderLayer (pre-LN, GELU, 4·D);  LayerNorm;  attention pooling by one learned
query;  one linear layer to the raw answers of all tasks
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from redheart.config import RunConfig
from redheart.console import progress
from redheart.data.stream import SampleStream
from redheart.device import compute_device
from redheart.evaluation.evaluate import evaluate
from redheart.model.backbone import sinusoids
from redheart.model.outputs import ANSWER_FIELDS, RedHeartOutput
from redheart.model.padding import stacked
from redheart.schema import LABELS, MAX_POSITIONS, RedHeartError
from redheart.tasks import TASKS, task_weights
from redheart.train import stages

LAYERS, DROPOUT, DROPOUT_BEFORE_ANSWERS = 3, 0.2, 0.3
STEP = 8  # widths are multiples of it
HEAD_WIDTH = 32  # the least


class PlainTransformer(nn.Module):
    """Called as our network is (evaluate.forward), with the final raw answers of `labels` alone; E is `encoder_width`.

    Of a label whose answer is a difference (`preference`) the linear layer gives a utility, and the answer is the text's minus its
    contrast's; 0 where there is no contrast.
    """

    positions: torch.Tensor  # [MAX_POSITIONS, D]

    def __init__(self, encoder_width: int, width: int, labels: Sequence[str]):
        super().__init__()
        self.labels, self.sizes = tuple(labels), [LABELS[label].size for label in labels]
        heads = next(h for h in range(max(1, width // HEAD_WIDTH), 0, -1) if width % h == 0)
        self.input = nn.Linear(encoder_width, width)
        self.register_buffer("positions", sinusoids(MAX_POSITIONS, width), persistent=False)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, DROPOUT, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.zeros(width))  # the mean, at first
        self.dropout = nn.Dropout(DROPOUT_BEFORE_ANSWERS)
        self.answers = nn.Linear(width, sum(self.sizes))

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor,
        contrast_features: torch.Tensor,
        contrast_mask: torch.Tensor,
        contrast_rows: torch.Tensor,
        without: Collection[str] = (),
    ) -> RedHeartOutput:
        """Shapes as of schema.Batch. `without`: as of our network; here there are no modules to leave out."""
        assert not without, "a plain transformer has no modules that could be left out"
        texts = len(features)
        if len(contrast_rows):
            features, mask = stacked(features, contrast_features), stacked(mask, contrast_mask)
        raw, contrasts = self._read(features, mask).split([texts, len(contrast_rows)])
        given = dict(zip(self.labels, raw.split(self.sizes, 1), strict=True))
        for label, of_contrasts in zip(self.labels, contrasts.split(self.sizes, 1), strict=True):
            if TASKS[label].kind == "binary":
                difference = given[label].index_select(0, contrast_rows) - of_contrasts
                given[label] = torch.zeros_like(given[label]).index_copy(0, contrast_rows, difference)
        return RedHeartOutput(**{ANSWER_FIELDS[label]: answer for label, answer in given.items()})

    def _read(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[N, T, E] and [N, T] -> [N, answers]"""
        x = self.input(features) + self.positions[: features.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        x = self.norm(x)
        scores = (x @ self.query).masked_fill(~mask, -torch.inf)
        pooled = (scores.softmax(1)[..., None] * x).sum(1)
        return self.answers(self.dropout(pooled))


def num_parameters(encoder_width: int, width: int, labels: Sequence[str]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in PlainTransformer(encoder_width, width, labels).parameters())


def width_of_size(encoder_width: int, parameters: int, labels: Sequence[str]) -> int:
    """The width, a multiple of 8, whose network comes nearest to so many parameters."""
    widths = range(STEP, 1 << 16, STEP)
    above = bisect.bisect_left(widths, parameters, key=lambda width: num_parameters(encoder_width, width, labels))
    near = widths[max(0, above - 1) : above + 1]
    return min(near, key=lambda width: abs(num_parameters(encoder_width, width, labels) - parameters))


@dataclass(frozen=True)
class Best:
    """The lowest value of `training.best_metric` in a run, the weights that had it, and the dev loss at every look, by step."""

    value: float
    step: int
    weights: dict[str, torch.Tensor]
    curve: dict[int, float]


def train_control(
    network: PlainTransformer,
    streams: tuple[SampleStream, SampleStream],
    config: RunConfig,
    factors: Mapping[str, float],
    learning_rate: float,
    note: str = "control",
) -> Best:
    """`training.max_steps` steps of AdamW with torch's OneCycleLR on the batches that the product's trainer reads with the same
    configuration, its losses of the final answers by the same factors, and dev losses on the same rows at the same steps."""
    settings, device = config.training, compute_device()
    total = settings.max_steps
    assert total is not None
    micro, _ = stages.split_global_batch(settings.global_batch_size, settings.micro_batch_size, 1)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=config.optimizer.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total)
    best: Best | None = None
    curve: dict[int, float] = {}
    network.to(device).train()
    with progress(note, total) as (bar, task):
        for step in range(total):
            batches = streams[0].window(step, settings.seed, settings.global_batch_size, micro, 0, 1)
            window = stages.open_window(batches, stop=False)
            optimizer.zero_grad()
            for batch in (b.to(device, torch.float32) for b in window.batches):
                outputs = network(
                    batch.features, batch.mask, batch.contrast_features, batch.contrast_mask, batch.contrast_rows
                )
                count = window.num_micro_batches
                loss, _ = stages.compute(outputs, batch, window.counts, factors, count, config.loss)
                (loss / count).backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.max_grad_norm)
            if not norm.isfinite():
                raise RedHeartError(f"{note}: the gradient of step {step + 1} is not finite: lower --learning-rate")
            optimizer.step()
            schedule.step()
            if (step + 1) % settings.evaluate_every == 0 or step + 1 == total:
                rows = settings.evaluate_rows
                found = evaluate(network, streams[1], config.loss, factors, device, batch_size=micro, max_rows=rows)
                found.check_finite()
                value, curve[step + 1] = found.value(settings.best_metric, task_weights(config.loss)), found.total
                if best is None or value < best.value:
                    weights = {n: w.cpu() for n, w in copy.deepcopy(network.state_dict()).items()}
                    best = Best(value, step + 1, weights, curve)
                bar.update(task, note=f"dev {found.total:.4f}")
            bar.update(task, completed=step + 1)
    assert best is not None
    return best
