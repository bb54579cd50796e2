"""The words of the project: their number and order are a contract with every prepared data set and every checkpoint."""

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from redheart.schema import (
    BENTHAM,
    CULTURE,
    CULTURE_HANGUL,
    EMOTIONS,
    EMOTIONS_FINE,
    ETHICS,
    LABELS,
    REGRET_VIEWS,
    SURD,
    Batch,
)
from tests.corpora import corpus


def a_batch() -> Batch:
    labels = {name: torch.rand(2, label.size) for name, label in LABELS.items()}
    return Batch(
        features=torch.rand(2, 3, 4),
        mask=torch.ones(2, 3, dtype=torch.bool),
        contrast_features=torch.rand(1, 2, 4),
        contrast_mask=torch.ones(1, 2, dtype=torch.bool),
        contrast_rows=torch.tensor([1]),
        labels=labels,
        weights={name: torch.ones_like(value) for name, value in labels.items()},
        keys=torch.tensor([5, 6]),
        origins=torch.zeros(2, len(labels), dtype=torch.int8),
        ids=("a", "b"),
    )


def test_every_label_has_the_size_of_the_design():
    assert {name: label.size for name, label in LABELS.items()} == {
        "emotion": 7,
        "emotion_fine": 28,
        "vad": 3,
        "culture": 3,
        "bentham": 7,
        "preference": 1,
        "ethics": 4,
        "acceptability": 1,
        "regret": 1,
        "regret_views": 3,
        "counterfactual": 1,
        "surd": 4,
    }


def test_scalars_are_the_labels_of_one_entry():
    assert all(label.scalar == (label.size == 1) for label in LABELS.values())


def test_the_order_of_the_entries_stays_put():
    assert EMOTIONS == ("joy", "sadness", "anger", "fear", "surprise", "disgust", "neutral")
    assert CULTURE == ("jeong", "han", "chemyeon")
    assert BENTHAM == ("intensity", "duration", "certainty", "propinquity", "fecundity", "purity", "extent")
    assert ETHICS == ("utilitarian", "deontological", "virtue", "justice")
    assert REGRET_VIEWS == ("optimistic", "neutral", "pessimistic")
    assert SURD == ("redundant", "unique", "synergistic", "leak")
    assert LABELS["vad"].names == ("valence", "arousal", "dominance")


def test_goemotions_come_in_the_order_of_that_corpus():
    """Alphabetical with neutral last, as in emotions.txt of Demszky et al. (2020)."""
    assert len(EMOTIONS_FINE) == len(set(EMOTIONS_FINE)) == 28
    assert (*sorted(EMOTIONS_FINE[:-1]), "neutral") == EMOTIONS_FINE


def test_the_fine_emotions_are_those_of_the_published_corpus():
    listed = corpus("goemotions") / "original" / "labels.txt"
    assert tuple(listed.read_text(encoding="utf-8").split()) == EMOTIONS_FINE


def test_ranges_are_those_of_the_design():
    assert {n: (x.low, x.high) for n, x in LABELS.items() if (x.low, x.high) != (0, 1)} == {"vad": (-1, 1)}
    assert {n for n, label in LABELS.items() if label.binary} == {"preference", "counterfactual"}
    assert {n: label.simplex for n, label in LABELS.items() if label.simplex} == {"surd": 3}


def test_every_cultural_word_has_its_hangul():
    assert set(CULTURE_HANGUL) == set(CULTURE)
    assert all("가" <= c <= "힣" for word in CULTURE_HANGUL.values() for c in word)


def test_the_length_of_a_batch_is_its_number_of_samples():
    assert len(a_batch()) == 2


def test_moving_a_batch_casts_the_features_alone():
    batch = a_batch()
    moved = batch.to("cpu", torch.float64)
    for field in fields(Batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if field.name in ("features", "contrast_features"):
            assert after.dtype == torch.float64
            assert torch.equal(after, before.double())
        elif isinstance(before, dict):
            assert after.keys() == before.keys()
            assert all(after[n].dtype == torch.float32 and torch.equal(after[n], before[n]) for n in before)
        elif isinstance(before, torch.Tensor):
            assert after.dtype == before.dtype
            assert torch.equal(after, before)
        else:
            assert after == before


def test_moving_a_batch_takes_every_tensor_along():
    moved = a_batch().to("meta", torch.bfloat16)
    tensors = [getattr(moved, f.name) for f in fields(Batch) if f.name != "ids"]
    flat = [t for value in tensors for t in (value.values() if isinstance(value, dict) else [value])]
    assert {t.device.type for t in flat} == {"meta"}


def test_a_batch_is_frozen():
    with pytest.raises(FrozenInstanceError):
        a_batch().ids = ()
