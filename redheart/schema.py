"""The words of the project: labels with their order, ranges and units; what a batch holds; the one error for users.

Shape legend, used in every room:
    B samples of a micro-batch     C of them that have a contrast text      T tokens, padded to the longest
    E width of the frozen encoder  D width of the backbone                  K width of a task's feature
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class RedHeartError(Exception):
    """Something the user can mend. The message names the thing and the remedy, and is printed without a traceback."""


class PassingError(RedHeartError):
    """One that may be over when the same command runs again: a lost rank, a store that does not answer."""


@dataclass(frozen=True)
class Label:
    """One label of a sample (docs: DESIGN §3). `names` gives its entries in order; a scalar has one entry."""

    names: tuple[str, ...]
    low: float
    high: float
    scalar: bool = False
    binary: bool = False  # only the two ends of the range are legal
    simplex: int = 0  # the first `simplex` entries sum to one

    @property
    def size(self) -> int:
        return len(self.names)


EMOTIONS = ("joy", "sadness", "anger", "fear", "surprise", "disgust", "neutral")
EMOTIONS_FINE = (
    *("admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire"),
    *("disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief", "joy"),
    *("love", "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness", "surprise"),
    "neutral",
)
CULTURE = ("jeong", "han", "chemyeon")
CULTURE_HANGUL = {"jeong": "정", "han": "한", "chemyeon": "체면"}
BENTHAM = ("intensity", "duration", "certainty", "propinquity", "fecundity", "purity", "extent")
ETHICS = ("utilitarian", "deontological", "virtue", "justice")
REGRET_VIEWS = ("optimistic", "neutral", "pessimistic")
SURD = ("redundant", "unique", "synergistic", "leak")

LABELS: dict[str, Label] = {
    "emotion": Label(EMOTIONS, 0.0, 1.0),
    "emotion_fine": Label(EMOTIONS_FINE, 0.0, 1.0),
    "vad": Label(("valence", "arousal", "dominance"), -1.0, 1.0),
    "culture": Label(CULTURE, 0.0, 1.0),
    "bentham": Label(BENTHAM, 0.0, 1.0),
    "preference": Label(("preference",), 0.0, 1.0, scalar=True, binary=True),
    "ethics": Label(ETHICS, 0.0, 1.0),
    "acceptability": Label(("acceptability",), 0.0, 1.0, scalar=True),
    "regret": Label(("regret",), 0.0, 1.0, scalar=True),
    "regret_views": Label(REGRET_VIEWS, 0.0, 1.0),
    "counterfactual": Label(("counterfactual",), 0.0, 1.0, scalar=True, binary=True),
    "surd": Label(SURD, 0.0, 1.0, simplex=3),
}
LABEL_COLUMNS: dict[str, slice] = {}  # where each label stands when all are written side by side
_end = 0
for _name, _label in LABELS.items():
    LABEL_COLUMNS[_name] = slice(_end, _end + _label.size)
    _end += _label.size
NUM_LABEL_COLUMNS = _end

ORIGINS = ("human", "author", "llm", "derived")
JUDGED_ORIGINS = ("human", "author")  # labels that may judge the model; the others only help to train
SPLITS = ("train", "dev", "test")


# of multilingual-e5-small, by its model card; Korean first, which texts without a language are taken to be
_OTHERS = """en af am ar as az be bg bn br bs ca cs cy da de el eo es et eu fa fi fr fy ga gd gl gu ha he hi hr hu hy id is it ja jv ka
kk km kn ku ky la lo lt lv mg mk ml mn mr ms my ne nl no om or pa pl ps pt ro ru sa sd si sk sl so sq sr su sv sw ta te th tl tr ug uk ur
uz vi xh yi zh"""
E5_LANGUAGES = ("ko", *_OTHERS.split())


class Packaged(NamedTuple):
    """An encoder that comes as Python packages: the width of its states, the hidden layers that dev splits chose of it, its weights'
    licence, the languages it reads."""

    width: int
    layers: tuple[int, ...]
    licence: str
    languages: tuple[str, ...] = ("en",)


PACKAGED = {  # found by data/pretrained.py
    "package:minilm": Packaged(384, (4, 6), "Apache-2.0"),
    "package:smollm2": Packaged(576, (20,), "Apache-2.0"),
    "package:mpnet": Packaged(768, (6, 9), "Apache-2.0"),
    "package:e5-small-ko": Packaged(384, (8, 12), "MIT", E5_LANGUAGES),
}
GOOD_LAYERS = ", ".join(f"{name} {list(packaged.layers)}" for name, packaged in PACKAGED.items())

MAX_POSITIONS = 512  # most tokens of a text

TASKS4 = ("emotion", "bentham", "regret", "surd")  # the backbone makes one feature for each


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `features` are token states of the frozen encoder, zero where `mask` is False.

    labels[name] and weights[name] are float32 [B, size]; a weight of 0 marks an entry without a label, whose value in
    `labels` is 0 and never enters a loss. `keys` identify the samples' positions in the run, for dropout. Features stay
    float16, as they are stored, until `to` makes them what the model computes in.
    """

    features: torch.Tensor  # [B, T, E]
    mask: torch.Tensor  # [B, T] bool, True where there is a token
    contrast_features: torch.Tensor  # [C, T', E]; C may be 0
    contrast_mask: torch.Tensor  # [C, T'] bool
    contrast_rows: torch.Tensor  # [C] int64, the row of the batch each contrast belongs to
    labels: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    keys: torch.Tensor  # [B] int64
    origins: torch.Tensor  # [B, number of labels] int8: a place in ORIGINS, -1 where there is no label
    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.features.shape[0]

    def side_by_side(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and weights, [B, NUM_LABEL_COLUMNS] each, in the order of LABEL_COLUMNS."""
        import torch

        return torch.cat(list(self.labels.values()), 1), torch.cat(list(self.weights.values()), 1)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """A copy on `device`; the encoder's features become `dtype`, labels stay float32. Nothing waits for a GPU."""
        on_gpu = str(device).startswith("cuda")
        sizes = [label.size for label in LABELS.values()]

        def move(x: torch.Tensor) -> torch.Tensor:
            # out of page-locked memory, which alone is copied beside the host's work
            return x.pin_memory().to(device, non_blocking=True) if on_gpu and not x.is_cuda else x.to(device)

        labels, weights = (dict(zip(LABELS, move(x).split(sizes, 1), strict=True)) for x in self.side_by_side())
        rest = [f.name for f in fields(self) if f.name not in ("labels", "weights", "ids")]
        tensors: dict[str, Any] = {name: move(getattr(self, name)) for name in rest}
        for name in ("features", "contrast_features"):  # over the bus in 16 bits, then converted
            tensors[name] = tensors[name].to(dtype)
        return replace(self, **tensors, labels=labels, weights=weights)
