"""`redheart dedup`: what leaks between the splits of a prepared directory, and the same directory without it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redheart.config import DataConfig
from redheart.data.card import dataset_card
from redheart.data.fingerprint import each_of, mean_state
from redheart.data.neighbours import near_leaks
from redheart.data.shards import INDEX, Shard, SplitsWriter, open_shard
from redheart.data.store import Store
from redheart.files import flush_to_disk, unfinished_directory, write_sealed_json, write_text
from redheart.owned import check_can_make
from redheart.schema import SPLITS, RedHeartError

FIELDS = ("id", "source", "split", "text", "contrast_text")


@dataclass(frozen=True)
class DedupReport:
    """`duplicates` as data/neighbours.py reports them; `rows` by split of what was written, empty where nothing was."""

    duplicates: dict[str, Any]
    rows: dict[str, int]


def dedup(data: str | Path, out: Path | None = None, threshold: float | None = None) -> DedupReport:
    """Finds the leaking rows of a prepared directory (or URL) and, with `out`, writes a new directory without them, whole or not at all.

    `threshold`: cosine; None is the default of data.dedup_threshold. Labels, derived ones too, stay as they are. Raises RedHeartError
    where `out` is there already, and as `near_leaks` does.
    """
    if threshold is None:
        threshold = DataConfig().dedup_threshold
    if not 0 < threshold <= 1:
        raise RedHeartError(f"--threshold {threshold:g} must lie above 0 and at most at 1")
    if out is not None and os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise RedHeartError(f"{out} is there already: choose another --out")
    if out is not None:
        check_can_make(out, "--out")
    store = Store(data)
    encoder = store.index["encoder"]
    records: list[dict[str, Any]] = []
    pooled = [np.zeros((0, each_of(encoder)[0]["width"]), np.float32)]
    contrasts = pooled.copy()
    for _, shard in _shards(store, encoder["width"]):
        fresh = shard.table.select(FIELDS).to_pylist()
        pooled += [_mean(shard.features[i], encoder) for i in range(len(fresh))]
        contrasts += [_mean(shard.contrasts[i], encoder) for i, r in enumerate(fresh) if r["contrast_text"] is not None]
        records += fresh
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="redheart-dedup-", dir=out and out.parent) as work:
        vectors = np.concatenate(pooled), np.concatenate(contrasts)
        leaks = near_leaks(records, *vectors, threshold, Path(work), "--threshold")
    if out is None:
        return DedupReport(leaks.report, {})
    return DedupReport(leaks.report, _write(store, out, leaks.dropped, leaks.report))


def _write(store: Store, out: Path, dropped: frozenset[str], report: dict[str, Any]) -> dict[str, int]:
    """Writes the directory without the rows in `dropped`, whole or not at all; returns its rows by split."""
    encoder = store.index["encoder"]
    with unfinished_directory(out, 0o700) as unfinished:
        writer = SplitsWriter(unfinished, encoder["width"], encoder["max_tokens"])
        for entry, shard in _shards(store, encoder["width"]):
            rows = shard.table.drop_columns(["features", "contrast_features"]).to_pylist()
            for i, row in enumerate(rows):
                row |= {"features": shard.features[i], "contrast_features": shard.contrasts[i]}
            writer.write(entry["file"], [r for r in rows if r["id"] not in dropped], entry["repeat"])
        splits = writer.finish()
        num_rows = {s: splits[s]["rows"] for s in SPLITS}
        facts = {"out": str(out), "rows": num_rows, "labels": writer.labels, "duplicates": report}
        # of what was prepared and of what was done to it since
        plan = hashlib.sha256(json.dumps([store.index["plan"], "dedup", report["threshold"]]).encode()).hexdigest()
        sources = writer.sources(store.index["sources"])
        told = {**store.index["report"], **facts, "sources": sources}
        index = {**store.index, "plan": plan, "sources": sources, "report": told, "splits": splits}
        write_text(unfinished / "README.md", dataset_card(index))
        write_sealed_json(unfinished / INDEX, index)
        unfinished.replace(out)
    flush_to_disk(out.parent)
    return num_rows


def _shards(store: Store, width: int) -> Iterator[tuple[dict[str, Any], Shard]]:
    """(index entry, open shard) of all splits, in order."""
    for split in SPLITS:
        for entry in store.shards(split):
            yield entry, open_shard(store.fetch(entry), width)


def _mean(states: np.ndarray | None, encoder: dict[str, Any]) -> np.ndarray:
    assert states is not None
    return mean_state(states, encoder)[None]
