"""Shards: Parquet files of preprocessed samples, and the index that names them (rows, tokens, sha256).

A data directory holds `index.json` and SPLIT-00000.parquet …; it is committed by the index, written last.
Columns as DESIGN §3; `features` is list<fixed_size_list<float16, E>>, without padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from redheart.files import read_json, sha256_of
from redheart.schema import LABELS, SPLITS, RedHeartError

INDEX = "index.json"
FORMAT_VERSION = 1


def arrow_schema(encoder_width: int) -> pa.Schema:
    """The columns of a shard whose token features are `encoder_width` wide."""
    tokens = pa.list_(pa.list_(pa.float16(), encoder_width))
    text = [pa.field(name, pa.string()) for name in ("id", "source", "split", "lang", "text", "contrast_text")]
    features = [pa.field("features", tokens), pa.field("contrast_features", tokens)]
    labels = [pa.field(n, pa.float32() if lab.scalar else pa.list_(pa.float32())) for n, lab in LABELS.items()]
    weight = pa.field("label_weight", pa.struct([pa.field(n, pa.float32()) for n in LABELS]))
    origin = pa.field("label_origin", pa.struct([pa.field(n, pa.string()) for n in LABELS]))
    return pa.schema([*text, *features, *labels, weight, origin])


def features_array(states: Iterable[np.ndarray | None], encoder_width: int) -> pa.Array:
    """[T_i, E] arrays (or None) -> one list<fixed_size_list<float16>> array, without a Python loop over values."""
    states = list(states)
    lengths = [0 if s is None else len(s) for s in states]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    full = [s for s in states if s is not None]
    values = np.concatenate(full) if full else np.zeros((0, encoder_width), np.float16)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float16).ravel()), encoder_width)
    missing = pa.array([s is None for s in states])
    return pa.ListArray.from_arrays(offsets, rows, mask=missing)


def write_shard(path: Path, records: list[dict[str, Any]], encoder_width: int) -> dict[str, Any]:
    """Writes one shard and returns its index entry. Each record carries `features` and `contrast_features` as arrays."""
    schema = arrow_schema(encoder_width)
    columns = []
    for field in schema:
        values = [r.get(field.name) for r in records]
        if field.name in ("features", "contrast_features"):
            columns.append(features_array(values, encoder_width))
        else:
            columns.append(pa.array(values, field.type))
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), temporary, compression="zstd", row_group_size=512)
    temporary.rename(path)
    tokens = sum(len(r["features"]) for r in records)
    return {"file": path.name, "rows": len(records), "tokens": tokens, "sha256": sha256_of(path)}


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a data directory, checked for its version and for an encoder."""
    index = read_json(directory / INDEX, f"run `redheart prepare --source NAME=PATH --out {directory}` first")
    if index.get("version") != FORMAT_VERSION:
        raise RedHeartError(
            f"{directory / INDEX} has version {index.get('version')}, this program reads {FORMAT_VERSION}: prepare it again"
        )
    return index


def shard_paths(directory: Path, index: Mapping[str, Any], split: str) -> list[Path]:
    """The verified shards of a split. A missing or damaged one is an error that names it."""
    if split not in SPLITS:
        raise RedHeartError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    paths = []
    for entry in index["splits"].get(split, {"shards": []})["shards"]:
        path = directory / entry["file"]
        if not path.is_file():
            raise RedHeartError(f"shard {path} is missing although {INDEX} names it: prepare the data again")
        if sha256_of(path) != entry["sha256"]:
            raise RedHeartError(f"shard {path} is damaged (its sha256 differs from {INDEX}): prepare the data again")
        paths.append(path)
    return paths
