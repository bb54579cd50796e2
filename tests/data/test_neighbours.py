"""Near-duplicates: the search equals brute force, what leaks is dropped and nothing else, the data without it can be read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redheart.config import DataConfig, LabelerConfig
from redheart.data import neighbours
from redheart.data.dedup import dedup
from redheart.data.neighbours import ROOT, VARIABLE, interpreter, near_leaks, search
from redheart.data.prepare import prepare
from redheart.data.shards import SplitsWriter, open_shard
from redheart.data.store import Store
from redheart.data.stream import SampleStream
from redheart.schema import SPLITS, RedHeartError
from tests.data.shard_data import MAX_TOKENS, make_row, write_index
from tests.data.shard_data import WIDTH as ROW_WIDTH
from tests.runs import redheart

needs_faiss = pytest.mark.skipif(
    not os.environ.get(VARIABLE) and not (ROOT / "red_heart_retrieval_env" / ".complete").is_file(),
    reason="no environment with FAISS: run launch/setup_env.sh --retrieval",
)
WIDTH = 24


def brute_force(
    vectors: np.ndarray, split: np.ndarray, row: np.ndarray, threshold: float
) -> dict[tuple[int, int], float]:
    """{(text, number of the search): similarity to its nearest}, by the whole similarity matrix in float64."""
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    cosine[row[:, None] == row] = -2
    found = {}
    for number, (asking, indexed) in enumerate([(0, (1, 2)), (1, (2,)), (0, (0,)), (1, (1,)), (2, (2,))]):
        for text in np.flatnonzero(split == asking):
            best = cosine[text, np.isin(split, indexed)].max(initial=-2)
            if best >= threshold:
                found[int(text), number] = best
    return found


def clustered(count: int, centres: int, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    around = rng.normal(size=(centres, WIDTH))
    return (around[rng.integers(0, centres, count)] + noise * rng.normal(size=(count, WIDTH))).astype(np.float32)


def which_search(one: int, other: int) -> int:
    return {(0, 1): 0, (0, 2): 0, (1, 2): 1, (0, 0): 2, (1, 1): 3, (2, 2): 4}[one, other]


@needs_faiss
def test_the_search_equals_brute_force(tmp_path: Path):
    rng = np.random.default_rng(1)
    vectors = clustered(900, 300, 0.25) * rng.uniform(0.1, 9, (900, 1)).astype(np.float32)  # lengths may not matter
    split = rng.choice(3, 900, p=[0.6, 0.2, 0.2]).astype(np.int8)
    row = np.arange(900)
    mates = np.flatnonzero(split == 0)[:200].reshape(-1, 2)  # rows with a contrast: both texts are of one row
    row[mates[:, 1]] = row[mates[:, 0]]
    vectors[mates[:, 1]] = vectors[mates[:, 0]]  # and, here, alike: their own row hides no other
    a, b, similarity, exact = search(vectors, split, row, 0.9, tmp_path)
    expected = brute_force(vectors, split, row, 0.9)
    found = {(int(i), which_search(split[i], split[j])): float(s) for i, j, s in zip(a, b, similarity, strict=True)}
    assert len(found) == len(a) > 300
    assert found.keys() == expected.keys()
    assert all(found[k] == pytest.approx(expected[k], abs=1e-5) for k in found)
    assert np.all(row[a] != row[b])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.allclose((unit[a] * unit[b]).sum(1), similarity, atol=1e-5)
    assert all(exact.values())
    assert len(exact) == 5
    assert not list(tmp_path.iterdir())


@needs_faiss
def test_inverted_lists_find_nearly_all_that_brute_force_finds(tmp_path: Path):
    vectors = clustered(6000, 2000, 0.15)
    split = np.random.default_rng(2).choice(3, 6000, p=[0.8, 0.1, 0.1]).astype(np.int8)
    row = np.arange(6000)
    a, b, similarity, exact = search(vectors, split, row, 0.95, tmp_path, ivf_above=1000)
    assert not exact["train against dev and test"]
    assert not exact["within train"]
    assert exact["dev against test"]
    expected = brute_force(vectors, split, row, 0.95)
    found = {(int(i), which_search(split[i], split[j])) for i, j in zip(a, b, strict=True)}
    assert found <= expected.keys()
    assert len(found) >= 0.99 * len(expected) > 1000
    assert np.all(similarity >= 0.95)


def record(number: int, split: str, text: str, contrast: str | None = None, source: str = "s") -> dict[str, Any]:
    return {"id": f"r{number}", "source": source, "split": split, "text": text, "contrast_text": contrast}


def far_apart(count: int) -> np.ndarray:
    return np.eye(count, 64, dtype=np.float32)


@needs_faiss
def test_what_is_near_a_judging_row_is_dropped_and_test_is_never_touched(tmp_path: Path):
    records = [
        record(0, "train", "like dev"),
        record(1, "train", "alone"),
        record(2, "train", "pair", "like test, as a contrast"),
        record(3, "train", "twin"),
        record(4, "train", "twin's near copy"),
        record(5, "dev", "a dev text", source="t"),
        record(6, "dev", "like another test", source="t"),
        record(7, "test", "a test text"),
        record(8, "test", "another test text", "and its own contrast"),
        record(9, "test", "a test twin"),
        record(10, "dev", "dev alone"),
        record(11, "train", "close, but not close enough"),
    ]
    pooled, contrasts = far_apart(12), far_apart(14)[12:]
    pooled[5], pooled[6], pooled[9] = pooled[0], pooled[8], pooled[7]
    pooled[4] = pooled[3] + 0.1 * pooled[1]
    contrasts[0] = pooled[7]
    pooled[11] = pooled[10] + 0.4 * pooled[11]  # cosine 0.93
    leaks = near_leaks(records, pooled, contrasts, 0.95, tmp_path)
    assert leaks.dropped == {"r0", "r2", "r6"}
    assert leaks.report["dropped"] == {"s": {"train": 2, "dev": 0}, "t": {"train": 0, "dev": 1}}
    assert (leaks.report["identical"], leaks.report["near"]) == (0, 3)
    assert leaks.report["within"] == {"train": 2, "dev": 0, "test": 2}
    assert {e["against"] for e in leaks.report["examples"]} == {"dev", "test"}
    assert near_leaks(records, pooled, contrasts, 0.9, tmp_path).dropped == {"r0", "r2", "r6", "r11"}
    kept = [i for i, r in enumerate(records) if r["id"] not in leaks.dropped]
    again = near_leaks([records[i] for i in kept], pooled[kept], contrasts[1:], 0.95, tmp_path)
    assert not again.dropped


def test_identical_texts_are_duplicates_whatever_the_vectors_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), {}
    monkeypatch.setattr(neighbours, "search", lambda *a: nothing)
    records = [
        record(0, "train", "Thank  YOU\tall!"),
        record(1, "train", "Thank you all"),
        record(2, "train", "first", "STRASSE"),
        record(3, "train", "the same", "the same"),  # a row is no duplicate of itself
        record(4, "train", "first"),
        record(5, "dev", "thank you all!"),
        record(6, "test", "straße"),
        record(7, "dev", "a test text"),
        record(8, "test", "x", "A test text"),
        record(9, "dev", "a dev text"),
    ]
    leaks = near_leaks(records, far_apart(10), far_apart(3), 0.95, tmp_path)
    assert leaks.dropped == {"r0", "r2", "r7"}
    assert (leaks.report["identical"], leaks.report["near"]) == (3, 0)
    assert leaks.report["within"] == {"train": 2, "dev": 0, "test": 0}
    assert "3 (3 identical, 0 near)" in neighbours.describe(leaks.report)
    with pytest.raises(RedHeartError, match="all 1 rows of train repeat dev or test"):
        near_leaks([records[0], records[5], records[6]], far_apart(3), far_apart(0), 0.95, tmp_path)


def test_the_command_s_refusal_names_its_own_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), {}
    monkeypatch.setattr(neighbours, "search", lambda *a: nothing)
    writer, rng = SplitsWriter(tmp_path, ROW_WIDTH, MAX_TOKENS), np.random.default_rng(0)
    for number, split in enumerate(("train", "dev")):  # of one text
        writer.write(f"{split}-00000.arrow", [{**make_row(number + 1, rng), "split": split}], 1)
    write_index(tmp_path, writer.finish(), {"name": "random", "width": ROW_WIDTH})
    with pytest.raises(RedHeartError, match=r"all 1 rows of train repeat dev or test rows.*: raise --threshold, or"):
        dedup(tmp_path)


def test_without_faiss_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "/nowhere/python")
    with pytest.raises(RedHeartError, match=r"/nowhere/python is not a program: .*setup_env\.sh --retrieval"):
        interpreter()
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(neighbours, "ROOT", tmp_path)
    with pytest.raises(
        RedHeartError, match=r"setup_env\.sh --retrieval in a checkout, pip install .redheart\[retrieval\]., or set"
    ):
        interpreter()
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "setup_env.sh"
    script.write_text("echo no index is reachable >&2\nexit 1\n")
    with pytest.raises(RedHeartError, match=r"could not be made .no index is reachable"):
        interpreter()
    script.write_text('[ "$1" = --retrieval ] || exit 3\n')
    assert interpreter() == str(tmp_path / "red_heart_retrieval_env" / "bin" / "python")


def test_a_failing_worker_ends_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho ModuleNotFoundError: no faiss >&2\nexit 9\n")
    fake.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(fake))
    vectors, zeros = far_apart(2), np.zeros(2, np.int8)
    with pytest.raises(RedHeartError, match=r"exit code 9.*no faiss"):
        search(vectors, zeros, np.arange(2), 0.95, tmp_path / "work")


@needs_faiss
def test_vectors_that_are_not_finite_are_an_error(tmp_path: Path):
    vectors = far_apart(3)
    vectors[1, 1] = np.nan
    with pytest.raises(RedHeartError, match="not finite"):
        search(vectors, np.array([0, 1, 2], np.int8), np.arange(3), 0.95, tmp_path)


TOPICS = [f"The {a} {b} near the {c}." for a in ("old", "green", "loud") for b in ("dog sleeps", "car waits", "bell rings")
          for c in ("river", "school", "harbour")]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"text": t, "split": "train", "regret": i / 40} for i, t in enumerate(TOPICS[:9])]
    rows[3] |= {"contrast_text": "Nothing ever happened to my uncle in Vienna.", "preference": 1}
    rows += [
        {"text": "My little sister won the big race on Sunday!", "split": "train", "regret": 0.5},
        {"text": "She returned the lost wallet to its owner.", "split": "dev", "regret": 0.1},
        {"text": "my little sister won the big race on sunday!", "split": "dev", "regret": 0.5},
        {"text": "Nothing ever happened to my uncle in vienna", "split": "test", "regret": 0.2},
        {"text": "He forgot to lock the front door again.", "split": "test", "regret": 0.7},
    ]
    path = tmp_path_factory.mktemp("source") / "own.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return f"own={path}"


CONFIG = DataConfig(labeler=LabelerConfig(max_texts=0), rows_per_shard=5)


def ids_of(directory: Path) -> dict[str, set[str]]:
    store = Store(directory)
    width = store.index["encoder"]["width"]
    return {s: {i for e in store.shards(s) for i in open_shard(store.fetch(e), width).ids} for s in SPLITS}


@pytest.fixture(scope="module")
def plain(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "data"
    assert prepare([source], out, CONFIG).duplicates == {}
    return out


@needs_faiss
def test_a_prepared_directory_is_written_anew_without_what_leaks(plain: Path, tmp_path: Path):
    told = dedup(plain)
    assert told.rows == {}
    assert told.duplicates["dropped"] == {"own": {"train": 2, "dev": 0}}
    assert (told.duplicates["identical"], told.duplicates["near"]) == (1, 1)
    out = tmp_path / "clean"
    written = dedup(plain, out)
    assert written.duplicates == told.duplicates
    assert written.rows == {"train": 8, "dev": 2, "test": 2}
    before, after = ids_of(plain), ids_of(out)
    assert after["train"] < before["train"]
    assert (after["dev"], after["test"]) == (before["dev"], before["test"])
    index, old = Store(out).index, Store(plain).index
    assert index["plan"] != old["plan"]
    assert index["report"]["duplicates"] == written.duplicates
    for split in SPLITS:
        entries = index["splits"][split]["shards"]
        assert index["splits"][split]["rows"] == sum(e["rows"] for e in entries) == written.rows[split]
        assert index["splits"][split]["tokens"] == sum(e["tokens"] for e in entries)
    regret = index["splits"]["train"]["histograms"]["regret"][0]
    assert sum(weight for _, weight in regret) == pytest.approx(8)
    assert old["report"]["labels"]["regret"]["human"] - index["report"]["labels"]["regret"]["human"] == 2
    assert {i for b in SampleStream(out, "train").micro_batches(0, 0, 8, 8, 0, 1) for i in b.ids} == after["train"]
    assert dedup(out).duplicates["dropped"] == {}
    assert [p.name for p in tmp_path.iterdir()] == ["clean"]
    assert "2 train and dev rows" in (out / "README.md").read_text()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for there in (out, tmp_path / "link"):
        with pytest.raises(RedHeartError, match="is there already"):
            dedup(plain, there)
    with pytest.raises(RedHeartError, match=r"--threshold 1\.5"):
        dedup(plain, threshold=1.5)


@needs_faiss
def test_prepare_leaves_out_the_same_rows_and_goes_on_after_a_failure(
    source: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted = CONFIG.model_copy(update={"dedup": True})
    out = tmp_path / "out"
    with monkeypatch.context() as broken:
        broken.setenv(VARIABLE, "/nowhere/python")
        with pytest.raises(RedHeartError, match="/nowhere/python"):
            prepare([source], out, wanted)
    assert not (out / "index.json").exists()
    with pytest.raises(RedHeartError, match="other sources, models or settings"):
        prepare([source], out, CONFIG)
    report = prepare([source], out, wanted)
    assert report.rows == {"train": 8, "dev": 2, "test": 2}
    assert report.duplicates == dedup(plain).duplicates
    clean = tmp_path / "clean"
    dedup(plain, clean)
    assert ids_of(out) == ids_of(clean)
    assert prepare([source], out, wanted).reused
    assert prepare([source], out, wanted).duplicates == report.duplicates
    other = wanted.model_copy(update={"dedup_threshold": 0.99})
    with pytest.raises(RedHeartError, match="other sources, models or settings"):
        prepare([source], out, other)
    assert prepare(
        [source], plain, CONFIG.model_copy(update={"dedup_threshold": 0.99})
    ).reused  # not used: no other plan


@needs_faiss
def test_the_commands_print_their_reports(plain: Path, tmp_path: Path):
    done = redheart("dedup", "--data", plain, "--threshold", "0.999", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["duplicates"]["identical"], told["duplicates"]["near"]) == (1, 0)
    assert "1 (1 identical, 0 near)" in done.stderr
    assert "redheart prepare" in redheart("dedup", "--data", tmp_path).stderr
