"""Records, order, shards and derived labels: what is written is what is read, each sample once, mistakes named."""

import json
from pathlib import Path

import numpy as np
import pytest

from redheart.data.derive import surd_labels
from redheart.data.order import global_batch, rank_slice
from redheart.data.prepare import take
from redheart.data.shards import INDEX, write_shard
from redheart.data.sources import everyday
from redheart.data.sources.records import InvalidRecord, parse_record, read_records
from redheart.data.stream import SampleStream
from redheart.schema import LABELS, RedHeartError


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
        ({"split": "valid"}, "'valid' is none of"),
        ({"mood": 1}, "unknown field 'mood'"),
        ({"content": "again"}, "keep one"),
        ({"label_origin": "me"}, "label_origin"),
    ],
)
def test_what_breaks_the_schema_is_named(fields: dict, words: str):
    with pytest.raises(InvalidRecord, match=words) as error:
        parsed(**fields)
    assert "record 3" in str(error.value)


def test_the_shipped_corpus_keeps_its_promises():
    records = [parse_record(raw, str(n), "everyday") for n, raw in read_records(everyday.path(), "everyday")]
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


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 10_000])
def test_taking_a_few_records_keeps_the_splits(n: int):
    records = [{"split": s} for s in ["train"] * 258 + ["dev"] * 51 + ["test"] * 51]
    taken = [r["split"] for r in take(records, n)]
    assert len(taken) == min(n, 360)
    assert "train" in taken
    if n >= 3:
        assert {"dev", "test"} <= set(taken)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_each_epoch_is_every_row_once_for_any_number_of_ranks(rows: int):
    index = {"splits": {"train": {"rows": rows}}}
    steps = [global_batch(index, 5, s, 12) for s in range(3 * rows)]
    flat = np.concatenate(steps)
    for epoch in range(12 * 3):
        assert sorted(flat[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    for world in (1, 2, 3, 4):
        assert np.array_equal(np.concatenate([rank_slice(steps[1], r, world) for r in range(world)]), steps[1])
    if rows == 64:
        assert not np.array_equal(flat[:64], flat[64:128])
        assert not np.array_equal(steps[0], global_batch(index, 6, 0, 12))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Twenty rows in two shards, features of random length, every third with a contrast."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(20):
        row = dict.fromkeys(LABELS)
        contrast = rng.normal(size=(2, 8)).astype(np.float16) if i % 3 == 0 else None
        row |= {"id": str(i), "source": "s", "split": "train", "lang": "en", "text": "t", "contrast_text": None}
        row |= {"features": rng.normal(size=(3 + i % 5, 8)).astype(np.float16), "contrast_features": contrast}
        row |= {"emotion": [0.25, None, 0.5, 0, 0, 1, 0.75], "regret": i / 20}
        row |= {"label_weight": {"emotion": 1.0, "regret": 0.5}, "label_origin": {"emotion": "author", "regret": "llm"}}
        rows.append(row)
    shards = [
        write_shard(tmp_path / f"train-{k:05d}.parquet", part, 8) for k, part in enumerate((rows[:12], rows[12:]))
    ]
    index = {"version": 1, "splits": {"train": {"rows": 20, "shards": shards}}, "encoder": {"width": 8}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    np.savez(tmp_path / "truth.npz", **{f"t{i}": r["features"] for i, r in enumerate(rows)})
    return tmp_path


def test_rows_come_back_as_they_were_written(directory: Path):
    stream, truth = SampleStream(directory, "train"), np.load(directory / "truth.npz")
    rows = stream.rows(np.array([17, 3, 4]))
    for row, number in zip(rows, (17, 3, 4)):
        assert row["id"] == str(number)
        assert np.array_equal(row["features"], truth[f"t{number}"])
        assert (row["contrast_features"] is None) == (number % 3 != 0)
        assert row["emotion"] == [0.25, None, 0.5, 0, 0, 1, 0.75]
        assert row["vad"] is None


def test_micro_batches_mask_what_has_no_label_and_pad_with_zeros(directory: Path):
    stream = SampleStream(directory, "train")
    batches = list(stream.micro_batches(step=3, seed=1, global_batch_size=8, micro_batch_size=3, rank=1, world_size=2))
    ids = [i for b in batches for i in b.ids]
    assert [int(i) for i in ids] == rank_slice(global_batch(stream.index, 1, 3, 8), 1, 2).tolist()
    assert [len(b) for b in batches] == [3, 1]
    batch = batches[0]
    assert batch.weights["emotion"][0].tolist() == [1, 0, 1, 1, 1, 1, 1]
    assert batch.labels["emotion"][0, 1] == 0
    assert batch.weights["regret"][0].tolist() == [0.5]
    assert batch.weights["vad"].sum() == 0
    assert (batch.features[~batch.mask] == 0).all()
    assert batch.keys.tolist() == [28, 29, 30]
    assert [int(batch.ids[r]) % 3 for r in batch.contrast_rows] == [0] * len(batch.contrast_rows)


@pytest.mark.parametrize("harm", ["flip", "remove", "version", "index"])
def test_a_damaged_directory_is_named(directory: Path, harm: str):
    shard = directory / "train-00001.parquet"
    if harm == "flip":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    elif harm == "remove":
        shard.unlink()
    else:
        (directory / INDEX).write_text("{" if harm == "index" else '{"version": 99}')
    with pytest.raises(
        RedHeartError, match={"flip": "train-00001.parquet is damaged", "remove": "missing"}.get(harm, INDEX)
    ):
        SampleStream(directory, "train")


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
