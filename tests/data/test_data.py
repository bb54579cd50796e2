"""Records, order, shards and derived labels: what is written is what is read, each sample once, mistakes named."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from redheart.causality.levels import level_edges, level_of
from redheart.causality.surd import joint_pmf, surd
from redheart.config import DataConfig, LabelerConfig
from redheart.data.derive import net_value, surd_labels, training_edges, valence
from redheart.data.gather import take
from redheart.data.prepare import prepare
from redheart.data.sources import everyday
from redheart.data.sources.records import InvalidRecord, parse_record, read_records
from redheart.schema import LABELS
from tests.data import situations


def parsed(**fields: object) -> dict:
    return parse_record({"text": "A text.", **fields}, "f: record 3", "s")


def test_a_record_is_read_as_documented():
    record = parse_record({"content": " A text. ", "label": "joy", "vad": {"arousal": -0.5}}, "", "s")
    assert record["text"] == "A text."
    assert record["emotion"] == [1.0, 0, 0, 0, 0, 0, 0]
    assert record["vad"] == [None, -0.5, None]
    assert record["label_origin"]["vad"] == "human"
    assert record["label_origin"]["regret"] is None
    assert parsed() == parsed()
    assert parsed()["id"] != parse_record({"text": "A text."}, "", "other")["id"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": ""}, "field text"),
        ({"text": "x" * 100_000}, "100000 characters"),
        ({"regret": "much"}, "field regret: 'much' is not a number"),
        ({"regret": True}, "not a number"),
        ({"regret": float("nan")}, "not a number"),
        ({"regret": -0.1}, "between 0 and 1"),
        ({"emotion": [0.1] * 6}, "list of 7 numbers"),
        ({"emotion": "bliss"}, "'bliss' is none of"),
        ({"culture": [0.1, 2, 0]}, r"culture\[1\]"),
        ({"preference": 1}, "contrast_text is missing"),
        ({"preference": 0.5, "contrast_text": "b"}, "0 or 1"),
        ({"surd": [0.5, 0.5, 0.5, 0.1]}, "must sum to 1"),
        ({"split": "held out"}, "'held out' is none of train, dev, test"),
        ({"split": ""}, "'' is none of"),
        ({"split": 1}, "1 is none of"),
        ({"mood": 1}, "unknown field 'mood'"),
        ({"content": "again"}, "keep one"),
        ({"label_origin": "me"}, "label_origin"),
    ],
)
def test_what_breaks_the_schema_is_named(fields: dict, words: str):
    with pytest.raises(InvalidRecord, match=words) as error:
        parsed(**fields)
    assert "record 3" in str(error.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("validation", "dev"), ("Val", "dev"), ("valid", "dev"), ("training", "train"), ("TEST", "test")],
)
def test_a_split_may_have_the_name_that_others_give_it(written: str, meant: str):
    assert parsed(split=written)["split"] == meant


def test_the_shipped_corpus_keeps_its_promises():
    by_hand = everyday.folder() / "everyday.json"
    records = [parse_record(raw, str(n), "everyday") for n, raw in read_records(by_hand, "everyday")]
    assert len(records) >= 320
    assert len({r["id"] for r in records}) == len(records)
    pairs = [r for r in records if r["contrast_text"] is not None]
    assert len(pairs) >= 60
    assert 0.4 < np.mean([r["preference"] for r in pairs]) < 0.6
    assert {r["split"] for r in records} == {"train", "dev", "test"}
    for record in records:
        assert record["bentham"] is None
        for name in ("emotion", "culture", "regret", "acceptability"):
            assert record["label_origin"][name] == "author"
    strongest = np.bincount([int(np.argmax(r["emotion"])) for r in records], minlength=7) / len(records)
    assert strongest.min() > 0.05
    assert all(sum(r["culture"][k] >= 0.6 for r in records) >= 20 for k in range(3))


def test_texts_by_rule_are_what_their_script_writes_and_share_nothing_over_the_splits():
    corpus = everyday.folder()
    assert (corpus / "situations.json").read_text(encoding="utf-8") == situations.content()
    records = [parse_record(raw, place, "everyday") for place, raw in everyday.read(corpus)]
    assert len({r["id"] for r in records}) == len(records)
    count = Counter(r["split"] for r in records)
    assert count["dev"] >= 200
    assert count["test"] >= 200
    made = records[360:]
    assert all(
        r[name] is not None for r in made for name in LABELS if name not in ("emotion_fine", "surd", "preference")
    )
    assert all(r["label_origin"]["regret"] == "author" for r in made)
    sentences: dict[str, set[str]] = {}
    for r in made:
        alike = re.sub(r"\b(her|his|my|she|he|i)\b", "_", f"{r['text']} {r['contrast_text'] or ''}".lower())
        sentences.setdefault(r["split"], set()).update(x for x in re.split(r"\. ?", alike) if x)
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not sentences[one] & sentences[other]
    pairs = [r["preference"] for r in made if r["preference"] is not None]
    assert len(pairs) > 500
    assert 0.45 < np.mean(pairs) < 0.55
    for split in ("dev", "test"):  # enough of every kind to judge by
        rows = [r for r in made if r["split"] == split]
        assert min(sum(r["emotion"][k] > 0.5 for r in rows) for k in range(7)) >= 5
        assert min(sum(r["regret"] > 0.5 for r in rows), sum(r["counterfactual"] for r in rows)) >= 20


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 10_000])
def test_taking_a_few_records_keeps_the_splits(n: int):
    records = [{"id": str(i), "split": s} for i, s in enumerate(["train"] * 258 + ["dev"] * 51 + ["test"] * 51)]
    taken = [r["split"] for r in take(records, n)]
    assert len(taken) == min(n, 360)
    assert "train" in taken
    if n >= 3:
        assert {"dev", "test"} <= set(taken)


def test_derived_labels_are_shares_from_the_training_split_alone():
    rng = np.random.default_rng(0)
    records = [
        {
            "split": "train" if i < 80 else "dev",
            "regret": rng.random(),
            "emotion": rng.random(7).tolist(),
            "bentham": rng.random(7).tolist(),
        }
        for i in range(100)
    ]
    records[5]["bentham"] = None
    pooled = rng.normal(size=(100, 4)).astype(np.float32)
    labels = surd_labels(records, pooled)
    assert labels[5] is None
    known = [v for v in labels if v is not None and v[0] is not None]
    assert len(known) > 50
    for *shares, leak in known:
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= 0
        assert 0 <= leak < 1
    records[90]["regret"] = 0.123  # a dev row may change nothing but its own label
    assert surd_labels(records, pooled)[:90] == labels[:90]


def made(share: float, sources: str, rows: int = 4000) -> tuple[list[dict], np.ndarray]:
    """Records with a yes-or-no regret of which `sources` tell everything, `share` of it yes; the rest is noise."""
    rng = np.random.default_rng(0)
    regret = (rng.permutation(rows) < round(share * rows)).astype(float)
    emotion, bentham = rng.random((rows, 7)), rng.random((rows, 7))
    coin = rng.integers(0, 2, rows)
    said = {"copy": regret, "synergy": coin, "both": regret, "nothing": None}[sources]
    if said is not None:
        emotion[:] = said[:, None] * (np.arange(7) == 1)
    if sources in ("synergy", "both"):
        bentham[:] = np.where(sources == "both", regret, (coin + regret) % 2)[:, None]
    splits = np.where(np.arange(rows) % 5 == 0, "dev", "train")
    columns = zip(splits.tolist(), regret.tolist(), emotion.tolist(), bentham.tolist(), strict=True)
    keys = ("split", "regret", "emotion", "bentham")
    return [dict(zip(keys, row, strict=True)) for row in columns], rng.normal(size=(rows, 4)).astype(np.float32)


@pytest.mark.parametrize("share", [0.015, 0.2, 0.4])
@pytest.mark.parametrize(("sources", "kind"), [("copy", 1), ("both", 0), ("synergy", 2), ("nothing", None)])
def test_a_rare_regret_has_labels_that_tell_what_is_so(share: float, sources: str, kind: int | None):
    """The kind of what is known to be told, and the leak; where nothing is told, the leak is the other answer's frequency."""
    records, pooled = made(share, sources)
    pairs = list(zip(records, surd_labels(records, pooled), strict=True))
    assert all(label or r["split"] == "dev" for r, label in pairs)  # what training never saw has none
    records, labels = zip(*(pair for pair in pairs if pair[1]), strict=True)
    leak = np.array([label[3] for label in labels])
    yes = np.array([r["regret"] for r in records]) == 1
    if kind is None:
        assert leak[yes].mean() == pytest.approx(1 - share, abs=0.05)
        assert leak[~yes].mean() == pytest.approx(share, abs=0.05)
        return
    assert leak == pytest.approx(0, abs=1e-12)
    shares = np.array([label[:3] for label in labels], dtype=float)
    assert shares.sum(1) == pytest.approx(1)
    assert shares[yes][:, kind].mean() > 0.85
    columns = torch.tensor([[r["regret"], valence(r["emotion"]), net_value(r["bentham"])] for r in records]).T
    told = surd(joint_pmf(torch.stack([level_of(c, level_edges(c)) for c in columns]), [3, 3, 3]))
    bits = [sum(t.values()) for t in (told.redundant, told.unique, told.synergistic)]
    assert bits[kind] / told.mutual_information > 0.85


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_regret_that_never_varies_has_no_label(share: float):
    assert set(surd_labels(*made(share, "nothing"))) == {None}


def test_edges_come_from_training_records_alone():
    records, _ = made(0.2, "copy")
    edges = training_edges(records)
    assert (edges["regret"], edges["valence"]) == ([0.5], [-0.5])
    for record in records:
        if record["split"] == "dev":
            record["regret"] = 0.75
    assert training_edges(records) == edges


def test_datasets_does_not_take_one_directory_for_another_of_the_same_name(tmp_path: Path):
    from datasets import load_dataset

    for place, text in (("a", "It rained."), ("b", "It snowed.")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.json").write_text(json.dumps([{"text": text, "split": "train"}]))
        out = tmp_path / place / "out"
        prepare([f"x={tmp_path / place / 'x.json'}"], out, DataConfig(labeler=LabelerConfig(max_texts=0)))
        assert load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))["text"][:] == [text]
