"""PARTS: one record per module of the network, and in it one per answer. All else derives from these: building, the forward pass,
losses, constant predictors, fusion, the selector and swap, ablation, growth, parameter counts, report and model card.

A new task is an `Answer` in the record of the part that is to give it, and its label in schema.LABELS. A new part is a `Part` and
the file of its module; where it stands among PARTS is its turn in the forward pass, so what it reads must stand before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from redheart.causality.levels import LEVELS
from redheart.config import LossConfig
from redheart.losses.bentham import hedonic_entries
from redheart.losses.emotion import focal_entries
from redheart.losses.regret import matching_huber_entries
from redheart.losses.surd import density_entries, surd_probabilities
from redheart.model.analyzers import (
    SUBSETS,
    VAD_SCALE,
    BenthamCalculator,
    EmotionAnalyzer,
    RegretAnalyzer,
    SurdAnalyzer,
)
from redheart.model.axes import Width
from redheart.model.dynamics import NUM, DspSimulator, KalmanFusion
from redheart.model.heads.bentham import BenthamHead
from redheart.model.heads.emotion import EmotionHead
from redheart.model.heads.regret import RegretHead, seen_by_observers
from redheart.model.heads.surd import SurdHead
from redheart.schema import TASKS4

Raw = torch.Tensor


class Sizes(NamedTuple):
    """What modules are built from; D and K of the shape legend are `width` and `task_width`."""

    width: Width
    heads: int
    task_width: Width
    task_heads: int
    num_experts: int
    dropout: float


class Link(NamedTuple):
    """How a raw answer becomes a prediction in the label's units, and the raw answer of who says a value (of any shape)."""

    predict: Callable[[Raw], torch.Tensor]
    inverse: Callable[[torch.Tensor], Raw]


SIGMOID = Link(torch.sigmoid, lambda value: torch.logit(value, eps=1e-4))
TANH = Link(torch.tanh, lambda value: torch.atanh(value.clamp(-0.999, 0.999)))
IDENTITY = Link(lambda raw: raw, lambda value: value)
SHARES = Link(  # [B, 4] for logits of three shares and of the leak
    surd_probabilities, lambda value: torch.cat([value[:3].clamp(min=1e-4).log(), torch.logit(value[3:], eps=1e-4)])
)

Entries = Callable[[Raw, torch.Tensor, LossConfig], torch.Tensor]


def focal(raw: Raw, target: torch.Tensor, config: LossConfig) -> torch.Tensor:
    return focal_entries(raw, target, config.focal_gamma)


def cross_entropy(raw: Raw, target: torch.Tensor, config: LossConfig) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(raw, target, reduction="none")


def hedonic(raw: Raw, target: torch.Tensor, config: LossConfig) -> torch.Tensor:
    return hedonic_entries(raw, target, config.extreme_penalty)


def squared_rating(raw: Raw, target: torch.Tensor, config: LossConfig) -> torch.Tensor:
    return nn.functional.mse_loss(torch.tanh(raw), target, reduction="none")


def huber_strength(raw: Raw, target: torch.Tensor, config: LossConfig) -> torch.Tensor:
    return matching_huber_entries(raw, target, config.huber_delta)


def huber(raw: Raw, target: torch.Tensor, config: LossConfig) -> torch.Tensor:
    return nn.functional.huber_loss(raw, target, reduction="none", delta=config.huber_delta)


def squared_shares(raw: Raw, target: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """[B, 4 · answers], side by side."""
    shares = surd_probabilities(raw.reshape(-1, 4)).view(raw.shape)
    return nn.functional.mse_loss(shares, target, reduction="none")


def density(raw: Raw, target: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """[B, subsets · levels] logits of the target's level, target [B, 1] -> [B, 1]."""
    return density_entries(raw.unflatten(-1, (len(SUBSETS), LEVELS)), target, config.regret_edges)


@dataclass(frozen=True)
class Judgement:
    """How an answer is judged: `entries` [B, n] of its loss from raw answers and targets [B, n], each for itself (or, of a simplex,
    each row of a label for itself); which link makes it a prediction (None: it is a density, no value); which metrics and which
    baseline judge it. `spread`: raw numbers per entry of the label. `calibrated`: what a line is fitted to on dev, the raw answer as
    the logit of a probability or the prediction in the label's units (None: its entries hang together; evaluation/calibration.py).
    `unit`: by about how much raw answers differ from text to text, from the best constant's loss; what the fusion adds to an answer
    counts in it, or its steps and its gradient would be too large."""

    entries: Entries
    link: Link | None
    kind: Literal["multilabel", "binary", "score"]
    spread: int = 1
    calibrated: Literal["logit", "units"] | None = None
    unit: Callable[[float], float] = lambda loss: 1.0


PRESENCES = Judgement(focal, SIGMOID, "multilabel", calibrated="logit")
PROBABILITIES = Judgement(cross_entropy, SIGMOID, "score", calibrated="logit")
PAIR = Judgement(
    cross_entropy, SIGMOID, "binary", calibrated="logit"
)  # -log σ(±(u(text) - u(contrast))): Bradley and Terry (1952)
RATINGS = Judgement(squared_rating, TANH, "score", calibrated="units", unit=math.sqrt)
HEDONIC = Judgement(hedonic, SIGMOID, "score", calibrated="units")
STRENGTH = Judgement(huber_strength, SIGMOID, "score", calibrated="units")
STRENGTHS = Judgement(huber, IDENTITY, "score", calibrated="units")
DECOMPOSITION = Judgement(squared_shares, SHARES, "score")
DENSITY = Judgement(density, None, "score", spread=len(SUBSETS) * LEVELS)


class Prior(NamedTuple):
    """The bias a fresh module starts with, from the raw answer of the best constant predictor (model/prior.py)."""

    bias: str
    value: Callable[[Raw], Raw] = lambda raw: raw


@dataclass(frozen=True)
class Answer:
    """What a part says of a label: `read` is the field of its reading, [B, size]; without one, a linear layer on its state is built.

    Answers of one label are fused into the final one, which is `output` of RedHeartOutput; one that is not `fused` stands there
    itself, as the final answer or, with a `name`, beside it. Of a `pair` label the reading is a utility, and the answer its
    difference between a text and its contrast.
    """

    label: str
    judged: Judgement
    read: str = ""
    output: str = ""
    fused: bool = True
    pair: bool = False
    name: str = ""
    prior: Prior | None = None
    weight: float = 1.0

    @property
    def output_name(self) -> str:
        return self.output or f"{self.label}_logits"


@dataclass(frozen=True)
class Part:
    """A module between backbone and fusion. `reads` names what its forward takes, in order: `tokens`, `mask` and `bias` (of
    attention), `pooled` (the tokens' mean), `task.NAME`, or PART.FIELD of a part before it (None where that is left out); dropout
    masks come last. It returns a NamedTuple whose `state` [B, state] the fusion sees.

    `contrasts`: it reads contrast texts too, and only of the backbone, without `pooled`.
    `latents`: field of its reading -> field of RedHeartOutput. `gate`: the latent whose
    use is kept even and small (losses/emotion.py).
    """

    name: str
    build: Callable[[Sizes], nn.Module]
    reads: tuple[str, ...]
    state: Callable[[Sizes], int]
    answers: tuple[Answer, ...] = ()
    contrasts: bool = False
    latents: Mapping[str, str] = field(default_factory=dict)
    gate: str = ""

    @property
    def feeds_on(self) -> tuple[str, ...]:
        """The parts whose readings it takes."""
        return tuple(name.rpartition(".")[0] for name in self.reads if name.count(".") == 2)


def of_task(sizes: Sizes) -> int:
    return sizes.task_width


def of_tokens(sizes: Sizes) -> int:
    return sizes.width


def of_emotions(sizes: Sizes) -> int:
    return 2 * NUM


# what the regret head adds while its outcomes are near zero
VIEWS = torch.logit(seen_by_observers(torch.zeros(3, 2))[2].mean())

PARTS: tuple[Part, ...] = (
    Part(
        "heads.emotion",
        lambda s: EmotionHead(s.task_width, s.task_heads, s.num_experts, s.dropout),
        ("task.emotion",),
        of_task,
        (  # emotions start at zero: the focal loss makes little of what is wrong at first
            Answer("emotion", PRESENCES, "emotion_logits"),
            Answer("emotion_fine", PRESENCES, "fine_logits", prior=Prior("fine.bias")),
            Answer("culture", PROBABILITIES, "culture_logits", prior=Prior("culture_out.bias")),
        ),
        latents={"gate_logits": "expert_gate_logits"},
        gate="expert_gate_logits",
    ),
    Part(
        "heads.bentham",
        lambda s: BenthamHead(s.task_width, s.task_heads, s.dropout),
        ("task.bentham",),
        of_task,
        (
            Answer("bentham", HEDONIC, "bentham_logits", prior=Prior("outputs.last.0.bias")),
            Answer("preference", PAIR, "utility", "utility_difference", pair=True),
            Answer("acceptability", PROBABILITIES, "acceptability_logits", prior=Prior("outputs.last.2.bias")),
            Answer("ethics", PROBABILITIES, "ethics_logits", prior=Prior("verdict.bias")),
        ),
        contrasts=True,
        latents={"gate_logits": "theory_gate_logits"},
        gate="theory_gate_logits",
    ),
    Part(
        "heads.regret",
        lambda s: RegretHead(s.task_width, s.task_heads, s.dropout),
        ("task.regret",),
        of_task,
        (
            Answer("regret", STRENGTH, "regret_logits", prior=Prior("regret.linears.2.bias", lambda raw: raw - VIEWS)),
            Answer("regret_views", STRENGTHS, "regret_views", "regret_views", fused=False),
        ),
    ),
    Part(
        "heads.surd",
        lambda s: SurdHead(s.task_width, s.task_heads, s.dropout),
        ("task.surd", "heads.emotion.state", "heads.bentham.state", "heads.regret.state"),
        of_task,
        (Answer("surd", DECOMPOSITION, "surd_logits"),),
    ),
    Part(
        "analyzers.emotion",
        lambda s: EmotionAnalyzer(s.width, s.heads, 5, s.dropout),
        ("tokens", "mask", "bias"),
        of_tokens,
        (
            Answer("emotion", PRESENCES, "emotion_logits"),
            Answer("emotion_fine", PRESENCES, "fine_logits", prior=Prior("fine.linears.1.bias")),
            Answer(
                "vad", RATINGS, "vad_raw", "vad_raw", prior=Prior("vad.linears.1.bias", lambda raw: raw / VAD_SCALE)
            ),
        ),
        latents={"trajectory": "trajectory"},
    ),
    Part(
        "analyzers.bentham",
        lambda s: BenthamCalculator(s.width, s.heads, 4, s.dropout),
        ("tokens", "bias"),
        of_tokens,
        (
            Answer("bentham", HEDONIC, "bentham_logits", prior=Prior("variables.linears.1.bias")),
            Answer("preference", PAIR, "utility", "utility_difference", pair=True),
            Answer("acceptability", PROBABILITIES, "acceptability_logits", prior=Prior("acceptability.linears.1.bias")),
        ),
        contrasts=True,
    ),
    Part(
        "analyzers.regret",
        lambda s: RegretAnalyzer(s.width, s.heads, 5, s.dropout),
        ("tokens", "bias"),
        of_tokens,
        (
            Answer("regret", STRENGTH, "regret_logits", prior=Prior("threshold", lambda raw: -raw)),
            Answer(
                "counterfactual", PROBABILITIES, "counterfactual_logits", prior=Prior("counterfactual.linears.1.bias")
            ),
        ),
    ),
    Part(
        "analyzers.surd",
        lambda s: SurdAnalyzer(s.width, s.dropout),
        ("analyzers.emotion.state", "analyzers.bentham.state", "pooled"),
        of_tokens,
        (
            Answer("surd", DECOMPOSITION, "surd_logits"),
            Answer(
                "regret",
                DENSITY,
                "density_logits",
                "density_logits",
                fused=False,
                name="density",
                prior=Prior("level.bias"),
            ),
        ),
    ),
    Part(
        "aux.dsp",
        lambda s: DspSimulator(s.width, s.task_width, s.dropout),
        ("tokens", "mask", "pooled", "task.emotion", "analyzers.emotion.trajectory"),
        of_emotions,
        latents={"signals": "signals"},
    ),
    Part(
        "aux.kalman",
        lambda s: KalmanFusion(s.width, s.task_width, s.dropout),
        (
            "tokens",
            "mask",
            "pooled",
            "task.emotion",
            "heads.emotion.emotion_logits",
            "analyzers.emotion.trajectory",
            "aux.dsp.signals",
        ),
        of_emotions,
        (Answer("emotion", PRESENCES, "emotion_logits"),),
        latents={"covariance": "emotion_covariance"},
    ),
)
USUAL_LOSSES = {"vad": VAD_SCALE**2}
BACKBONE, FUSION = "backbone", "aux.utility"
FUSION_LAYERS = 3
MODULES = (BACKBONE, *(part.name for part in PARTS), FUSION)


def sources(built: Any = MODULES) -> dict[str, list[str]]:
    """Fused label -> the modules that read it, of those that are `built`; none of a label whose modules are all left out."""
    labels: dict[str, list[str]] = {}
    for part in PARTS:
        for answer in part.answers:
            if answer.fused and not answer.pair:
                labels.setdefault(answer.label, []).extend([part.name] * (part.name in built))
    return labels


def units(losses: Mapping[str, float] | None = None) -> dict[str, float]:
    """Label -> the unit of its raw answers, of those that are fused; `losses`: of best constants, of labels that the data have."""
    losses = {**USUAL_LOSSES, **(losses or {})}
    fused = {answer.label: answer.judged for part in PARTS for answer in part.answers if answer.fused}
    return {label: judged.unit(losses.get(label, 1.0)) for label, judged in fused.items()}


def utilities(built: Any = MODULES) -> list[str]:
    """The modules that read a utility."""
    return [part.name for part in PARTS if part.name in built and any(a.pair for a in part.answers)]


def sizes_of(config: Any) -> Sizes:
    """Of a RedHeartConfig."""
    width, task_width = Width(config.width), Width(config.task_width)
    return Sizes(width, config.heads, task_width, config.task_heads, config.num_experts, config.dropout)


assert all(name.removeprefix("task.") in TASKS4 for part in PARTS for name in part.reads if name.startswith("task."))
