"""The order of samples, as pure index arithmetic (DESIGN §7): no buffer, no state, the same on every rank.

Position p is one integer that runs on through the epochs. An epoch shuffles the shards and takes them in windows of a few;
within a window the rows are sorted by length (equal lengths in random order), cut into chunks of like length, and the chunks
are shuffled. Chunks start at multiples of their size, counted in positions: a micro-batch of that size holds one length, and a
step holds several, since steps of one length each (and of pairs alone, which have buckets of their own) teach less. Only one
window is ever computed: a start costs the same at any position. Step s of a run with global batch G uses positions
[s·G, (s+1)·G); rank r takes its slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from redheart.schema import RedHeartError

CHUNK = 8  # samples of like length that stand together; a data directory keeps what it was prepared with
WINDOW_SHARDS = 16  # shards that are mixed, and open, at once
DIVERSITY = 16  # a window is cut into at least so many chunks, or its rows are shuffled one by one


def bucket(length: int, contrast_length: int, max_tokens: int) -> int:
    """The length bucket of a sample, ≥ 1: its length, or, for a pair (contrast_length > 0), a cell of both lengths.

    Cells are two tokens wide; the second length runs up and down in turn, so that neighbouring buckets are alike in both.
    """
    if contrast_length == 0:
        return length
    row, cells = length // 2, max_tokens // 2 + 1
    cell = contrast_length // 2
    return max_tokens + 1 + row * cells + (cell if row % 2 == 0 else cells - 1 - cell)


class Order:
    """The order of one split. `split` is its entry in the index, whose shards hold `rows`, `repeat` and `buckets`."""

    def __init__(self, split: Mapping[str, Any], seed: int, chunk: int = CHUNK, window_shards: int = WINDOW_SHARDS):
        self.seed, self.chunk, self.window_shards = seed, chunk, window_shards
        shards = split["shards"]
        rows = np.array([s["rows"] for s in shards], dtype=np.int64)
        repeats = np.array([s.get("repeat", 1) for s in shards], dtype=np.int64)
        self._buckets = [s["buckets"] for s in shards]
        self.starts = np.concatenate([[0], np.cumsum(rows)])  # first row number of each shard, then the total
        self._listed = np.repeat(np.arange(len(shards)), repeats)  # a shard with repeat 2 is listed twice
        self._rows = rows
        self.rows_per_epoch = int((rows * repeats).sum())
        self.shards_of_epoch = lru_cache(maxsize=4)(self._shards_of_epoch)
        self.window = lru_cache(maxsize=4)(self._window)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Row numbers in the split at some positions, int64, in the same order."""
        if self.rows_per_epoch == 0:
            raise RedHeartError("the training split is empty: prepare more samples, or give some of them split 'train'")
        numbers = np.empty(len(positions), dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.rows_per_epoch)
        for epoch in dict.fromkeys(epochs.tolist()):
            starts = self.shards_of_epoch(epoch)[1]
            windows = np.where(epochs == epoch, starts.searchsorted(offsets, side="right") - 1, -1)
            for number in dict.fromkeys(windows[windows >= 0].tolist()):
                inside = windows == number
                numbers[inside] = self.window(epoch, number)[offsets[inside] - starts[number]]
        return numbers

    def locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, window, offset in the window) of a position."""
        epoch, offset = divmod(position, self.rows_per_epoch)
        _, starts = self.shards_of_epoch(epoch)
        number = int(np.searchsorted(starts, offset, side="right")) - 1
        return epoch, number, offset - int(starts[number])

    def shards_of_window(self, epoch: int, number: int) -> np.ndarray:
        """The shards that a window draws from, int64; `number` may lie beyond the epoch's last window: the next epoch's."""
        shards, starts = self.shards_of_epoch(epoch)
        if number >= len(starts) - 1:
            return self.shards_of_window(epoch + 1, 0)
        return shards[number * self.window_shards : (number + 1) * self.window_shards]

    def _shards_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in the order of an epoch, offset of each window's first position, then the epoch's length)."""
        shards = self._listed[self._random(epoch, 0).permutation(len(self._listed))]
        ends = np.cumsum(self._rows[shards])
        return shards, np.concatenate([[0], ends[self.window_shards - 1 : -1 : self.window_shards], ends[-1:]])

    def _window(self, epoch: int, number: int) -> np.ndarray:
        """Row numbers of a window in their order, int64."""
        random = self._random(epoch, number + 1)
        shards = self.shards_of_window(epoch, number)
        rows = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        lengths = np.concatenate([np.repeat(*np.array(self._buckets[s], dtype=np.int64).T) for s in shards])
        rows = rows[np.argsort(lengths + random.random(len(rows)), kind="stable")]
        chunk = min(self.chunk, 1 << max(0, (len(rows) // DIVERSITY).bit_length() - 1))
        first = epoch * self.rows_per_epoch + int(self.shards_of_epoch(epoch)[1][number])
        return np.concatenate(_chunks(rows, chunk, -first % chunk, random))

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        """Philox (Salmon et al. 2011) keyed by the seed, its counter set by (epoch, stream): independent streams, no state."""
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, epoch, stream]))


def _chunks(rows: np.ndarray, chunk: int, head: int, random: np.random.Generator) -> list[np.ndarray]:
    """Cuts sorted rows into chunks in random order; `head` rows come first and a remainder last, cut at random places."""
    head = min(head, len(rows))
    full, tail = divmod(len(rows) - head, chunk)
    sizes = [chunk] * full
    places = {}
    for name, size in (("head", head), ("tail", tail)):
        places[name] = int(random.integers(len(sizes) + 1))
        sizes.insert(places[name], size)
    if places["tail"] <= places["head"]:
        places["head"] += 1
    pieces = np.split(rows, np.cumsum(sizes)[:-1])
    middle = [p for i, p in enumerate(pieces) if i not in places.values()]
    return [pieces[places["head"]], *(middle[i] for i in random.permutation(len(middle))), pieces[places["tail"]]]


def positions(step: int, global_batch_size: int) -> np.ndarray:
    """The positions of a step, int64 [global_batch_size]."""
    return np.arange(step * global_batch_size, (step + 1) * global_batch_size)


def order_of(index: Mapping[str, Any], split: str, seed: int) -> Order:
    """The order of a split of a data directory's index."""
    return Order(index["splits"][split], seed, index.get("chunk", CHUNK), index.get("window_shards", WINDOW_SHARDS))


def global_batch(index: Mapping[str, Any], seed: int, step: int, global_batch_size: int) -> np.ndarray:
    """Row numbers in the training split of the samples of a step, the same on every rank. `index` is a data directory's."""
    return order_of(index, "train", seed).samples(positions(step, global_batch_size))


def rank_slice(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Rank r's contiguous part of a global batch, whose size must be divisible by the world size."""
    assert len(batch) % world_size == 0
    share = len(batch) // world_size
    return batch[rank * share : (rank + 1) * share]
