"""The user's files: .csv, .parquet, .json, .jsonl, with `data.columns` to say which of their columns is which of our fields.

`data.columns: {NAME: {their_column: our_field}}`; a field may be one entry of a vector, such as `vad.valence`. With a mapping, columns
that it does not name are dropped (`split` and `id` stay); without one, the columns must have our names. In a CSV an empty cell is null,
and a label is a number, JSON, or the name of an emotion; texts and ids stay as they are written, "2020" too. Nothing is scaled.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from redheart.console import console
from redheart.data.sources.records import ALIASES, FIELDS, InvalidRecord, encoding_of, read_records
from redheart.data.sources.rows import Row, all_lines
from redheart.schema import LABELS, RedHeartError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def read(path: Path, name: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """Rows of a file of the kind that its suffix says; `columns` is the source's `data.columns`."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        texts = [column for column, ours in columns.items() if ALIASES.get(ours, ours) == "text"] or [
            "text",
            "content",
        ]
        for place, cells in all_lines(path, (), delimiter_of(path, texts)):
            yield place, to_record(cells, columns, place, written=True) if isinstance(cells, dict) else cells
    elif suffix == ".parquet":
        for place, row in _parquet(path):
            yield place, row if isinstance(row, InvalidRecord) else to_record(row, columns, place)
    elif suffix in SUFFIXES:
        for number, raw in read_records(path, name):
            place = f"{path}: record {number}"
            yield place, to_record(raw, columns, place) if isinstance(raw, dict) else raw
    else:
        raise RedHeartError(f"source {name}: {path} is none of {', '.join(SUFFIXES)}: convert it to one of them")


def delimiter_of(path: Path, texts: Sequence[str]) -> str:
    """What separates the columns: the character that parts one of the `texts` columns from the others in the header, else a comma."""
    with path.open(encoding=encoding_of(path), errors="replace", newline="") as file:
        head = next((line for line in file if line.strip()), "")
    for delimiter in DELIMITERS:
        names = next(csv.reader([head], delimiter=delimiter), [])
        if any(name in texts for name in names) or (delimiter != "," and len(names) > 1 and "," not in head):
            if delimiter != ",":
                console.print(f"{path} is separated by {DELIMITERS[delimiter]}s")
            return delimiter
    return ","


def check_columns(columns: Mapping[str, Mapping[str, str]]) -> None:
    """Every target of `data.columns` is a field or an entry of a label, and nothing is filled twice."""
    for source, mapping in columns.items():
        filled: dict[str, str] = {}
        for column_name, target in mapping.items():
            field, _, entry = target.partition(".")
            field = ALIASES.get(field, field)
            if field not in FIELDS or (entry and (field not in LABELS or entry not in LABELS[field].names)):
                raise RedHeartError(f"data.columns.{source}: {target!r} is no field and no entry of a label")
            for other, column in filled.items():
                same_field = other.partition(".")[0] == field
                if same_field and (not entry or "." not in other or other == f"{field}.{entry}"):
                    raise RedHeartError(
                        f"data.columns.{source}: {column!r} and {column_name!r} both fill {target!r}: keep one"
                    )
            filled[f"{field}.{entry}" if entry else field] = column_name


def to_record(
    raw: Mapping[str, Any], columns: Mapping[str, str], place: str, written: bool = False
) -> dict[str, Any] | InvalidRecord:
    """A raw record of the schema from one row. `written`: the values are text, as in a CSV, and labels are to be read from it."""
    missing = [c for c in columns if c not in raw]
    if missing:
        there = ", ".join(map(str, raw))
        return InvalidRecord(f"{place}: column {missing[0]!r} of data.columns is missing; there are {there}")
    targets = dict(columns)
    for key in raw if not columns else ("split", "id"):
        if key in raw and key not in targets.values():
            targets.setdefault(key, key)
    record: dict[str, Any] = {}
    for column, target in targets.items():
        field, _, entry = target.partition(".") if column in columns else (column, "", "")
        value = _cell(raw[column], ALIASES.get(field, field)) if written else raw[column]
        if field == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None:
            continue  # as if it were not given
        if entry:
            record.setdefault(field, {})[entry] = value
        else:
            record[field] = value
    return record


def _cell(text: str, field: str) -> Any:
    """The value that a CSV's cell stands for in `field`."""
    if not text.strip():
        return None
    if field not in LABELS and field != "label_origin":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return float(text)  # such as .5, which JSON does not know
    except ValueError:
        return text.strip()


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | InvalidRecord]]:
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise RedHeartError(f"{path}: two columns have the same name ({', '.join(names)}): rename one")
        for batch in file.iter_batches():
            for row in range(batch.num_rows):
                number += 1
                place = f"{path.name}: row {number}"
                try:
                    yield place, batch.slice(row, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield place, InvalidRecord(f"{place}: not UTF-8 ({error.reason} at byte {error.start})")
    except (OSError, ValueError) as error:
        raise RedHeartError(f"{path} is not a readable Parquet file ({error})") from error
