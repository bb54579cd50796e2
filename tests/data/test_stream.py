"""Shards: what is written is what is read, from a directory or over HTTP; damage is named; a bad network is tried again."""

import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch

from redheart.config import RemoteConfig
from redheart.data.order import global_batch, rank_slice
from redheart.data.shards import INDEX
from redheart.data.stream import SampleStream
from redheart.files import read_sealed_json, write_sealed_json
from redheart.schema import LABEL_COLUMNS, NUM_LABEL_COLUMNS, RedHeartError
from tests.data.shard_data import write_directory


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    directory = tmp_path_factory.mktemp("shards")
    return directory, write_directory(directory, [30, 20, 14])


def test_rows_come_back_as_they_were_written(truth: tuple[Path, list[dict]]):
    directory, rows = truth
    stream = SampleStream(directory, "train")
    for row in stream.rows(np.arange(64)):
        written = rows[int(row["id"])]
        assert np.array_equal(row["features"], written["features"])
        if int(row["id"]) % 3:
            assert row["contrast_features"] is None
        else:
            assert np.array_equal(row["contrast_features"], written["contrast_features"])
        assert row["emotion"] == written["emotion"]
        assert row["vad"] is None
        assert row["label_origin"]["regret"] == "llm"


def test_batches_mask_what_has_no_label_and_pad_with_zeros(truth: tuple[Path, list[dict]]):
    directory, rows = truth
    stream = SampleStream(directory, "train")
    batches = list(stream.micro_batches(step=3, seed=1, global_batch_size=8, micro_batch_size=3, rank=1, world_size=2))
    ids = [i for b in batches for i in b.ids]
    wanted = stream.rows(rank_slice(global_batch(stream.index, 1, 3, 8), 1, 2))
    assert ids == [r["id"] for r in wanted]
    assert [len(b) for b in batches] == [3, 1]
    batch = batches[0]
    assert batch.keys.tolist() == [28, 29, 30]
    for i, name in enumerate(batch.ids):
        row = rows[int(name)]
        assert batch.mask[i].sum() == len(row["features"])
        assert np.array_equal(batch.features[i][batch.mask[i]].numpy(), row["features"])
        assert batch.weights["emotion"][i].tolist() == [1, 0, 1, 1, 1, 1, 1]
        assert batch.labels["emotion"][i].tolist() == [0.25, 0, 0.5, 0, 0, 1, 0.75]
        assert batch.labels["regret"][i].item() == pytest.approx(row["regret"])
        assert batch.weights["regret"][i].tolist() == [0.5]
    assert batch.weights["vad"].sum() == 0
    assert batch.origins[:, 0].tolist() == [1] * 3
    assert (batch.features[~batch.mask] == 0).all()
    assert [int(batch.ids[r]) % 3 for r in batch.contrast_rows] == [0] * len(batch.contrast_rows)
    assert batch.to("cpu", torch.bfloat16).features.dtype == torch.bfloat16


def test_a_large_micro_batch_regroups_a_step_but_never_changes_it(truth: tuple[Path, list[dict]]):
    stream = SampleStream(truth[0], "train")
    pairs = {}
    for micro in (1, 4, 64):
        batches = list(stream.micro_batches(2, 0, 64, micro, 0, 1))
        pairs[micro] = {(i, k) for b in batches for i, k in zip(b.ids, b.keys.tolist(), strict=True)}
    assert pairs[1] == pairs[4] == pairs[64]
    assert len(pairs[1]) == 64


def test_the_next_window_is_made_meanwhile_and_is_the_one_that_is_asked_for(truth, monkeypatch):
    directory, _ = truth
    plain, stream, made = SampleStream(directory, "train"), SampleStream(directory, "train"), []
    original, caller = SampleStream._window, threading.get_ident()

    def watched(self: SampleStream, cursor: tuple[int, ...]) -> list:
        made.append((cursor[0], threading.get_ident() == caller))
        if cursor[0] == 9:
            raise RedHeartError("damaged")
        return original(self, cursor)

    monkeypatch.setattr(SampleStream, "_window", watched)
    # one after the other, with other micro-batches, another rank's, and after a jump
    asked = [(0, 4, 0, 1), (1, 4, 0, 1), (2, 2, 0, 1), (3, 2, 0, 1), (3, 2, 1, 2), (7, 4, 0, 1), (8, 4, 0, 1)]
    for step, micro, rank, world_size in asked:
        found = stream.window(step, 3, 8, micro, rank, world_size)
        wanted = list(plain.micro_batches(step, 3, 8, micro, rank, world_size))
        assert [b.ids for b in found] == [b.ids for b in wanted]
        assert [b.keys.tolist() for b in found] == [b.keys.tolist() for b in wanted]
        assert all(torch.equal(a.features, b.features) for a, b in zip(found, wanted, strict=True))
        until = time.monotonic() + 10
        while made[-1][0] != step + 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert made[-1] == (step + 1, False)  # nobody has asked for it yet
    assert [step for step, _ in made] == [0, 1, 2, 2, 3, 4, 3, 4, 7, 8, 9]
    with pytest.raises(RedHeartError, match="damaged"):
        stream.window(9, 3, 8, 4, 0, 1)


def test_a_part_of_a_split_is_spread_over_all_lengths(truth: tuple[Path, list[dict]]):
    stream = SampleStream(truth[0], "train")
    everything = [i for b in stream.in_order(7) for i in b.ids]
    assert sorted(map(int, everything)) == list(range(64))
    dealt = [i for r in range(3) for b in stream.in_order(7, r, 3) for i in b.ids]
    assert sorted(dealt) == sorted(everything)
    part = [i for b in stream.in_order(7, max_rows=16) for i in b.ids]
    assert part == everything[::4]


def test_the_label_sample_has_the_weighted_means_of_the_split(truth: tuple[Path, list[dict]]):
    values, weights = SampleStream(truth[0], "train").label_sample()
    mean = (values["regret"] * weights["regret"]).sum() / weights["regret"].sum()
    assert mean.item() == pytest.approx(np.mean([r["regret"] for r in truth[1]]), abs=0.005)
    assert weights["regret"].sum().item() == pytest.approx(32)
    assert weights["emotion"].sum(0).tolist() == [64, 0, 64, 64, 64, 64, 64]
    assert weights["vad"].sum() == 0


def test_entries_by_an_origin_are_those_that_some_row_has_from_it(truth: tuple[Path, list[dict]]):
    stream = SampleStream(truth[0], "train")
    emotion, regret = (np.arange(NUM_LABEL_COLUMNS)[LABEL_COLUMNS[label]] for label in ("emotion", "regret"))
    by_authors, by_llm = stream.entries_by(["human", "author"]), stream.entries_by(["llm"])
    assert (
        np.flatnonzero(by_authors).tolist() == np.delete(emotion, 1).tolist()
    )  # the second entry has a gap everywhere
    assert np.flatnonzero(by_llm).tolist() == regret.tolist()
    assert not stream.entries_by(["human", "derived"]).any()


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_the_directory(truth: tuple[Path, list[dict]], tmp_path: Path, streaming: bool):
    files = {"train": [str(p) for p in sorted(truth[0].glob("train-*.arrow"))]}
    rows = datasets.load_dataset("arrow", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path))
    seen = {row["id"]: row for row in rows}
    assert len(seen) == 64
    assert np.array_equal(np.array(seen["5"]["features"], dtype=np.float16), truth[1][5]["features"])


HARM = {
    "flip": "train-00001.arrow is damaged",
    "cut": "train-00001.arrow is damaged",
    "remove": "train-00001.arrow is missing",
    "version": INDEX,
    "index": INDEX,
    "rows": "contradicts itself about shard train-00001.arrow",
    "total": "contradicts itself about the rows of train",
    "rows and buckets": "train-00001.arrow holds 20 rows and the index says 21",
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_directory_is_named(tmp_path: Path, harm: str):
    write_directory(tmp_path, [30, 20])
    shard = tmp_path / "train-00001.arrow"
    content = bytearray(shard.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    elif harm == "cut":
        shard.write_bytes(content[:-100])
    elif harm == "remove":
        shard.unlink()
    elif harm in ("rows", "total", "rows and buckets"):
        index = read_sealed_json(tmp_path / INDEX, "again")
        train = index["splits"]["train"]
        train["rows"] += harm != "rows"
        train["shards"][1]["rows"] += harm != "total"
        train["shards"][1]["buckets"][0][1] += harm == "rows and buckets"
        write_sealed_json(tmp_path / INDEX, index)
    else:
        (tmp_path / INDEX).write_text("{" if harm == "index" else '{"version": 99}')
    with pytest.raises(RedHeartError, match=HARM[harm]):
        list(SampleStream(tmp_path, "train").in_order(8))


class Handler(SimpleHTTPRequestHandler):
    """Serves a directory; the first `bad` requests of a shard fail in the way that `mode` says."""

    mode = "fine"
    bad = 0
    asked: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        count = self.asked[name] = self.asked.get(name, 0) + 1
        if name.endswith(".arrow") and count <= self.bad:
            if self.mode == "error":
                self.send_error(503)
                return
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            if self.mode == "stall":
                self.wfile.flush()
                time.sleep(3)
            self.close_connection = True
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(
    truth: tuple[Path, list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, type]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    handler = type("OneTest", (Handler,), {"asked": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(truth[0]))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", handler
        http.shutdown()


def batches_of(stream: SampleStream) -> list[tuple]:
    return [
        (b.ids, b.features.numpy().tobytes(), b.mask.numpy().tobytes(), b.labels["emotion"].numpy().tobytes())
        for step in range(8)
        for b in stream.micro_batches(step, 3, 16, 8, 0, 1)
    ]


def test_http_and_a_directory_give_the_same_batches(truth: tuple[Path, list[dict]], server: tuple[str, type]):
    url, handler = server
    assert batches_of(SampleStream(url, "train")) == batches_of(SampleStream(truth[0], "train"))
    once = {f"train-0000{k}.arrow": 1 for k in range(3)}
    assert {k: v for k, v in handler.asked.items() if k.endswith("arrow")} == once
    batches_of(SampleStream(url, "train"))  # from the cache
    assert {k: v for k, v in handler.asked.items() if k.endswith("arrow")} == once


@pytest.mark.parametrize("mode", ["error", "cut", "stall"])
def test_a_failing_read_is_tried_again(truth: tuple[Path, list[dict]], server: tuple[str, type], mode: str, capsys):
    url, handler = server
    handler.mode, handler.bad = mode, 1
    stream = SampleStream(url, "train", RemoteConfig(attempts=3, timeout_s=0.5))
    assert batches_of(stream) == batches_of(SampleStream(truth[0], "train"))
    assert handler.asked["train-00000.arrow"] == 2
    assert "attempt 2 in 0.5 s" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["error", "cut", "stall"])
def test_a_read_that_keeps_failing_ends_with_the_name_of_the_shard(server: tuple[str, type], mode: str):
    url, handler = server
    handler.mode, handler.bad = mode, 99
    stream = SampleStream(url, "train", RemoteConfig(attempts=2, timeout_s=0.5))
    with pytest.raises(RedHeartError, match=r"shard train-0000\d.arrow of http.* after 2 attempts"):
        batches_of(stream)


def test_a_store_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(RedHeartError, match=r"index\.json of http://127\.0\.0\.1:9 cannot be read after 1 attempts"):
        SampleStream("http://127.0.0.1:9", "train", RemoteConfig(attempts=1))
    with pytest.raises(RedHeartError, match="redheart prepare"):
        SampleStream(tmp_path, "train")
