"""Reads prepared samples through HF `datasets`, in the order of data/order.py, and hands out micro-batches.

Shards are memory-mapped, a window of them at a time; the next window is verified and opened, or fetched, in the background
while this one is read. So any row is read without its neighbours, memory does not grow, and a resume needs nothing but the
step number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redheart.config import RemoteConfig
from redheart.data.collate import collate
from redheart.data.order import CHUNK, WINDOW_SHARDS, Order, order_of, positions, rank_slice
from redheart.data.shards import Shard, histogram_arrays, open_shard
from redheart.data.store import Store
from redheart.schema import LABELS, NUM_LABEL_COLUMNS, ORIGINS, Batch, RedHeartError

Cursor = tuple[int, int, int, int, int, int]  # the arguments of micro_batches


class SampleStream:
    """One split of a data directory or URL. `encoder` is the fingerprint that its features were made with.

    `few_shapes`: batches are of one of at most max_tokens / 8 × 2 shapes for each number of rows (see `collate`).
    """

    def __init__(self, location: str | Path, split: str, remote: RemoteConfig | None = None, few_shapes: bool = False):
        self.split = split
        self.store = Store(location, remote)
        self.index = self.store.index
        self.encoder: dict[str, Any] = self.index["encoder"]
        self._max_tokens: int | None = self.encoder["max_tokens"] if few_shapes else None
        self._entries = self.store.shards(split)
        self._starts = np.concatenate([[0], np.cumsum([e["rows"] for e in self._entries], dtype=np.int64)])
        self.num_rows = int(self._starts[-1])
        self.rows_per_epoch = sum(e["rows"] * e.get("repeat", 1) for e in self._entries)
        self._orders: dict[int, Order] = {}
        self._open: OrderedDict[int, Future[Shard]] = OrderedDict()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="shards")
        # one at a time: it works on the shards that are open
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[Cursor, Future[list[Batch]]] | None = None
        self._capacity = 2 * self.index.get("window_shards", WINDOW_SHARDS) + 2

    def batch(self, numbers: np.ndarray, keys: np.ndarray) -> Batch:
        """The rows with these numbers, as one Batch with these `keys`."""
        where = self._starts.searchsorted(numbers, side="right") - 1
        local = numbers - self._starts[where]
        shards = {s: self._shard(s) for s in dict.fromkeys(where.tolist())}
        rows = [(shards[s], n) for s, n in zip(where.tolist(), local.tolist(), strict=True)]
        features = [shard.features[n] for shard, n in rows]
        first = rows[0][0]
        labels = np.empty((len(rows), first.labels.shape[1]), first.labels.dtype)
        origins = np.empty((len(rows), first.origins.shape[1]), first.origins.dtype)
        for row, (shard, n) in enumerate(rows):
            labels[row] = shard.labels[n]
            origins[row] = shard.origins[n]
        return collate(
            [f for f in features if f is not None],
            [shard.contrasts[n] for shard, n in rows],
            labels[:, :NUM_LABEL_COLUMNS],
            labels[:, NUM_LABEL_COLUMNS:],
            origins,
            keys,
            [shard.ids[n] for shard, n in rows],
            self.encoder["width"],
            self._max_tokens,
        )

    def rows(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """The rows with these numbers as they were written, features as float16 [T, E] arrays (or None)."""
        result = []
        for number in numbers.tolist():
            place = int(np.searchsorted(self._starts, number, side="right")) - 1
            shard, row = self._shard(place), number - int(self._starts[place])
            table = shard.table.drop_columns(["features", "contrast_features"])
            features = {"features": shard.features[row], "contrast_features": shard.contrasts[row]}
            result.append({**table.slice(row, 1).to_pylist()[0], **features})
        return result

    def label_sample(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(values, weights) by label, float32 [101, size], distributed like the split's labels; from the index alone."""
        values, weights = histogram_arrays(self.index["splits"][self.split]["histograms"])
        return {n: torch.from_numpy(v) for n, v in values.items()}, {n: torch.from_numpy(w) for n, w in weights.items()}

    def entries_by(self, origins: Collection[str]) -> np.ndarray:
        """Which entries have a label of one of these origins somewhere in the split, bool [NUM_LABEL_COLUMNS]. Opens every shard."""
        codes = [ORIGINS.index(origin) for origin in origins]
        found = np.zeros(NUM_LABEL_COLUMNS, bool)
        for number in range(len(self._entries)):
            shard = self._shard(number)
            theirs = np.isin(shard.origins, codes).repeat([label.size for label in LABELS.values()], 1)
            found |= (theirs & ~np.isnan(shard.values)).any(0)
        return found

    def order(self, seed: int) -> Order:
        if seed not in self._orders:
            self._orders[seed] = order_of(self.index, self.split, seed)
        return self._orders[seed]

    def micro_batches(
        self, step: int, seed: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """The micro-batches of this rank at a step; together the ranks see the global batch exactly once.

        Micro-batches larger than the order's chunk, where a step has several, take chunks of neighbouring lengths. That changes which
        samples share a micro-batch, never which samples a step sees.
        """
        order = self.order(seed)
        where = rank_slice(positions(step, global_batch_size), rank, world_size)
        numbers = order.samples(where)
        self._prefetch(order, int(where[-1]))
        if self.index.get("chunk", CHUNK) < micro_batch_size < len(where):
            by_length = np.argsort(self._buckets_of(numbers), kind="stable")
            where, numbers = where[by_length], numbers[by_length]
        for start in range(0, len(where), micro_batch_size):
            part = slice(start, start + micro_batch_size)
            yield self.batch(numbers[part], where[part])

    def window(self, *cursor: *Cursor) -> list[Batch]:
        """All of `micro_batches` at once; those of the step after it are made in a thread meanwhile.

        They follow from the arguments alone, so a run that jumps or cuts its batches anew gets what it asks for, and an error comes with
        the step that it belongs to.
        """
        ahead = self._ahead
        made = ahead[1] if ahead and ahead[0] == cursor else self._reader.submit(self._window, cursor)
        following = (cursor[0] + 1, *cursor[1:])
        batches = made.result()
        self._ahead = following, self._reader.submit(self._window, following)
        return batches

    def _window(self, cursor: Cursor) -> list[Batch]:
        return list(self.micro_batches(*cursor))

    def in_order(
        self, batch_size: int, rank: int = 0, world_size: int = 1, max_rows: int | None = None
    ) -> Iterator[Batch]:
        """Every row once, or `max_rows` of them evenly spread over the split, batches dealt to the ranks in turn."""
        count = self.num_rows if max_rows is None else min(max_rows, self.num_rows)
        numbers = np.arange(count) * self.num_rows // max(count, 1)
        for turn, start in enumerate(range(0, count, batch_size)):
            if turn % world_size == rank:
                part = numbers[start : start + batch_size]
                yield self.batch(part, part)

    def _shard(self, number: int) -> Shard:
        future = self._request(number)
        self._open.move_to_end(number)
        while len(self._open) > self._capacity:
            self._open.popitem(last=False)
        try:
            return future.result()
        except BaseException:
            del self._open[number]
            raise

    def _request(self, number: int) -> Future[Shard]:
        if number not in self._open:
            self._open[number] = self._pool.submit(self._fetch_and_open, number)
        return self._open[number]

    def _fetch_and_open(self, number: int) -> Shard:
        entry = self._entries[number]
        shard = open_shard(self.store.fetch(entry), self.encoder["width"])
        if len(shard.ids) != entry["rows"]:
            raise RedHeartError(
                f"shard {entry['file']} holds {len(shard.ids)} rows and the index says {entry['rows']}: prepare the data again"
            )
        return shard

    def _prefetch(self, order: Order, position: int) -> None:
        epoch, window, _ = order.locate(position)
        for number in order.shards_of_window(epoch, window + 1).tolist():
            self._request(number)

    def _buckets_of(self, numbers: np.ndarray) -> np.ndarray:
        """The length bucket of each row: shards are sorted by it, so it follows from the row's place."""
        where = np.searchsorted(self._starts, numbers, side="right") - 1
        return np.array([self._bucket(s, n) for s, n in zip(where.tolist(), (numbers - self._starts[where]).tolist())])

    def _bucket(self, shard: int, row: int) -> int:
        buckets = np.array(self._entries[shard]["buckets"])
        return int(buckets[np.searchsorted(np.cumsum(buckets[:, 1]), row, side="right"), 0])
