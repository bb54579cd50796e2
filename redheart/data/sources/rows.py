"""What the converters share: reading lines and tables row by row, so that one bad row is one named reason, not a crash."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

from redheart.data.sources.records import EMPTY, SEPARATOR, InvalidRecord, LeftOut, encoding_of
from redheart.schema import RedHeartError

Row = tuple[str, dict[str, Any] | InvalidRecord | LeftOut]  # (place, a raw record of the schema or why there is none)
T = TypeVar("T")


def converted(
    rows: Iterable[tuple[str, T | InvalidRecord]], convert: Callable[[T, str], dict[str, Any] | LeftOut]
) -> Iterator[Row]:
    """Every row through `convert`, which is given the row and its place and raises InvalidRecord where it is wrong."""
    for place, row in rows:
        if isinstance(row, InvalidRecord):
            yield place, row
            continue
        try:
            record: dict[str, Any] | InvalidRecord | LeftOut = convert(row, place)
        except InvalidRecord as error:
            record = error
        yield place, record


def need(path: Path, spec: str) -> Path:
    """`path` if it is a file; otherwise an error that says what `spec` expects."""
    if not path.is_file():
        raise RedHeartError(f"{spec}: {path} does not exist: give the directory that holds {path.name}")
    return path


def _short(path: Path) -> str:
    return "/".join(path.parts[-2:])


def lines(path: Path) -> Iterator[tuple[str, str | InvalidRecord]]:
    """(place, line without its end) of a UTF-8 file in which a line is a row. A place is FILE:LINE."""
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            place = f"{_short(path)}:{number + 1}"
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
    """(place, cells by column) of a quoted CSV whose fields may hold line breaks, its empty lines passed over. `header` lists the
    columns that must be there; None: the file has no header and `columns` numbered ones.
    """
    for place, row in all_lines(path, header, delimiter, columns):
        if row is BLANK:
            yield place, InvalidRecord(f"{place}: {BLANK.reason}")
        elif not isinstance(row, LeftOut):
            yield place, row


BLANK = LeftOut("all cells are empty")


def all_lines(
    path: Path, header: Sequence[str] | None, delimiter: str = ",", columns: int | None = None
) -> Iterator[tuple[str, dict[str, str] | InvalidRecord | LeftOut]]:
    """As `table`, with a LeftOut for each line after the header that is empty or holds empty cells only.

    Every line is in one row, so that none is lost unsaid: a quote that swallows lines by mistake ends with an error about the file.
    """
    names: list[str] | None = None if header is not None else [str(i) for i in range(columns or 0)]
    read = list(_cells(path, delimiter))
    if names is None:
        start = next((i for i, (_, _, cells) in enumerate(read) if cells), None)
        if start is None:
            raise RedHeartError(f"{path} is empty: it needs a header with the names of its columns")
        head = read[start][2]
        if isinstance(head, csv.Error):
            raise RedHeartError(f"{path}: its header cannot be read ({head})")
        read = [(0, 0, [])] * (start + 1) + read[start + 1 :]
        names, read = _without_bare(head, read)
        if len(set(names)) < len(names):
            raise RedHeartError(f"{path}: two columns have the same name ({', '.join(names)}): rename one")
        missing = [c for c in header or () if c not in names]
        if missing:
            raise RedHeartError(f"{path}: column {missing[0]!r} is missing; it has {', '.join(names)}")
    whole = [cells for _, _, cells in read if isinstance(cells, list) and len(cells) == len(names)]
    known = [set(column) for column in zip(*whole, strict=True)]
    for first, last, cells in read:
        if last > first and isinstance(cells, list) and _swallows(cells, known, delimiter):
            raise RedHeartError(
                f"{path}: a quoted cell opens in line {first} and holds whole rows up to line {last}: a quote is missing, or one too many"
            )
    for first, _, cells in read:
        place = f"{_short(path)}:{first}"
        if not first:
            continue  # the header, and what stands above it
        if isinstance(cells, csv.Error):
            yield place, InvalidRecord(f"{place}: {cells}")
        elif not cells:
            yield place, EMPTY
        elif not any(cell.strip() for cell in cells):
            yield place, BLANK
        elif len(cells) != len(names):
            yield place, InvalidRecord(f"{place}: {len(cells)} columns, not {len(names)}")
        elif any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
            yield place, InvalidRecord(f"{place}: not UTF-8")
        else:
            yield place, dict(zip(names, cells, strict=True))


_Cells = list[str] | csv.Error


def _without_bare(
    head: list[str], read: list[tuple[int, int, _Cells]]
) -> tuple[list[str], list[tuple[int, int, _Cells]]]:
    """The header and the rows without columns of neither name nor value, which spreadsheets write beside a table."""
    rows = [cells for _, _, cells in read if isinstance(cells, list) and len(cells) == len(head)]
    kept = [i for i, name in enumerate(head) if name.strip() or any(cells[i].strip() for cells in rows)]
    if len(kept) == len(head):
        return head, read

    def shorter(cells: _Cells) -> _Cells:
        return [cells[i] for i in kept] if isinstance(cells, list) and len(cells) == len(head) else cells

    return [head[i] for i in kept], [(first, last, shorter(cells)) for first, last, cells in read]


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, int, _Cells]]:
    """(first line, last line, cells) of each row of a CSV; RedHeartError where a broken row takes others with it."""
    # beyond its default csv would stop inside a text; parse_record bounds it, with a reason
    csv.field_size_limit(2**31 - 1)
    encoding = encoding_of(path)
    try:  # bad bytes of UTF-8 stay visible in their row
        content = path.read_bytes().decode(encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict")
    except UnicodeDecodeError as error:
        raise RedHeartError(f"{path} is not {encoding.upper()} ({error}): save it as UTF-8") from None
    content = content.removeprefix(said[0]) if (said := SEPARATOR.match(content)) else content
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > first:
                raise RedHeartError(
                    f"{path}: a quoted cell opens in line {first} and is not closed as it should be up to line {reader.line_num} "
                    f"({error}): write a quote inside of a cell twice, and put that cell in quotes"
                ) from None
            yield first, first, error
        else:
            yield first, reader.line_num, cells


def _swallows(cells: Sequence[str], known: Sequence[Set[str]], delimiter: str) -> bool:
    """Whether a cell of several lines is rows of this table, made one by a stray quote: each of its lines has the cells that would
    then be there, and one of them is a value that a row has in that column, two in all. `known`: the values of each column.
    """
    for column, cell in enumerate(cells):
        lines = cell.splitlines()
        matches = []  # of each line that has other cells
        for number, line in enumerate(lines):
            offset = column if number == 0 else 0
            places = [(offset + i, value) for i, value in enumerate(line.split(delimiter))]
            if places[-1][0] + 1 != (column + 1 if number == len(lines) - 1 else len(known)):
                break
            others = [value in known[place] for place, value in places if place != column and value.strip()]
            matches += [sum(others)] if others else []
        else:
            if len(lines) > 1 and all(matches) and sum(matches) > 1:
                return True
    return False


def choice(value: str, legal: Sequence[str], place: str, column: str) -> str:
    """`value` if it is one of `legal`; else InvalidRecord, as of the next two."""
    if value not in legal:
        raise InvalidRecord(f"{place}: {column} {value!r} is none of {', '.join(legal)}")
    return value


def label_ids(cell: str, count: int, place: str) -> list[int]:
    """The ids of a cell such as `3,17`, each in [0, count)."""
    ids = cell.split(",")
    if not all(i.isascii() and i.isdigit() and len(i) < 4 and int(i) < count for i in ids):
        raise InvalidRecord(f"{place}: label ids {cell[:80]!r} are not of 0 to {count - 1}")
    return [int(i) for i in ids]


def number(value: str, low: float, high: float, place: str, column: str) -> float:
    """A number in [low, high]."""
    try:
        parsed = float(value)
    except ValueError:
        raise InvalidRecord(f"{place}: {column} {value!r} is not a number") from None
    if not low <= parsed <= high:
        raise InvalidRecord(f"{place}: {column} {value!r} is not between {low:g} and {high:g}")
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
