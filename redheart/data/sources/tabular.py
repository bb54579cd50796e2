"""The user's files: .csv, .tsv, .parquet, .json, .jsonl, with `data.columns` to say which of their columns is which of our fields.

`data.columns: {NAME: {their_column: our_field}}`; a field may be one entry of a vector, such as `vad.valence`. With a mapping, columns
that it does not name are dropped (`split` stays, `id` where its values differ, and `contrast_text` beside a preference); without one,
the columns must have our names. In a CSV an empty cell is null, and a label is a number, JSON, yes, no, true, false, or the name of an
emotion; texts and ids stay as they are written, "2020" too. Of JSON, a label may be missing in records as long as one has it.
Nothing is scaled but what says so: `mood: vad.valence:1..5` reads a column that runs from 1 to 5, and `5..1` one that runs the other way.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from redheart.console import console
from redheart.data.sources.records import ALIASES, FIELDS, SEPARATOR, InvalidRecord, encoding_of, read_records
from redheart.data.sources.rows import Row, all_lines
from redheart.schema import LABELS, Label, RedHeartError

if TYPE_CHECKING:
    import pyarrow as pa

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
TARGETS = (*FIELDS, *(f"{name}.{entry}" for name, label in LABELS.items() if not label.scalar for entry in label.names))
WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}  # of labels that run from 0 to 1
KEPT = ("split", "id", "contrast_text")  # of a mapped table, without being named
HUGE = 10**300
ENDS = re.compile(r"(.+?):([-+]?[\d.]+)\.\.([-+]?[\d.]+)")


class Target(NamedTuple):
    """What a column is to us: a field, or an entry of one, and the numbers that stand for the ends of its range."""

    field: str
    entry: str = ""
    ends: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        return f"{self.field}.{self.entry}" if self.entry else self.field


def target_of(text: str, where: str) -> Target:
    """Reads `field`, `field.entry` or `field.entry:LOW..HIGH`; RedHeartError, with what may have been meant, where nothing is so called."""
    match = ENDS.fullmatch(text)
    name, ends = (match[1], (_float(match[2]), _float(match[3]))) if match else (text, None)
    field, _, entry = name.partition(".")
    target = Target(ALIASES.get(field, field), entry, ends)  # type: ignore[arg-type]
    if target.name not in TARGETS:
        last = {t: t.rpartition(".")[2] for t in TARGETS}
        meant = [t for t in TARGETS if last[t] == name] or difflib.get_close_matches(name, TARGETS, 1)
        meant = meant or [t for t in TARGETS if last[t] in difflib.get_close_matches(name, last.values(), 1)]
        hint = (
            f": did you mean {meant[0]}?"
            if meant
            else f": the answers are {', '.join(LABELS)}, and entries such as vad.valence"
        )
        raise RedHeartError(f"{where}: {name!r} is no field and no entry of a label{hint}")
    if ends is not None and (None in ends or ends[0] == ends[1]):
        raise RedHeartError(f"{where}: {text!r} needs two numbers that differ, such as {name}:1..5")
    if ends is not None and (target.field not in LABELS or not (entry or LABELS[target.field].scalar)):
        raise RedHeartError(
            f"{where}: {text!r} gives ends to what is no number: name one entry, such as vad.valence:1..5"
        )
    return target


def read(path: Path, name: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """Rows of a file of the kind that its suffix says; `columns` is the source's `data.columns`."""
    targets = {column: target_of(ours, f"data.columns.{name}") for column, ours in columns.items()}
    texts = [column for column, ours in targets.items() if ours.field == "text"] or ["text", "content"]
    written = delimiter_of(path, texts) if path.suffix.lower() in (".csv", ".tsv") else ""
    wanted = {*columns, *KEPT} if columns else None
    survey = _survey(path, name, written) if columns else Survey(frozenset(), False)
    hides_id = survey.id_repeats and not any(target.field == "id" for target in targets.values())
    if hides_id:
        console.print(
            f"{path}: values of its column 'id' repeat, and are not taken for ids of its rows (`id: id` would)"
        )
    for place, raw in as_written(path, name, written, wanted):
        if isinstance(raw, dict):
            row = {k: v for k, v in raw.items() if k != "id"} if hides_id else raw
            yield place, to_record(row, targets, place, written, survey.columns)
        else:
            yield place, raw


class Survey(NamedTuple):
    """What a file's rows say together: every column that one of them has, and whether those that are called `id` have equal values."""

    columns: Set[str]
    id_repeats: bool


def _survey(path: Path, name: str, written: str) -> Survey:
    columns, seen, repeats = set[str](), set[str](), False
    for _, raw in as_written(path, name, written, {"id"}):
        if isinstance(raw, dict):
            columns |= raw.keys()
            value = (_identity(raw.get("id"), False) or "").strip()
            repeats = repeats or (value != "" and value in seen)
            seen.add(value)
    return Survey(columns, repeats)


def as_written(path: Path, name: str, delimiter: str, wanted: Set[str] | None = None) -> Iterator[Row]:
    """A file's rows under its own names; in a CSV, whose columns `delimiter` parts, every value is text. Of Parquet, columns that are
    not `wanted` are null."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise RedHeartError(f"source {name}: {path} is none of {', '.join(SUFFIXES)}: convert it to one of them")
    if suffix in (".csv", ".tsv"):
        return all_lines(path, (), delimiter)
    return _parquet(path, wanted) if suffix == ".parquet" else read_records(path, name)


def header(path: Path, name: str, texts: Sequence[str] = ()) -> list[str]:
    """The names of a table's columns, or of all records' fields; `texts`: what the column of texts may be called."""
    delimiter = delimiter_of(path, texts) if path.suffix.lower() in (".csv", ".tsv") else ""
    rows = [row for _, row in as_written(path, name, delimiter, set())]
    found = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    if not found:
        raise next((row for row in rows if isinstance(row, InvalidRecord)), RedHeartError(f"{path} has no rows"))
    return list(map(str, found))


def delimiter_of(path: Path, texts: Sequence[str]) -> str:
    """What separates the columns: what a first line `sep=;` says, or the character that parts one of the `texts` columns from the
    others in the header, or, without any, the header and the first row into as many columns; else what the file's name says, a tab
    or a comma, which is tried first."""
    with path.open(encoding=encoding_of(path), errors="replace", newline="") as file:
        lines = (line for line in file if line.strip())
        head, row = next(lines, ""), next(lines, "")
    if said := SEPARATOR.match(head):
        return said[1]
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    bare = re.sub(r'"[^"]*"', "", head)  # without headings in quotes, which may hold any of them
    order = sorted(DELIMITERS, key=lambda d: d != usual)
    alike = [d for d in order if not texts and len(_parted(head, d)) == len(_parted(row, d)) > 1]
    for delimiter in alike or order:
        names = _parted(head, delimiter)
        known = bool(alike) or any(name in texts for name in names)
        if known or (delimiter != usual and len(names) > 1 and usual not in bare):
            if delimiter != usual:
                console.print(f"{path} is separated by {DELIMITERS[delimiter]}s")
            return delimiter
    return usual


def _parted(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # a cell beyond csv's limit, which is told when the row is read
        return []


def check_columns(columns: Mapping[str, Mapping[str, str]]) -> None:
    """Every target of `data.columns` is a field or an entry of a label, and nothing is filled twice."""
    for source, mapping in columns.items():
        filled: dict[str, str] = {}
        for column_name, text in mapping.items():
            target = target_of(text, f"data.columns.{source}")
            for other, column in filled.items():
                same_field = other.partition(".")[0] == target.field
                if same_field and (not target.entry or "." not in other or other == target.name):
                    raise RedHeartError(
                        f"data.columns.{source}: {column!r} and {column_name!r} both fill {text!r}: keep one"
                    )
            filled[target.name] = column_name


def to_record(
    raw: Mapping[str, Any], columns: Mapping[str, Target], place: str, written: str = "", known: Set[str] = frozenset()
) -> dict[str, Any] | InvalidRecord:
    """A raw record of the schema from one row. `written`: the delimiter where the values are text, as in a CSV, and labels are to be
    read from it. `known`: columns that other rows have, so that one of them that is not here, and not the text, is null."""
    missing = [c for c, target in columns.items() if c not in raw and (c not in known or target.field == "text")]
    if missing:
        close = difflib.get_close_matches(missing[0], [str(c) for c in known or raw], 1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        which = ": name the one of texts with --text" if missing[0] == columns[missing[0]].field == "text" else ""
        there = ", ".join(map(str, dict.fromkeys([*raw, *sorted(known)])))
        return InvalidRecord(f"{place}: there is no column {missing[0]!r}{meant}; there are {there}{which}")
    targets = dict(columns)
    taken = {target.name for target in columns.values()}
    compares = any(target.field == "preference" for target in columns.values())
    for key in raw if not columns else KEPT:
        if key in raw and key not in taken and (not columns or key != "contrast_text" or compares):
            targets.setdefault(key, Target(key))
    record: dict[str, Any] = {}
    for column, target in targets.items():
        value = _cell(raw[column], target, written) if written else raw.get(column)
        if target.field in LABELS:
            value = _without_decimals(value)
        if target.field == "id":
            value = _identity(value, column in columns or not columns)
        if value is None:
            continue  # as if it were not given
        label = LABELS.get(target.field)
        if label is not None and (target.entry or label.scalar) and (written or column in columns):
            value = _number(value, target, label, f"{place}: column {column!r}")
            if isinstance(value, InvalidRecord):
                return value
        if target.entry:
            record.setdefault(target.field, {})[target.entry] = value
        else:
            record[target.field] = value
    return record


def _identity(value: Any, is_named: bool) -> Any:
    """An id as text; a gap makes pandas keep whole numbers as 1.0. What is no id is null where nobody named the column."""
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int | Decimal | date) and not isinstance(value, bool):
        return str(value)
    return value if is_named or isinstance(value, str) else None


def _without_decimals(value: Any) -> Any:
    """What Parquet keeps as decimal is a number like any other."""
    if isinstance(value, list):
        return [_without_decimals(v) for v in value]
    return float(value) if isinstance(value, Decimal) else value


def _number(value: Any, target: Target, label: Label, where: str) -> Any:
    """A label's number, from a number, a truth value or a word, in the label's own range."""
    low, high = (label.low, label.high) if target.ends is None else sorted(target.ends)
    if isinstance(value, str):
        number = _float(value)  # strings of JSON and of Parquet may hold one
        known = WORDS if target.ends is None and label.low == 0 else {}
        value = known.get(value.strip().casefold(), value if number is None else number)
    elif isinstance(value, bool) and target.ends is None and label.low == 0:
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        words = "a number, yes, no, true or false" if label.low == 0 and target.ends is None else "a number"
        return InvalidRecord(f"{where} holds {str(value)[:40]!r}, which is not {words}")
    if isinstance(value, float) and math.isnan(value):
        return InvalidRecord(f"{where} holds {value}: leave a cell empty where there is no label")
    if not low <= value <= high:
        beyond = isinstance(value, int) and abs(value) >= HUGE  # of every float
        digits = f"{str(value)[:12]}…" if beyond else f"{value:g}"
        said = f"{where} holds {digits}, and {target.name} "
        if target.ends is None:
            said += f"runs from {low:g} to {high:g}: if the column runs between other numbers, name them: {target.name}:LOW..HIGH"
            return InvalidRecord(said)
        return InvalidRecord(said + f"is said to run from {target.ends[0]:g} to {target.ends[1]:g} there")
    if target.ends is None:
        return value
    first, last = target.ends
    return label.low + (value - first) / (last - first) * (label.high - label.low)


def _cell(text: str, target: Target, delimiter: str) -> Any:
    """The value that a CSV's cell stands for in a field."""
    if not text.strip():
        return None
    if ALIASES.get(target.field, target.field) not in LABELS and target.field != "label_origin":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if delimiter != "," and re.fullmatch(r"\s*[-+]?\d*,\d+\s*", text):
        text = text.replace(",", ".")  # as spreadsheets write numbers where a comma cannot part columns
    number = _float(text)  # such as .5, which JSON does not know
    return text.strip() if number is None else number


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _parquet(path: Path, wanted: Set[str] | None) -> Iterator[tuple[str, dict[str, Any] | InvalidRecord]]:
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise RedHeartError(f"{path}: two columns have the same name ({', '.join(names)}): rename one")
        read = [name for name in names if wanted is None or name in wanted]
        for batch in file.iter_batches():
            for row in range(batch.num_rows):
                number += 1
                yield f"{path.name}: row {number}", cells(batch, row, names, read, f"{path.name}: row {number}")
    except (OSError, ValueError) as error:
        raise RedHeartError(f"{path} is not a readable Parquet file ({error})") from error


def cells(
    batch: pa.RecordBatch | pa.Table, row: int, names: Sequence[str], read: Sequence[str], place: str
) -> dict[str, Any] | InvalidRecord:
    """A row as Python's values; those of columns that are not `read` are null."""
    cells: dict[str, Any] = dict.fromkeys(names)
    for name in read:
        cell = batch.column(name).slice(row, 1)
        try:
            cells[name] = _python(cell)
        except UnicodeDecodeError as error:
            return InvalidRecord(f"{place}: not UTF-8 ({error.reason} at byte {error.start})")
        except (ArithmeticError, ValueError, LookupError, NotImplementedError) as error:
            return InvalidRecord(f"{place}: column {name!r} cannot be read ({error})")
    return cells


def _python(cell: pa.Array | pa.ChunkedArray) -> Any:
    """The value of an array of one; dates that Python does not know, such as those behind the year 9999, as text."""
    try:
        return cell.to_pylist()[0]
    except (ArithmeticError, ValueError, LookupError):
        return cell.cast("string").to_pylist()[0]
