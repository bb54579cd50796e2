"""Where the texts of `predict` come from, and the table that its answers become."""

import csv
import io
import json
from pathlib import Path

import pytest

from redheart.infer import flat
from redheart.reading import texts_of, write_answers
from redheart.schema import RedHeartError

ANSWER = {"emotion": {"joy": 0.5, "fear": 0.25}, "regret": 1.0, "emotion_chosen": ["joy", "fear"]}


def test_texts_come_from_arguments_stdin_or_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert texts_of(["one", "two"], None, None) == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n  two  \n"))
    assert texts_of(["-"], None, None) == ["one", "two"]
    table = tmp_path / "texts.csv"
    table.write_text('id,body;x\n1,"a, b"\n2,"two\nlines"\n')
    assert texts_of([], table, "body;x") == ["a, b", "two\nlines"]
    lines = tmp_path / "texts.jsonl"
    lines.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts_of([], lines, None) == ["one", "two"]
    semicolons = tmp_path / "semicolons.csv"
    semicolons.write_bytes("text;n\nä;1\n".encode("utf-8-sig"))
    assert texts_of([], semicolons, None) == ["ä"]


@pytest.mark.parametrize(
    ("given", "file", "column", "words"),
    [([], None, None, "give a text"), (["a"], "x.csv", None, "not both"), (["a"], None, "body", "--input")],
)
def test_what_does_not_go_together_is_said(given: list[str], file: str | None, column: str | None, words: str):
    with pytest.raises(RedHeartError, match=words):
        texts_of(given, Path(file) if file else None, column)


def test_answers_become_a_row_each(tmp_path: Path):
    rows = [{"text": t, **flat(ANSWER)} for t in ('say "no"', "two\nlines")]
    write_answers(tmp_path / "a.csv", rows)
    with (tmp_path / "a.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [r["text"] for r in read] == ['say "no"', "two\nlines"]
    assert (read[1]["emotion.fear"], read[1]["regret"], read[1]["emotion_chosen"]) == ("0.25", "1.0", "joy fear")
    write_answers(tmp_path / "a.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == rows
