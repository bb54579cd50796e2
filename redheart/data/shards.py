"""Shards: Arrow files of preprocessed samples, and the index that names them (rows, lengths, sha256).

A data directory holds `index.json` and SPLIT-00000.arrow …; it is committed by the index, written last. Columns as
DESIGN §3; `features` is list<fixed_size_list<float16, E>>, without padding. Arrow, not Parquet: float16 features do not
compress, and a row of a memory-mapped Arrow file is read without decoding its neighbours. The rows of a shard are sorted by
their length bucket (data/order.py), the shards of a split are random parts of it. `datasets.load_dataset` reads the files too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redheart.data.order import bucket
from redheart.files import sha256_of
from redheart.schema import LABEL_COLUMNS, LABELS, NUM_LABEL_COLUMNS, ORIGINS, SPLITS, RedHeartError

INDEX = "index.json"
FORMAT_VERSION = 3  # 3: the index carries its own sha256
LABEL_REMEDY = (
    "name their columns (--label of `train`, data.columns of `prepare`), let the LLM label (data.labeler.max_texts not 0), or take "
    "a source with labels"
)


def content_digest(index: Mapping[str, Any]) -> str:
    """Hex sha256 of which rows the splits of an index hold and where: the shards' own sha256, and how often each is shown."""
    shards = {
        s: [[e["file"], e["sha256"], e["rows"], e["repeat"]] for e in f["shards"]] for s, f in index["splits"].items()
    }
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


class _Entry(BaseModel):
    """A shard in the index."""

    model_config = ConfigDict(extra="forbid")
    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    rows: int = Field(ge=0)
    repeat: int = Field(1, ge=1)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    buckets: list[tuple[int, int]]


class _Split(BaseModel):
    rows: int = Field(ge=0)
    shards: list[_Entry]
    histograms: dict[str, list[list[tuple[int, float]]]] = {}
    label_counts: dict[str, list[int]] = {}  # earlier versions did not count


class _Encoder(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str
    width: int = Field(gt=0)


class _Index(BaseModel):
    """What readers of an index rely on; the card and the report are told as they are."""

    model_config = ConfigDict(extra="allow")
    plan: str
    encoder: _Encoder
    sources: dict[str, dict[str, Any]]
    splits: dict[str, _Split]


def check_index(index: dict[str, Any], where: str) -> None:
    """Raises RedHeartError, naming the key, unless an index has the form that this program writes and agrees with itself."""
    try:
        known = _Index.model_validate(index)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RedHeartError(f"{where}: {key}: {first['msg']}: prepare the data again") from None
    for split, facts in known.splits.items():
        for entry in facts.shards:
            if entry.rows != sum(count for _, count in entry.buckets):
                raise RedHeartError(f"{where} contradicts itself about shard {entry.file}: prepare the data again")
        if facts.rows != sum(entry.rows for entry in facts.shards):
            raise RedHeartError(f"{where} contradicts itself about the rows of {split}: prepare the data again")


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
    rows = pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float16, copy=False).ravel()), encoder_width)
    missing = pa.array([s is None for s in states])
    return pa.ListArray.from_arrays(offsets, rows, mask=missing)


def write_shard(
    path: Path, records: Sequence[dict[str, Any]], encoder_width: int, max_tokens: int, repeat: int = 1
) -> dict[str, Any]:
    """Writes one shard, rows sorted by length bucket, and returns its index entry.

    Each record carries `features` and `contrast_features` as arrays (or None). `repeat`: how often an epoch shows its rows.
    """
    contrast_lengths = [0 if r["contrast_features"] is None else len(r["contrast_features"]) for r in records]
    buckets = [bucket(len(r["features"]), c, max_tokens) for r, c in zip(records, contrast_lengths, strict=True)]
    records = [records[i] for i in np.argsort(buckets, kind="stable")]
    schema = arrow_schema(encoder_width)
    columns = []
    for field in schema:
        values = [r.get(field.name) for r in records]
        if field.name in ("features", "contrast_features"):
            columns.append(features_array(values, encoder_width))
        else:
            columns.append(pa.array(values, field.type))
    temporary = path.with_name(path.name + ".tmp")
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    temporary.rename(path)
    return {
        "file": path.name,
        "rows": len(records),
        "repeat": repeat,
        "tokens": sum(len(r["features"]) for r in records) + sum(contrast_lengths),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "buckets": sorted(Counter(buckets).items()),
    }


class SplitsWriter:
    """Writes the shards of a data directory one by one; `finish` gives the index entries of its splits.

    `labels` counts by label and origin the entries written so far.
    """

    def __init__(self, out: Path, encoder_width: int, max_tokens: int):
        self._out, self._width, self._max_tokens = out, encoder_width, max_tokens
        self._splits: dict[str, dict[str, Any]] = {s: {"rows": 0, "tokens": 0, "shards": []} for s in SPLITS}
        self._origins: dict[str, Counter[str]] = {name: Counter() for name in LABELS}
        self._sources = Counter[str]()

    def sources(self, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The facts about each source with its `rows_written` so far, which drawing, mixing and duplicates may have made fewer."""
        return {name: {**of, "rows_written": self._sources[name]} for name, of in facts.items()}

    @property
    def labels(self) -> dict[str, dict[str, int]]:
        return {name: dict(counts) for name, counts in self._origins.items() if counts}

    def write(self, file: str, rows: Sequence[dict[str, Any]], repeat: int) -> None:
        """Writes `rows`, all of one split, as `write_shard` does; no rows, no shard."""
        if not rows:
            return
        for row in rows:
            self._sources[row["source"]] += 1
            for name, label in LABELS.items():
                if row[name] is not None:
                    known = 1 if label.scalar else sum(v is not None for v in row[name])
                    self._origins[name][row["label_origin"][name]] += known
        split = self._splits[rows[0]["split"]]
        entry = write_shard(self._out / file, rows, self._width, self._max_tokens, repeat)
        split["shards"].append(entry)
        split["rows"] += entry["rows"]
        split["tokens"] += entry["tokens"]

    def finish(self) -> dict[str, Any]:
        for split in self._splits.values():
            opened = ((open_shard(self._out / e["file"], self._width), e["repeat"]) for e in split["shards"])
            split |= label_facts((s.values, s.weights * repeat) for s, repeat in opened)
        return self._splits


@dataclass(frozen=True)
class Shard:
    """An open shard: token features as views into the memory-mapped file, labels as dense arrays.

    `values` [rows, NUM_LABEL_COLUMNS] is NaN where there is no label; `weights` and `origins` are [rows, number of labels].
    `labels` holds values and weights side by side.
    """

    table: pa.Table
    ids: list[str]
    features: _Ragged
    contrasts: _Ragged
    labels: np.ndarray
    origins: np.ndarray

    @property
    def values(self) -> np.ndarray:
        return self.labels[:, :NUM_LABEL_COLUMNS]

    @property
    def weights(self) -> np.ndarray:
        return self.labels[:, NUM_LABEL_COLUMNS:]


class _Ragged:
    """A list<fixed_size_list<float16, E>> column; [i] is row i as a [T, E] view, or None where null."""

    def __init__(self, column: pa.ListArray, width: int):
        self._offsets = column.offsets.to_numpy().tolist()
        self._valid = column.is_valid().to_numpy(zero_copy_only=False).tolist()
        values = column.values
        self._values = values.values[values.offset * width :].to_numpy().reshape(-1, width)

    def __getitem__(self, row: int) -> np.ndarray | None:
        return self._values[self._offsets[row] : self._offsets[row + 1]] if self._valid[row] else None


def open_shard(path: Path, encoder_width: int) -> Shard:
    """Memory-maps a shard through HF datasets. The file must be verified already; its columns are checked here."""
    import datasets

    table = datasets.Dataset.from_file(str(path)).data.table
    if not table.schema.equals(arrow_schema(encoder_width), check_metadata=False):
        raise RedHeartError(f"shard {path} has other columns than this program writes: prepare the data again")
    column = {name: table[name].chunk(0) for name in table.column_names}  # one record batch, as written
    values = np.full((len(table), NUM_LABEL_COLUMNS), np.nan, np.float32)
    for name, label in LABELS.items():
        entries = column[name]
        if label.scalar:
            values[:, LABEL_COLUMNS[name]] = entries.to_numpy(zero_copy_only=False)[:, None]
        else:
            known = entries.is_valid().to_numpy(zero_copy_only=False)
            flat = entries.flatten().to_numpy(zero_copy_only=False)
            values[known, LABEL_COLUMNS[name]] = flat.reshape(-1, label.size)
    weights = [column["label_weight"].field(n).to_numpy(zero_copy_only=False) for n in LABELS]
    origins = [_origin_codes(column["label_origin"].field(n)) for n in LABELS]
    return Shard(
        table=table,
        ids=column["id"].to_pylist(),
        features=_Ragged(column["features"], encoder_width),
        contrasts=_Ragged(column["contrast_features"], encoder_width),
        labels=np.concatenate([values, np.nan_to_num(np.stack(weights, 1).astype(np.float32))], 1),
        origins=np.stack(origins, 1),
    )


def _origin_codes(column: pa.Array) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.fill_null(pc.index_in(column, pa.array(ORIGINS)), -1).to_numpy().astype(np.int8)


BINS = 101


Histograms = dict[str, list[list[tuple[int, float]]]]  # by label and entry: (step, summed weight) where there is any


def label_facts(shards: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """What an index says of a split's labels, from (values, weights) of its rows, by label and entry:

    `histograms`, the summed weight in 101 equal steps of the label's range (Histograms), enough to set the scale of every loss at
    the start of a run without reading the data; and `label_counts`, the rows with a label that weighs anything.
    """
    sums = {name: np.zeros((label.size, BINS)) for name, label in LABELS.items()}
    counts = {name: np.zeros(label.size, int) for name, label in LABELS.items()}
    for values, weights in shards:
        for column, (name, label) in enumerate(LABELS.items()):
            steps = (values[:, LABEL_COLUMNS[name]] - label.low) / (label.high - label.low) * (BINS - 1)
            for entry in range(label.size):
                known = ~np.isnan(steps[:, entry])
                counts[name][entry] += (weights[known, column] > 0).sum()
                place = steps[known, entry].round().astype(int)
                sums[name][entry] += np.bincount(place, weights[known, column], minlength=BINS)
    histograms = {
        name: [[(int(step), round(float(row[step]), 4)) for step in np.flatnonzero(row)] for row in total]
        for name, total in sums.items()
        if total.any()
    }
    return {"histograms": histograms, "label_counts": {name: counts[name].tolist() for name in histograms}}


def histogram_arrays(histograms: Histograms) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(values, weights) by label, float32 [101, size]: a weighted sample that stands for the whole split."""
    values, weights = {}, {}
    for name, label in LABELS.items():
        steps = np.linspace(label.low, label.high, BINS, dtype=np.float32)
        values[name] = np.repeat(steps[:, None], label.size, 1)
        weights[name] = np.zeros((BINS, label.size), np.float32)
        for entry, pairs in enumerate(histograms.get(name, [])):
            for step, weight in pairs:
                weights[name][step, entry] = weight
    return values, weights
