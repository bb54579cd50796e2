"""What is printed is what was given: no markup, no terminal codes, no failure over an encoding, no number that JSON lacks."""

import io
import json
import math
import os
import re
import sys

import pytest
from rich.table import Table

from redheart.console import (
    LiteralConsole,
    any_encoding,
    emit,
    literal,
    progress,
    quiet_start,
    show_answers,
    strict_json,
    table,
)

HOSTILE = [
    "great [/s]",
    "my [removed] dog",
    "[bold]x[/bold]",
    "a :smile: b",
    "[link=http://x]y[/link]",
    "[@click=f()]z",
]


def shown(what: str | Table, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    console = LiteralConsole()
    console.file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)  # errors: strict
    console.print(what)
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is_written(text):
    assert text in shown(text)
    assert text in shown(table(text, ["column"], [["cell " * 9]]))
    assert text in shown(table("title", ["column"], [[text]]))
    assert text in shown(table("title", [text], [["cell"]]))


def test_the_global_console_and_the_progress_bar_take_no_markup(monkeypatch, capsys):
    import redheart.console as module

    monkeypatch.setattr(module, "console", LiteralConsole(stderr=True))
    with progress("reading [/x]", 2) as (bar, task):
        bar.update(task, completed=2, note="[y] :smile:")
    told = capsys.readouterr().err
    assert "reading [/x]" in told
    assert "[y] :smile:" in told


def test_without_a_terminal_a_bar_is_a_line_now_and_then(monkeypatch, capsys):
    import redheart.console as module

    monkeypatch.setattr(module, "console", LiteralConsole(stderr=True))
    with progress("reading", 3) as (bar, task):
        for _ in range(3):
            bar.update(task, advance=1)
    assert capsys.readouterr().err == "reading 3/3 in 0:00:00\n"
    with progress("reading", 3, lines=False) as (bar, task):
        bar.update(task, completed=3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module._Lines, "EVERY_S", 0.0)
    with progress("reading", 3) as (bar, task):
        for done in range(1, 4):
            bar.update(task, completed=done, note=f"{done} of them")
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == ["1/3", "2/3", "3/3"]
    assert told[0].endswith("  1 of them")
    assert re.search(r", ETA 0:00:0\d  2 of them", told[1])
    assert "\x1b" not in "".join(told)


def test_libraries_are_quiet_unless_all_is_to_be_said(monkeypatch):
    names = ("TQDM_DISABLE", "DS_LOG_LEVEL", "TRANSFORMERS_VERBOSITY", "REDHEART_VERBOSE")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("REDHEART_VERBOSE", "1")
    quiet_start()
    assert "TQDM_DISABLE" not in os.environ
    monkeypatch.delenv("REDHEART_VERBOSE")
    monkeypatch.setenv("DS_LOG_LEVEL", "debug")  # the user's own word counts
    quiet_start()
    assert [os.environ[name] for name in names[:3]] == ["1", "debug", "error"]


def test_an_answer_in_brief_is_the_text_and_two_lines(capsys):
    emotion = {"joy": 0.1, "sadness": 0.7, "fear": 0.2, "anger": 0.05}
    show_answers(
        "A text.", {"emotion": emotion, "bentham": {"extent": 0.4}, "regret": 0.5, "utility": -1.25}, brief=True
    )
    assert capsys.readouterr().out == "A text.\n  sadness 0.70, fear 0.20, joy 0.10\n  regret 0.50, utility -1.25\n"


def test_a_terminal_obeys_nothing_that_a_text_holds():
    assert shown("a\x1b[2Jb\x07\x9bc\rd") == "a\\x1b[2Jb\\x07\\x9bc\\rd\n"
    assert literal("two\nlines\tand a tab") == "two\nlines\tand a tab"
    assert literal("half a pair \ud83d") == "half a pair \\ud83d"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_encoding_lacks_is_an_escape_of_the_right_width(encoding):
    told = shown(table("é 😀", ["answer"], [["jeong 정"], ["plain"]]), encoding)
    assert "jeong \\uc815" in told
    assert "\\U0001f600" in told
    assert ("é" in told) == (encoding != "ascii")
    lines = told.splitlines()[1:]
    assert len({len(line) for line in lines}) == 1
    assert all(ord(c) < 256 for c in told)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_every_encoding(monkeypatch, encoding):
    value = [{"text": "정 é 😀 [x]", "jeong 정": 0.5, "path": "half \udcff"}]
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    any_encoding()
    emit(value, True)
    assert json.loads(raw.getvalue().decode(encoding)) == value
    assert ("정".encode() in raw.getvalue()) == (encoding == "utf-8")


def test_a_number_that_is_not_finite_is_null_and_named(capsys):
    def no(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    value = {"loss": math.nan, "curve": [1.0, math.inf, (2, -math.inf)], "fine": 0.1, "n": 3, "yes": True}
    lost: list[str] = []
    told = json.loads(strict_json(value, lost), parse_constant=no)
    assert told == {"loss": None, "curve": [1.0, None, [2, None]], "fine": 0.1, "n": 3, "yes": True}
    assert lost == ["loss (nan)", "curve[1] (inf)", "curve[2][1] (-inf)"]
    emit({"loss": math.nan}, False)
    assert capsys.readouterr().out == ""


def test_answers_are_printed_whole(capsys):
    show_answers("word " * 60 + "[removed] end", {"emotion": {"joy": 0.25}, "regret": 0.5, "untrained": ["regret"]})
    told = capsys.readouterr().out
    assert told.count("word") == 60
    assert "[removed]" in told
    assert "0.250" in told
    assert "0.500 (not trained)" in told


@pytest.mark.parametrize("full", [False, True])
def test_what_nobody_hears_any_more_ends_no_work(monkeypatch, full):
    """A pipe without a reader, a log on a full disk."""
    read, write = (-1, os.open("/dev/full", os.O_WRONLY)) if full else os.pipe()
    if not full:
        os.close(read)
    with open(write, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        told = LiteralConsole(stderr=True)
        told.print("step 1")
        told.print("step 2")
        assert told.quiet
