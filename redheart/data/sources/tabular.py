"""Other people's tables: .csv, .parquet, or any data set of the hub, with `data.columns` to say which column is which field.

`data.columns: {NAME: {their_column: our_field}}`; a field may be one entry of a vector, such as `vad.valence`. Without a mapping the
columns must have our names. Values of labels may be numbers, JSON in a CSV cell, or names of emotions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from redheart.data.sources.records import InvalidRecord
from redheart.data.sources.rows import table
from redheart.schema import LABELS, RedHeartError

HUB_SPLITS = {"train": "train", "validation": "dev", "valid": "dev", "val": "dev", "dev": "dev", "test": "test"}


def csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | InvalidRecord]]:
    """Rows of a CSV with a header; empty cells are null, cells that are JSON numbers or lists are read as such."""
    for place, row in table(path, ()):
        yield place, row if isinstance(row, InvalidRecord) else {k: _cell(v) for k, v in row.items()}


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}: row {number}", row
    except (OSError, ValueError) as error:
        raise RedHeartError(f"{path} is not a readable Parquet file ({error})") from error


def hub_rows(identity: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams every split of `OWNER/NAME` or `OWNER/NAME:CONFIG` (or of a local directory that `datasets` reads)."""
    import datasets

    name, _, config = identity.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
        for split, rows in splits.items():
            for number, row in enumerate(rows):
                known = HUB_SPLITS.get(str(split))
                yield f"{name} {split}: row {number + 1}", {**({"split": known} if known else {}), **row}
    except (OSError, ValueError, ConnectionError) as error:
        first = str(error).strip().splitlines()[0]
        raise RedHeartError(
            f"data set {identity!r} cannot be read ({first}): check its name and the network"
        ) from error


def map_columns(raw: Any, mapping: Mapping[str, str], place: str) -> Any:
    """`raw` with its columns renamed to our fields; columns that the mapping does not name are dropped (`split` and `id` stay)."""
    if not mapping or not isinstance(raw, dict):
        return raw
    missing = [c for c in mapping if c not in raw]
    if missing:
        return InvalidRecord(
            f"{place}: column {missing[0]!r} of data.columns is missing; there are {', '.join(map(str, raw))}"
        )
    mapped: dict[str, Any] = {k: raw[k] for k in ("split", "id") if k in raw and k not in mapping}
    for theirs, ours in mapping.items():
        field, _, entry = ours.partition(".")
        if not entry:
            mapped[ours] = raw[theirs]
        elif field in LABELS and entry in LABELS[field].names:
            mapped.setdefault(field, {})[entry] = raw[theirs]
        else:
            raise RedHeartError(f"data.columns: {ours!r} is no field and no entry of a label")
    return mapped


def _cell(text: str) -> Any:
    if text == "":
        return None
    if text[0] in "-0123456789[{" or text == "null":
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text
