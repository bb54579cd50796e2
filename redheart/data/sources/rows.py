"""What the converters share: reading lines and tables row by row, so that one bad row is one named reason, not a crash."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redheart.data.sources.records import InvalidRecord
from redheart.schema import RedHeartError


@dataclass(frozen=True)
class LeftOut:
    """A row that the corpus holds and the project has no use for; counted under its reason, never an error."""

    reason: str


Row = tuple[str, dict[str, Any] | InvalidRecord | LeftOut]  # (place, a raw record of the schema or why there is none)


def need(path: Path, spec: str) -> Path:
    """`path` if it is a file; otherwise an error that says what `spec` expects."""
    if not path.is_file():
        raise RedHeartError(f"{spec}: {path} does not exist: give the directory that holds {path.name}")
    return path


def lines(path: Path) -> Iterator[tuple[str, str | InvalidRecord]]:
    """(place, line without its end) of a UTF-8 file in which a line is a row."""
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            place = f"{path.parent.name}/{path.name}: row {number + 1}"
            try:
                yield place, raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield place, InvalidRecord(f"{place}: not UTF-8 ({error.reason} at byte {error.start})")


def tsv(path: Path, columns: int) -> Iterator[tuple[str, list[str] | InvalidRecord]]:
    """(place, cells) of a tab-separated file without quoting; a row with another number of cells is invalid."""
    for place, line in lines(path):
        if isinstance(line, InvalidRecord):
            yield place, line
            continue
        cells = line.split("\t")
        yield place, cells if len(cells) == columns else InvalidRecord(f"{place}: {len(cells)} columns, not {columns}")


def table(
    path: Path, header: Sequence[str] | None, delimiter: str = ",", columns: int | None = None
) -> Iterator[tuple[str, dict[str, str] | InvalidRecord]]:
    """(place, cells by column) of a quoted CSV whose fields may hold line breaks. `header` lists the columns that must be there;
    None: the file has no header and `columns` numbered ones.
    """
    csv.field_size_limit(
        2**31 - 1
    )  # beyond its default csv would stop inside a text; parse_record bounds it, with a reason
    content = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")  # bad bytes stay visible in their row
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None if header is not None else [str(i) for i in range(columns or 0)]
    number = 0
    while True:
        number += 1
        place = f"{path.parent.name}/{path.name}: row {number}"
        try:
            cells = next(reader)
        except StopIteration:
            if names is None:
                raise RedHeartError(f"{path} is empty: it needs a header with the names of its columns") from None
            return
        except csv.Error as error:
            yield place, InvalidRecord(f"{place}: {error}")
            continue
        if not cells:
            continue  # an empty line is no row
        if names is None:
            names = cells
            if len(set(names)) < len(names):
                raise RedHeartError(f"{path}: two columns have the same name ({', '.join(names)}): rename one")
            missing = [c for c in header or () if c not in names]
            if missing:
                raise RedHeartError(f"{path}: column {missing[0]!r} is missing; it has {', '.join(names)}")
        elif len(cells) != len(names):
            yield place, InvalidRecord(f"{place}: {len(cells)} columns, not {len(names)}")
        elif any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
            yield place, InvalidRecord(f"{place}: not UTF-8")
        else:
            yield place, dict(zip(names, cells, strict=True))


def choice(value: str, legal: Sequence[str], place: str, column: str) -> str | InvalidRecord:
    """`value` if it is one of `legal`."""
    return value if value in legal else InvalidRecord(f"{place}: {column} {value!r} is none of {', '.join(legal)}")


def label_ids(cell: str, count: int, place: str) -> list[int] | InvalidRecord:
    """The ids of a cell such as `3,17`, each in [0, count)."""
    ids = cell.split(",")
    if all(i.isascii() and i.isdigit() and len(i) < 4 and int(i) < count for i in ids):
        return [int(i) for i in ids]
    return InvalidRecord(f"{place}: label ids {cell[:80]!r} are not of 0 to {count - 1}")


def number(value: str, low: float, high: float, place: str, column: str) -> float | InvalidRecord:
    """A number in [low, high]."""
    try:
        parsed = float(value)
    except ValueError:
        return InvalidRecord(f"{place}: {column} {value!r} is not a number")
    if not low <= parsed <= high:
        return InvalidRecord(f"{place}: {column} {value!r} is not between {low:g} and {high:g}")
    return parsed


def coin(text: str) -> bool:
    """Heads or tails by the text's hash: decides which side of a pair comes first where a corpus always lists the same one."""
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 0


def tenth(group: str) -> int:
    """0 to 9 by the group's hash: siblings (rows about one situation) always fall together."""
    return int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) % 10


def dev_of_train(group: str) -> str:
    """`dev` for a tenth of the groups, else `train`: for corpora that publish no dev split."""
    return "dev" if tenth(group) == 0 else "train"
