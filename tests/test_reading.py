"""Where the texts of `predict` come from, and the table that its answers become."""

import csv
import datetime
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redheart.infer import flat
from redheart.reading import texts_of, write_answers
from redheart.schema import RedHeartError

ANSWER = {"emotion": {"joy": 0.5, "fear": 0.25}, "regret": 1.0, "emotion_chosen": ["joy", "fear"]}


def test_texts_come_from_arguments_stdin_or_a_column_with_the_rest_of_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert texts_of(["one", "two"], None, None) == (["one", "two"], [{"text": "one"}, {"text": "two"}])
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n  two  \n"))
    assert texts_of(["-"], None, None)[0] == ["one", "two"]
    monkeypatch.setattr("sys.stdin", None)  # closed, as `<&-` does
    with pytest.raises(RedHeartError, match="give a text"):
        texts_of(["-"], None, None)
    table = tmp_path / "texts.csv"
    table.write_text('id,body;x\n1,"a, b"\n2,"two\nlines"\n')
    texts, rows = texts_of([], table, "body;x")
    assert texts == ["a, b", "two\nlines"]
    assert rows == [{"id": "1", "body;x": texts[0]}, {"id": "2", "body;x": texts[1]}]
    lines = tmp_path / "texts.jsonl"
    lines.write_text('{"n": 1, "text": "one"}\n{"text": "two", "tags": ["a"]}\n')
    assert texts_of([], lines, None)[1] == [{"n": 1, "text": "one"}, {"text": "two", "tags": ["a"]}]
    semicolons = tmp_path / "semicolons.csv"
    semicolons.write_bytes("text;n\nä;1\n".encode("utf-8-sig"))
    assert texts_of([], semicolons, None) == (["ä"], [{"text": "ä", "n": "1"}])
    tabs = tmp_path / "tabs.tsv"
    tabs.write_text("n\ttext\n1\tone\n")
    assert texts_of([], tabs, None)[1] == [{"n": "1", "text": "one"}]
    day = datetime.date(2026, 1, 2)
    pq.write_table(pa.table({"day": [day], "text": ["one"], "n": [None]}), tmp_path / "texts.parquet")
    assert texts_of([], tmp_path / "texts.parquet", None)[1] == [{"day": day, "text": "one", "n": None}]
    far = pa.array([253402300799 * 10**6], pa.timestamp("us", tz="Asia/Seoul"))  # a date that Python does not know
    pq.write_table(pa.table({"until": far, "text": ["one"]}), tmp_path / "far.parquet")
    assert texts_of([], tmp_path / "far.parquet", None)[1][0]["until"] == "10000-01-01 08:59:59.000000+0900"
    (tmp_path / "strings.json").write_text('["one"]')
    with pytest.raises(RedHeartError, match="record 0 is no object with a field 'text'"):
        texts_of([], tmp_path / "strings.json", None)


@pytest.mark.parametrize(
    ("given", "file", "column", "words"),
    [([], None, None, "give a text"), (["a"], "x.csv", None, "not both"), (["a"], None, "body", "--input"),
     ([], "no.csv", None, r"--input no\.csv does not exist")],
)  # fmt: skip
def test_what_does_not_go_together_is_said(given: list[str], file: str | None, column: str | None, words: str):
    with pytest.raises(RedHeartError, match=words):
        texts_of(given, Path(file) if file else None, column)


ROWS = [
    {"id": 7, "body": 'say "no"', "day": datetime.date(2026, 1, 2)},
    {"id": 8, "body": "two\nlines", "tags": ["a b", "c"]},
]


def test_answers_stand_behind_the_columns_of_their_rows(tmp_path: Path):
    answers = [flat(ANSWER)] * 2
    write_answers(tmp_path / "a.csv", ROWS, answers)
    with (tmp_path / "a.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["id", "body", "day", "tags", "emotion.joy", "emotion.fear", "regret", "emotion_chosen"]
    assert list(first.values())[:4] == ["7", 'say "no"', "2026-01-02", ""]
    assert (second["body"], second["tags"]) == ("two\nlines", '["a b", "c"]')
    assert (second["emotion.fear"], second["regret"], second["emotion_chosen"]) == ("0.25", "1.0", "joy fear")
    write_answers(tmp_path / "a.jsonl", ROWS, answers)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [
        {**ROWS[0], "day": "2026-01-02", **answers[0]},
        {**ROWS[1], **answers[1]},
    ]


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path, capsys):
    write_answers(tmp_path / "a.jsonl", [{"text": "one", "x": float("nan"), "y": [float("inf"), 1]}], [{"regret": 0.5}])
    line = (tmp_path / "a.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"text": "one", "x": None, "y": [None, 1], "regret": 0.5}
    assert "not a finite number: x (nan), y[0] (inf)" in " ".join(capsys.readouterr().err.split())


def test_a_csv_of_answers_is_read_back_whatever_its_texts_hold(tmp_path: Path):
    texts = ["bare\rreturn", "both\r\nends", "line\nend", "a, b", 'say "no"', "plain"]
    write_answers(tmp_path / "a.csv", [{"text": text} for text in texts], [{"regret": 0.5}] * len(texts))
    assert texts_of([], tmp_path / "a.csv", None)[0] == texts
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == texts
    assert (tmp_path / "a.csv").read_bytes().endswith(b"plain,0.5\n")


def test_rows_without_anything_are_left_out_aloud(tmp_path: Path, capsys):
    (tmp_path / "a.csv").write_text("text,n\none,1\n\n,\ntwo,2\n\n")
    assert texts_of([], tmp_path / "a.csv", None)[0] == ["one", "two"]
    assert "left out, and have no answer: 2 × an empty line, 1 × all cells are empty" in capsys.readouterr().err


def test_a_column_that_has_the_name_of_an_answer_is_kept_and_the_answers_are_named_otherwise(tmp_path, capsys):
    rows = [{"text": "one", "regret": "0.5"}]
    write_answers(tmp_path / "a.jsonl", rows, [flat(ANSWER)])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        **rows[0], **{f"predicted.{name}": value for name, value in flat(ANSWER).items()},
    }  # fmt: skip
    assert "has columns regret itself: the answers are predicted.…" in capsys.readouterr().err
    again = [json.loads((tmp_path / "a.jsonl").read_text())]
    with pytest.raises(
        RedHeartError, match=r"columns regret and predicted\.emotion\.joy, .*rename predicted\.emotion\.joy"
    ):
        write_answers(tmp_path / "b.csv", again, [flat(ANSWER)])
