"""Reads prepared samples through HF `datasets`, in the order of data/order.py, and hands out micro-batches.

The Parquet shards become memory-mapped Arrow once (cached beside the data), so any row is read in O(1) and a resume
needs nothing but the step number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from redheart.data.collate import collate
from redheart.data.order import positions, rank_slice, samples_at
from redheart.data.shards import read_index, shard_paths
from redheart.schema import LABELS, Batch

META = ("id", "source", "split", "lang", "text", "contrast_text")


class SampleStream:
    """One split of a data directory. `encoder` is the fingerprint that its features were made with."""

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = directory, split
        self.index = read_index(directory)
        self.encoder: dict[str, Any] = self.index["encoder"]
        paths = shard_paths(directory, self.index, split)
        self.num_rows: int = sum(s["rows"] for s in self.index["splits"].get(split, {"shards": []})["shards"])
        self._table = _open(paths, directory / ".cache") if self.num_rows else None

    def rows(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """The rows with these numbers, `features` and `contrast_features` as float16 [T, E] arrays (or None)."""
        if len(numbers) == 0 or self._table is None:
            return []
        table: pa.Table = self._table[[int(n) for n in numbers]]
        plain = table.drop_columns(["features", "contrast_features"]).to_pylist()
        for name in ("features", "contrast_features"):
            for row, state in zip(plain, _arrays(table[name], self.encoder["width"])):
                row[name] = state
        return plain

    def label_rows(self) -> list[dict[str, Any]]:
        """All rows, labels and weights only (no text, no features)."""
        if self._table is None:
            return []
        names = [*LABELS, "label_weight", "label_origin"]
        return self._table.select_columns(names)[:].to_pylist()

    def micro_batches(
        self, step: int, seed: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """The micro-batches of this rank at a step, in order; together the ranks see the global batch exactly once."""
        where = rank_slice(positions(step, global_batch_size), rank, world_size)
        numbers = samples_at(where, self.num_rows, seed)
        for start in range(0, len(where), micro_batch_size):
            part = slice(start, start + micro_batch_size)
            yield collate(self.rows(numbers[part]), where[part], self.encoder["width"])

    def in_order(
        self, batch_size: int, rank: int = 0, world_size: int = 1, max_rows: int | None = None
    ) -> Iterator[tuple[list[dict[str, Any]], Batch]]:
        """The first `max_rows` rows (all by default) once, in the order of the shards, batches dealt to the ranks in turn."""
        end = self.num_rows if max_rows is None else min(max_rows, self.num_rows)
        for number, start in enumerate(range(0, end, batch_size)):
            if number % world_size == rank:
                numbers = np.arange(start, min(start + batch_size, end))
                rows = self.rows(numbers)
                yield rows, collate(rows, numbers, self.encoder["width"])


def _open(paths: list[Path], cache: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    files = [str(p) for p in paths]
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache)).with_format("arrow")


def _arrays(column: pa.ChunkedArray, encoder_width: int) -> list[np.ndarray | None]:
    """list<fixed_size_list<float16>> -> one [T, E] array per row, None where null."""
    states: list[np.ndarray | None] = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.flatten().to_numpy(zero_copy_only=False).reshape(-1, encoder_width)
        for i, valid in enumerate(chunk.is_valid().to_numpy(zero_copy_only=False)):
            states.append(values[offsets[i] : offsets[i + 1]] if valid else None)
    return states
