"""Texts for `predict`: from the command line, from stdin or from a file; and its answers as a table in a file."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redheart.console import console
from redheart.data.sources import tabular
from redheart.data.sources.records import InvalidRecord
from redheart.files import write_text
from redheart.owned import check_can_make
from redheart.schema import RedHeartError

OUTPUTS = (".csv", ".jsonl")
PRIVATE = 0o600  # texts of the user's


def check_output(path: Path) -> None:
    """Raises RedHeartError where answers cannot be written to `path`."""
    if path.is_dir():
        raise RedHeartError(f"--output {path} is a directory: name a file in it, such as {path / 'answers.csv'}")
    if path.suffix.lower() not in OUTPUTS:
        raise RedHeartError(f"--output {path}: name a {' or '.join(OUTPUTS)} file")
    check_can_make(path, "--output")


def texts_of(given: Sequence[str], file: Path | None, column: str | None) -> list[str]:
    """`given` (`-` alone: each line of stdin that is not empty), or the texts of a table's column, one for each of its rows.

    Raises RedHeartError where there is none, and for a row without a text.
    """
    if file is None and column is not None:
        raise RedHeartError(f"--column {column} names a column of a table: give the table with --input")
    if file is not None and given:
        raise RedHeartError(f"give texts, or --input {file}: not both")
    if file is None:
        texts = [line.strip() for line in sys.stdin if line.strip()] if list(given) == ["-"] else list(given)
        if not texts:
            raise RedHeartError("give a text, `-` to read one from each line of stdin, or a table with --input")
        return texts
    if not file.is_file() or file.suffix.lower() not in tabular.SUFFIXES:
        raise RedHeartError(f"--input {file}: give a {', '.join(tabular.SUFFIXES)} file")
    column = column or "text"
    names = tabular.header(file, "--input") if file.suffix.lower() in (".csv", ".tsv", ".parquet") else [column]
    if column not in names:
        raise RedHeartError(f"--input {file} has no column {column!r}: name one of {', '.join(names)} with --column")
    texts = []
    for place, row in tabular.read(file, "--input", {column: "text"}):
        if isinstance(row, InvalidRecord):
            raise row
        if isinstance(row, dict):
            if not isinstance(row.get("text"), str) or not row["text"].strip():
                raise RedHeartError(f"{place}: column {column!r} has no text: leave the row out")
            texts.append(row["text"])
    if not texts:
        raise RedHeartError(f"--input {file} has no row")
    return texts


def write_answers(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row for each text, its columns those of `infer.flat`; in a CSV chosen names are parted by spaces."""
    if path.suffix.lower() == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), PRIVATE)
        console.print(f"wrote {path}: {len(rows)} texts")
        return
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: " ".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    write_text(path, out.getvalue(), PRIVATE)
    console.print(f"wrote {path}: {len(rows)} texts")
