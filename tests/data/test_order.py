"""The order of samples: every row once an epoch, the same on any number of ranks, after any kill, from any position."""

import itertools
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from redheart.data.order import CHUNK, Order, _chunks, bucket, global_batch, positions, rank_slice
from redheart.data.stream import SampleStream
from tests.data.shard_data import read_and_log, write_directory
from tests.runs import FORKED


def split_of(sizes: list[int], repeats: list[int] | None = None, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    shards = []
    for size, repeat in zip(sizes, repeats or [1] * len(sizes), strict=True):
        lengths, counts = np.unique(rng.integers(1, 60, size), return_counts=True)
        shards.append({"rows": size, "repeat": repeat, "buckets": np.stack([lengths, counts], 1).tolist()})
    return {"rows": sum(sizes), "shards": shards}


@pytest.mark.parametrize("sizes", [[1], [7], [64], [5, 1, 3], [700, 300, 41], [90] * 21, [9] * 16, [9] * 17, [9] * 33])
def test_each_epoch_is_every_row_once(sizes: list[int]):
    split = split_of(sizes)
    order, n = Order(split, seed=5), sum(sizes)
    three = order.samples(np.arange(3 * n))
    for epoch in range(3):
        assert sorted(three[epoch * n : (epoch + 1) * n]) == list(range(n))
    if n > 20:
        assert not np.array_equal(three[:n], three[n : 2 * n])
        assert not np.array_equal(three[:n], Order(split, seed=6).samples(np.arange(n)))


def test_a_shard_is_seen_once_unless_its_entry_says_more():
    order = Order({"shards": [{"rows": 30, "buckets": [[4, 30]]}]}, seed=3)
    assert order.rows_per_epoch == 30
    assert sorted(order.samples(np.arange(30))) == list(range(30))
    twice = Order({"shards": [{"rows": 30, "repeat": 2, "buckets": [[4, 30]]}]}, seed=3)
    assert sorted(twice.samples(np.arange(60))) == sorted([*range(30), *range(30)])


def test_windows_of_sixteen_shards_follow_one_another_over_the_end_of_an_epoch():
    order = Order(split_of([40] * 37), seed=2)
    for first, shards in ((0, 16), (640, 16), (1280, 5)):
        seen = np.bincount(order.samples(np.arange(first, first + 40 * shards)) // 40, minlength=37)
        assert sorted(seen) == [0] * (37 - shards) + [40] * shards
        number = first // 640
        assert sorted(order.shards_of_window(0, number)) == np.flatnonzero(seen).tolist()
    after = order.shards_of_window(0, 3)
    assert after.tolist() == order.shards_of_window(1, 0).tolist() != order.shards_of_window(0, 0).tolist()


@pytest.mark.parametrize("position", [0, 1, 639, 640, 641, 1279, 1280, 1479, 1480, 1481, 2 * 1480 - 1, 10**12 + 7])
def test_a_position_is_found_where_its_sample_stands(position: int):
    order = Order(split_of([40] * 37), seed=2)
    epoch, number, offset = order.locate(position)
    assert (epoch, number) == (position // 1480, position % 1480 // 640)
    assert order.window(epoch, number)[offset] == order.samples(np.array([position]))[0]
    assert (
        order.samples(np.array([position, 5, position]))[[0, 2]].tolist() == [order.window(epoch, number)[offset]] * 2
    )


@pytest.mark.parametrize(("rows", "chunk"), [(10, 1), (31, 1), (32, 2), (127, 4), (128, 8), (1023, 8), (5000, 8)])
def test_a_window_is_cut_into_sixteen_chunks_at_least_and_of_8_at_most(rows: int, chunk: int):
    """Rows of ascending length: a chunk is a run of neighbours, which breaks where chunks meet."""
    order = Order({"shards": [{"rows": rows, "buckets": [[n, 1] for n in range(1, rows + 1)]}]}, seed=0)
    for epoch in (0, 1):
        window = order.window(epoch, 0)
        breaks = epoch * rows + 1 + np.flatnonzero(np.diff(window) != 1)
        assert np.gcd.reduce(breaks) == chunk


def test_the_short_chunks_at_both_ends_are_cut_anywhere():
    first, last = set(), set()
    for seed in range(100):
        pieces = _chunks(np.arange(13), 4, 2, np.random.default_rng(seed))
        assert [len(p) for p in pieces] == [2, 4, 4, 3]
        assert all((np.diff(p) == 1).all() for p in pieces)
        assert sorted(np.concatenate(pieces)) == list(range(13))
        first.add(int(pieces[0][0]))
        last.add(int(pieces[-1][0]))
    assert first == {0, 3, 4, 7, 8, 11}  # before or behind whole chunks, and the other short one
    assert last == {0, 2, 4, 6, 8, 10}


def test_a_step_is_the_same_for_any_number_of_ranks_and_from_any_start():
    index = {"splits": {"train": split_of([700, 300, 41])}}
    flat = Order(index["splits"]["train"], seed=1).samples(np.arange(40 * 24))
    for step in (39, 0, 17):
        batch = global_batch(index, 1, step, 24)
        assert np.array_equal(batch, flat[24 * step : 24 * (step + 1)])
        for world in (1, 2, 3, 4):
            assert np.array_equal(np.concatenate([rank_slice(batch, r, world) for r in range(world)]), batch)


def test_a_repeated_shard_is_seen_as_often_as_its_weight_says():
    order = Order(split_of([30, 200], [4, 1]), seed=0)
    assert order.rows_per_epoch == 320
    seen = np.bincount(order.samples(np.arange(320)))
    assert seen[:30].tolist() == [4] * 30
    assert seen[30:].tolist() == [1] * 200


def test_chunks_hold_one_length_in_every_epoch():
    rng = np.random.default_rng(0)
    lengths, counts = np.unique(rng.integers(1, 60, 5000), return_counts=True)
    order = Order({"shards": [{"rows": 5000, "buckets": np.stack([lengths, counts], 1).tolist()}]}, seed=0)
    of_row = np.repeat(lengths, counts)
    for first in (0, 5008, 10_000):  # chunk grids are positions: an epoch of 5000 rows starts at any offset in one
        start = -(-first // CHUNK) * CHUNK
        chunks = order.samples(np.arange(start, start + CHUNK * 400)).reshape(-1, CHUNK)
        spread = np.ptp(of_row[chunks], 1)
        assert np.mean(spread) < 2


def test_a_step_sees_several_lengths_and_pairs_beside_single_texts():
    """A step of one length, or of pairs alone, is a step of few tasks: what a data set mixes has to meet in one."""
    rng, limit, size = np.random.default_rng(0), 64, 32
    texts = np.clip(rng.lognormal(3.0, 0.5, 4000).astype(int), 1, limit)
    pairs = np.where(rng.random(4000) < 0.3, texts, 0)
    own = np.sort([bucket(t, c, limit) for t, c in zip(texts.tolist(), pairs.tolist(), strict=True)])
    buckets = np.stack(np.unique(own, return_counts=True), 1).tolist()
    index = {"splits": {"train": {"shards": [{"rows": 4000, "buckets": buckets}]}}}
    steps = np.stack([own[global_batch(index, 0, step, size)] for step in range(4000 // size)])
    single, paired = (steps <= limit).any(1), (steps > limit).any(1)
    assert np.mean(single & paired) > 0.6  # 0.75 where each of four chunks is of pairs with a chance of 0.3
    assert np.mean([len(np.unique(step)) >= 3 for step in steps]) > 0.9


def test_companions_change_from_epoch_to_epoch():
    order = Order(split_of([4000]), seed=0)
    first, second = (order.samples(np.arange(e * 4000, (e + 1) * 4000)) for e in (0, 1))
    neighbours = [{frozenset(p) for p in itertools.pairwise(x.tolist())} for x in (first, second)]
    assert len(neighbours[0] & neighbours[1]) < 0.05 * 4000


def test_neighbouring_buckets_of_pairs_are_alike_in_both_lengths():
    cells = sorted({bucket(t, c, 16): (t // 2, c // 2) for t in range(1, 17) for c in range(1, 17)}.items())
    steps = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for (_, a), (_, b) in itertools.pairwise(cells)]
    assert max(steps) == 1
    assert len(cells) == 9 * 9  # no two share a bucket
    assert min(k for k, _ in cells) > 16 >= max(bucket(t, 0, 16) for t in range(1, 17))


@pytest.mark.slow
def test_a_start_costs_the_same_at_any_position():
    shards = [{"rows": 2048, "buckets": [[n, 64] for n in range(3, 35)]}] * 4883  # ten million rows
    took = {}
    for step in (0, 300_000, 10**9):
        started = time.perf_counter()
        Order({"shards": shards}, seed=0).samples(positions(step, 32))
        took[step] = time.perf_counter() - started
    assert max(took.values()) < 0.5


def test_kills_and_other_world_sizes_lose_and_repeat_nothing(tmp_path: Path):
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as `forked` has it: the server is everyone's
    data, batch, steps = tmp_path / "data", 12, 84  # two epochs of 500 rows
    data.mkdir()
    write_directory(data, [200, 180, 120])
    chance = random.Random(0)
    logged: dict[int, list[str]] = {}
    start = 0
    for phase, world in enumerate((1, 2, 4, 3)):
        logs = [tmp_path / f"log-{phase}-{rank}" for rank in range(world)]
        readers = [
            FORKED.Process(target=read_and_log, args=(str(data), str(log), rank, world, start, steps, batch))
            for rank, log in enumerate(logs)
        ]
        for reader in readers:
            reader.start()
        if phase < 3:
            wanted = start + chance.randrange(5, 20)
            while min(len(_lines(log)) for log in logs) < wanted - start:
                time.sleep(0.005)
            for reader in chance.sample(readers, world):
                time.sleep(chance.random() * 0.02)
                reader.kill()
        for reader in readers:
            reader.join(60)
            assert reader.exitcode == (-9 if phase < 3 else 0)
        parts = [{line["step"]: line["ids"] for line in _lines(log)} for log in logs]
        common = min(max(p) for p in parts) + 1
        end = steps if phase == 3 else common - chance.randrange(0, 3)  # the last checkpoint lies a little back
        for step in range(start, end):
            logged[step] = [i for p in parts for i in p[step]]
        start = end
    assert start == steps
    flat = [i for step in range(steps) for i in logged[step]]
    for epoch in (0, 1):
        assert sorted(map(int, flat[epoch * 500 : (epoch + 1) * 500])) == list(range(500))
    whole = SampleStream(data, "train")
    for step in range(steps):
        assert logged[step] == [i for b in whole.micro_batches(step, 7, batch, 4, 0, 1) for i in b.ids]


def _lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]
