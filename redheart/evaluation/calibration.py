"""Calibration: two numbers per entry of every final answer, fitted on dev, that make it a probability, or a value without bias.

Answers that are probabilities (parts.Judgement.calibrated = "logit"): σ(scale · logit + offset), of maximum likelihood (Platt 1999,
with his targets for small samples and the line search of Lin, Lin and Weng 2007). Of a pair the scale alone: swapping the sides
mirrors the answer. Ratings and strengths ("units"): scale · value + offset of least squares, clipped to the label's range. A scale is
positive, so that nothing changes its rank. The decision threshold of each entry of a multilabel answer is that of the highest F1
of its calibrated probability on dev. Labels of people alone, with their label weights.

Isotonic regression on the same dev rows was worse in each of three seeds (tests/benchmarks/isotonic.py).

A calibration belongs to one network: it carries the digest of the weights that gave the answers, and of the dev rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redheart.console import progress
from redheart.data.stream import SampleStream
from redheart.evaluation.answers import Answers, collect, thresholds
from redheart.evaluation.evaluate import forward
from redheart.files import read_sealed_json, write_sealed_json
from redheart.model.outputs import RedHeartOutput
from redheart.model.redheart import RedHeartModel
from redheart.schema import LABELS, Batch, RedHeartError
from redheart.tasks import TASKS

CALIBRATION = "calibration.json"
MIN_ROWS = 50  # an entry with fewer labelled dev rows stays as it is
MIN_SCALE = 0.01  # of a probability that follows its labels no more than chance does
REMEDY = "fit it again with `redheart calibrate`, or remove it"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Line(_Record):
    """One entry's map, scale · x + offset. `threshold` None: dev has too few labels or no positive one, and the entry is never
    chosen. `as_is`: why the entry stays as it is (scale 1, offset 0); empty where it was fitted."""

    scale: float = Field(1.0, gt=0)
    offset: float = 0.0
    threshold: float | None = None
    rows: int = Field(ge=0)  # with a label on dev
    as_is: str = ""


class Calibration(_Record):
    """The lines of every final answer that people labelled on dev, by task, in the order of its label's entries."""

    version: Literal[1] = 1
    weights: str  # weights_digest
    step: int
    dev: str  # dev_digest
    dev_rows: int
    answers: dict[str, tuple[Line, ...]]

    def apply(self, name: str, score: torch.Tensor) -> torch.Tensor:
        """Scores [B, size] of an answer (`scores`) -> what it says calibrated, in the label's units, float64 [B, size]."""
        lines = self.answers.get(name)
        return apply(name, lines, score) if lines else as_is(name, score).double()

    def thresholds(self, name: str) -> list[float | None]:
        """Of the calibrated answer, by entry; empty where nobody labelled it on dev."""
        return [line.threshold for line in self.answers.get(name, ())]

    def left_as_is(self) -> dict[str, str]:
        """Entries (`regret`, `culture.han`) that stay as the network gives them, and why; answers without a label on dev too."""
        left = {name: "no label of people on dev" for name in CALIBRATED if name not in self.answers}
        for name, lines in self.answers.items():
            label = LABELS[TASKS[name].label]
            shown = [name] if label.scalar else [f"{name}.{entry}" for entry in label.names]
            left |= {entry: line.as_is for entry, line in zip(shown, lines, strict=True) if line.as_is}
        return left


CALIBRATED = tuple(name for name, task in TASKS.items() if task.final and task.judged.calibrated)


def scores(outputs: RedHeartOutput) -> dict[str, torch.Tensor]:
    """By task what calibration starts from, [B, size] on the CPU: logits of probabilities, other answers in the label's units."""
    found = {}
    for name in CALIBRATED:
        task = TASKS[name]
        score = task.raw(outputs) if task.judged.calibrated == "logit" else task.predict(outputs)
        if score is not None:
            found[name] = score.cpu()
    return found


def as_is(name: str, score: torch.Tensor) -> torch.Tensor:
    """Scores of an answer -> what the network says, in the label's units."""
    return score.sigmoid() if TASKS[name].judged.calibrated == "logit" else score


def score_split(
    model: RedHeartModel, stream: SampleStream, device: torch.device | str = "cpu", batch_size: int = 128
) -> dict[str, Answers]:
    """The network's scores by task, with the labels of people, on a split. No collective."""

    with progress(f"answers on {stream.split}", stream.num_rows) as (bar, task):

        def of_batch(batch: Batch) -> dict[str, torch.Tensor]:
            bar.update(task, advance=len(batch))
            return scores(forward(model, batch.to(device, torch.float32)))

        return collect(of_batch, stream, batch_size=batch_size)


def fit(scored: Mapping[str, Answers]) -> dict[str, tuple[Line, ...]]:
    """The lines of every answer from its scores on dev."""
    return {name: fit_answer(name, answers) for name, answers in scored.items()}


def fit_answer(name: str, dev: Answers) -> tuple[Line, ...]:
    lines = tuple(
        _fit_entry(name, *(x[known].astype(float) for x in entry))
        for *entry, known in zip(dev.prediction.T, dev.target.T, dev.weight.T, dev.known.T, strict=True)
    )
    if TASKS[name].kind != "multilabel":
        return lines
    cut = thresholds(with_lines(name, lines, dev))
    positive = ((dev.target > 0.5) & dev.known).any(0)
    return tuple(
        line.model_copy(update={"threshold": float(c)}) if line.rows >= MIN_ROWS and some else line
        for line, c, some in zip(lines, cut, positive, strict=True)
    )


def _fit_entry(name: str, score: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Line:
    task, rows = TASKS[name], len(score)
    pair = task.kind == "binary"
    if rows < MIN_ROWS:
        return Line(rows=rows, as_is=f"{rows} labelled dev rows, fewer than {MIN_ROWS}")
    if target.min() == target.max() and not pair:  # those of a pair, read either way round, never are
        return Line(rows=rows, as_is="all labels on dev are alike")
    if score.min() == score.max() and not (pair and score.any()):
        return Line(rows=rows, as_is="all answers on dev are alike")
    if task.judged.calibrated == "logit":
        scale, offset = platt(score, target, weight, pair)
        return Line(scale=scale, offset=offset, rows=rows)
    scale, offset, error = least_squares(score, target, weight)
    if scale <= 2 * error:
        return Line(rows=rows, as_is="dev cannot tell that it follows its labels")
    return Line(scale=scale, offset=offset, rows=rows)


def platt(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, pair: bool = False) -> tuple[float, float]:
    """(scale, offset) of σ(scale · logit + offset) for targets in [0, 1], all [n]; the scale at least MIN_SCALE.

    The two classes' targets are Platt's, (N₊ + 1) / (N₊ + 2) and 1 / (N₋ + 2), with N the classes' weights: the fit is finite where
    they are separable. `pair`: no offset, and both classes weigh the same, so that mirrored rows give the same scale.
    """
    total = weights.sum()
    positive = total / 2 if pair else (weights * targets).sum()
    low, high = 1 / (total - positive + 2), (positive + 1) / (positive + 2)
    smooth = low + (high - low) * targets
    spread = np.abs(logits).max()  # for the conditioning of the Hessian alone
    columns = [logits / spread] if pair else [logits / spread, np.ones_like(logits)]
    scale, *offset = _logistic(np.stack(columns, 1), smooth, weights, np.zeros_like(logits))
    if scale / spread >= MIN_SCALE:
        return float(scale / spread), float(sum(offset))
    rest = np.zeros(0) if pair else _logistic(np.ones((len(logits), 1)), smooth, weights, MIN_SCALE * logits)
    return MIN_SCALE, float(sum(rest))


def _logistic(x: np.ndarray, target: np.ndarray, weight: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Coefficients [k] of σ(base + x · c) of the least cross-entropy, by Newton's method with a line search from 0."""

    def loss(c: np.ndarray) -> float:
        logit = base + x @ c
        return float((weight * (np.logaddexp(0.0, logit) - target * logit)).sum())

    found = np.zeros(x.shape[1])
    value = loss(found)
    for _ in range(100):
        p = torch.from_numpy(base + x @ found).sigmoid().numpy()
        gradient = x.T @ (weight * (p - target))
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        gain, length = float(gradient @ step), 1.0
        if gain <= 1e-14 * abs(value):
            break
        while (new := loss(found - length * step)) > value - 1e-4 * length * gain and length > 1e-10:
            length /= 2
        if new >= value:
            break
        found, value = found - length * step, new
    return found


def least_squares(x: np.ndarray, target: np.ndarray, weight: np.ndarray) -> tuple[float, float, float]:
    """(scale, offset, standard error of the scale) of scale · x + offset, all [n], weighted."""
    share = weight / weight.sum()
    mean_x, mean_t = share @ x, share @ target
    variance = share @ (x - mean_x) ** 2
    scale = (share @ ((x - mean_x) * (target - mean_t))) / variance
    residual = share @ (target - mean_t - scale * (x - mean_x)) ** 2
    return float(scale), float(mean_t - scale * mean_x), float(np.sqrt(residual / (variance * (len(x) - 2))))


def apply(name: str, lines: tuple[Line, ...], score: torch.Tensor) -> torch.Tensor:
    """Scores [B, size] -> calibrated, in the label's units, float64 [B, size]."""
    scale, offset = (torch.tensor([getattr(x, k) for x in lines], dtype=torch.float64) for k in ("scale", "offset"))
    moved, label = score.double() * scale + offset, LABELS[TASKS[name].label]
    moved = moved.sigmoid() if TASKS[name].judged.calibrated == "logit" else moved.clamp(label.low, label.high)
    return torch.where(torch.tensor([bool(x.as_is) for x in lines]), as_is(name, score).double(), moved)


def uncalibrated(name: str, scored: Answers) -> Answers:
    """What the network says, in the label's units."""
    return replace(scored, prediction=as_is(name, torch.from_numpy(scored.prediction)).numpy())


def with_lines(name: str, lines: tuple[Line, ...], scored: Answers) -> Answers:
    """The same answers, calibrated."""
    return replace(scored, prediction=apply(name, lines, torch.from_numpy(scored.prediction)).numpy())


def crossed(name: str, dev: Answers) -> Answers:
    """Calibrated answers of the rows that a calibration is fitted on: of either half by the lines of the other (answers.cuts)."""
    assert dev.halves is not None
    first = dev.halves == 0
    if first.all() or not first.any():
        return with_lines(name, fit_answer(name, dev.rows(np.zeros_like(first))), dev)
    sides = [with_lines(name, fit_answer(name, dev.rows(other)), dev).prediction for other in (~first, first)]
    return replace(dev, prediction=np.where(first[:, None], *sides))


def weights_digest(model: RedHeartModel) -> str:
    """Hex sha256 of every tensor's name, type, shape and bytes: the same of a checkpoint and of its export."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def dev_digest(dev: SampleStream) -> str:
    """Hex sha256 of which rows a split holds, features and labels: its shards' own sha256."""
    shards = [[entry["sha256"], entry["rows"]] for entry in dev.store.shards(dev.split)]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def write(calibration: Calibration, directory: Path) -> Path:
    path = directory / CALIBRATION
    write_sealed_json(path, calibration.model_dump(mode="json"))
    return path


def read(directory: Path) -> Calibration | None:
    """The calibration beside weights; None where there is none. RedHeartError where it is damaged or of another version."""
    path = directory / CALIBRATION
    if not path.exists():
        return None
    try:
        found = Calibration.model_validate(read_sealed_json(path, REMEDY))
    except ValidationError as error:
        first = error.errors()[0]
        raise RedHeartError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}: {REMEDY}") from None
    for name, lines in found.answers.items():
        if name not in CALIBRATED or len(lines) != LABELS[TASKS[name].label].size:
            raise RedHeartError(f"{path}: answers.{name} is no answer of this version's network: {REMEDY}")
    return found


def check_belongs(calibration: Calibration, model: RedHeartModel, directory: Path) -> None:
    """Raises RedHeartError unless `model` has the weights that a calibration was fitted to."""
    if calibration.weights != weights_digest(model):
        raise RedHeartError(
            f"{directory / CALIBRATION} belongs to other weights (of step {calibration.step}) than those beside it: {REMEDY}"
        )
