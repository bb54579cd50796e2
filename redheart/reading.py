"""Texts for `predict`: from the command line, from stdin or from a file; and its answers as a table in a file."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redheart.console import console, strict_json, tell_lost
from redheart.data.sources import tabular
from redheart.data.sources.records import InvalidRecord, LeftOut
from redheart.files import write_text
from redheart.owned import check_can_make_file
from redheart.schema import RedHeartError

OUTPUTS = (".csv", ".jsonl")
PRIVATE = 0o600  # texts of the user's


def check_output(path: Path) -> None:
    """Raises RedHeartError where answers cannot be written to `path`."""
    check_can_make_file(path, "--output", "answers.csv")
    if path.suffix.lower() not in OUTPUTS:
        raise RedHeartError(f"--output {path}: name a {' or '.join(OUTPUTS)} file")


def texts_of(given: Sequence[str], file: Path | None, column: str | None) -> tuple[list[str], list[dict[str, Any]]]:
    """The texts, and the row of each: `given` (`-` alone: each line of stdin that is not empty), or a table's column and whole rows.

    Raises RedHeartError where there is none, and for a row without a text.
    """
    if file is None and column is not None:
        raise RedHeartError(f"--column {column} names a column of a table: give the table with --input")
    if file is not None and given:
        raise RedHeartError(f"give texts, or --input {file}: not both")
    if file is None:
        texts = [line.strip() for line in sys.stdin or () if line.strip()] if list(given) == ["-"] else list(given)
        if not texts:
            raise RedHeartError("give a text, `-` to read one from each line of stdin, or a table with --input")
        return texts, [{"text": text} for text in texts]
    if not file.is_file():
        raise RedHeartError(f"--input {file} does not exist, or is no file")
    if file.suffix.lower() not in tabular.SUFFIXES:
        raise RedHeartError(f"--input {file}: give a {', '.join(tabular.SUFFIXES)} file")
    column = column or "text"
    delimiter = tabular.delimiter_of(file, [column]) if file.suffix.lower() in (".csv", ".tsv") else ""
    rows, left_out = [], Counter[str]()
    for place, row in tabular.as_written(file, "--input", delimiter):
        if isinstance(row, InvalidRecord):
            raise row
        if isinstance(row, LeftOut):
            left_out[row.reason] += 1
            continue
        if not isinstance(row, dict):
            raise RedHeartError(f"{place} is no object with a field {column!r}: make it one")
        if column not in row:
            raise RedHeartError(f"{place}: there is no column {column!r}: name one of {', '.join(row)} with --column")
        if not isinstance(row[column], str) or not row[column].strip():
            raise RedHeartError(f"{place}: column {column!r} has no text: leave the row out")
        rows.append(row)
    if not rows:
        raise RedHeartError(f"--input {file} has no row")
    if left_out:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in left_out.items())
        console.print(f"rows of --input {file} that are left out, and have no answer: {reasons}", markup=False)
    return [row[column] for row in rows], rows


def write_answers(path: Path, rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> None:
    """Each row as it was given, and behind it its text's answers, those of `infer.flat`; in a CSV chosen names are parted by spaces.

    Where a column of the rows has the name of an answer, such as a label's, all answers are named `predicted.…`, and that is said.
    """
    theirs, ours = _names(rows), _names(answers)
    if same := [name for name in ours if name in theirs]:
        ours = {name: f"predicted.{name}" for name in ours}
        if taken := [name for name in ours.values() if name in theirs]:
            raise RedHeartError(f"the table has columns {', '.join(same)} and {', '.join(taken)}: rename {taken[0]}")
        console.print(f"the table has columns {', '.join(same)} itself: the answers are predicted.…", markup=False)
    made = [{**row, **{ours[n]: v for n, v in answer.items()}} for row, answer in zip(rows, answers, strict=True)]
    if path.suffix.lower() == ".jsonl":
        lost: list[str] = []
        text = "".join(strict_json(row, lost, default=str) + "\n" for row in made)
        tell_lost(lost)
    else:
        columns = [*theirs, *ours.values()]
        values = ([_cell(row.get(name), name in theirs) for name in columns] for row in made)
        text = "".join(map(_line, [columns, *values]))
    write_text(path, text, PRIVATE)
    console.print(f"wrote {path}: {len(rows)} texts", markup=False)


def _names(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of all rows, in the order in which they first come."""
    return {name: name for row in rows for name in row}


def _line(cells: Sequence[Any]) -> str:
    """A line of a CSV. Only what stands in the line's end is quoted by csv, and a text may hold a bare \\r too."""
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any, theirs: bool) -> Any:
    if isinstance(value, list) and not theirs:
        return " ".join(value)
    return strict_json(value, [], default=str) if isinstance(value, list | dict) else value
