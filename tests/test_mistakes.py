"""Thirty mistakes that people make: one line each, with the cause and the remedy in it, before torch is imported.

All of them run one after another in one fresh interpreter, which says of each what it printed and whether torch was there by then.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from redheart.config import load_config
from tests.runs import redheart

WORKER = """
import contextlib, io, json, sys
from redheart.cli import main
told = []
for arguments in json.loads(sys.stdin.read()):
    sys.argv, code = ["redheart", *arguments], 0
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    told.append({"code": code, "said": said.getvalue(), "torch": "torch" in sys.modules})
print(json.dumps(told))
"""


class Mistake(NamedTuple):
    arguments: str  # words parted by spaces; DIR/ is a directory with the files of FILES
    words: tuple[str, ...]  # what the line must hold: the thing and the remedy
    code: int = 1


FILES: dict[str, str | bytes] = {
    "empty.csv": "",
    "header.csv": "text,regret\n",
    "short.csv": "text,regret\none,0.5\ntwo\n",
    "word.csv": "text,regret\none,much\n",
    "range.csv": "text,regret\none,7\n",
    "joy.csv": "text,joyful\none,0.4\n",
    "quote.csv": 'text,regret\n"one,0.5\ntwo,0.5\n',
    "hole.csv": "text,n\none,1\n ,2\n",
    "notes.txt": "one\n",
    "list.json": '{"text": "x"}',
    "broken.json": '[{"text": "x"',
    "number.json": '[{"text": 3}]',
    "latin.csv": b"text,regret\n\xe9t\xe9,0.5\n",
    "run.yaml": "training: {epochs: 3",
    "keys.yaml": "preset: x\nmodel: {widht: 96}\n",
    "folder/inside.txt": "",
    "old/index.json": '{"version": 0}',
    "export/config.json": "{}",
}
MISTAKES = [
    Mistake("train --data DIR/nothing", ("DIR/nothing", "redheart prepare")),
    Mistake("train --data DIR/folder", ("DIR/folder", "redheart prepare")),
    Mistake("train --data DIR/old", ("version 0", "prepare the data again")),
    Mistake("train --data DIR/folder --preset locl", ("'locl'", "did you mean local?")),
    Mistake("train --data DIR/folder --preset DIR/gone.yaml", ("DIR/gone.yaml", "give a YAML file")),
    Mistake("train --data DIR/folder --preset DIR/run.yaml", ("DIR/run.yaml", "not valid YAML")),
    Mistake("train --data DIR/folder --preset DIR/keys.yaml", ("model.widht", "did you mean width?")),
    Mistake("train --data DIR/folder --set training.epoch=3", ("training.epoch", "did you mean epochs?")),
    Mistake("train --data DIR/folder --set training.epochs", ("section.key=value",)),
    Mistake("train --data DIR/folder --set training.epochs=many", ("training.epochs = 'many'", "number")),
    Mistake("train --data DIR/folder --set optimizer.learning_rate=-1", ("optimizer.learning_rate = -1", "greater than 0")),
    Mistake("train --data DIR/gone.csv", ("DIR/gone.csv does not exist",)),
    Mistake("train --data DIR/joy.csv --label joyful", ("'joyful'", "COLUMN=ANSWER")),
    Mistake("train --data DIR/joy.csv --label joyful=joy", ("joy", "emotion.joy")),
    Mistake("train --data DIR/joy.csv --text txt --label joyful=emotion.joy", ("joy.csv", "'txt'", "text")),
    Mistake("train --data DIR/word.csv --label regret=regret", ("word.csv", "much")),
    Mistake("train", ("--data is missing",)),
    Mistake("train --data --out x", ("--data needs a value", "redheart train -h")),
    Mistake("train --dta x", ("No such option", "--data"), 2),
    Mistake("trian --data x", ("No such command 'trian'", "train"), 2),
    Mistake("plan --gpu-memory", ("requires an argument",), 2),
    Mistake("plan --nodes two", ("--nodes", "integer"), 2),
    Mistake("plan --write-ds-configs DIR/notes.txt", ("DIR/notes.txt is a file", "name a directory")),
    Mistake("prepare --source own --out DIR/out", ("'own'", "NAME=PATH")),
    Mistake("prepare --source own=DIR/gone.csv --out DIR/out", ("DIR/gone.csv does not exist", ".csv")),
    Mistake("prepare --source own=DIR/folder --out DIR/out", ("DIR/folder is a directory", ".csv")),
    Mistake("prepare --source own=DIR/notes.txt --out DIR/out", ("notes.txt", ".csv")),
    Mistake("prepare --source own=DIR/empty.csv --out DIR/out", ("empty.csv is empty",)),
    Mistake("prepare --source own=DIR/header.csv --out DIR/out", ("no record", "own (header.csv)")),
    Mistake("prepare --source own=DIR/short.csv --out DIR/out", ("short.csv", "1 columns, not 2")),
    Mistake("prepare --source own=DIR/word.csv --out DIR/out", ("word.csv", "regret", "not a number")),
    Mistake("prepare --source own=DIR/range.csv --out DIR/out", ("range.csv", "regret", "from 0 to 1")),
    Mistake("prepare --source own=DIR/joy.csv --out DIR/out", ("joyful",)),
    Mistake("prepare --source own=DIR/quote.csv --out DIR/out", ("quote.csv", "quote")),
    Mistake("prepare --source own=DIR/list.json --out DIR/out", ("list.json", "list of records")),
    Mistake("prepare --source own=DIR/broken.json --out DIR/out", ("broken.json", "not valid JSON")),
    Mistake("prepare --source own=DIR/number.json --out DIR/out", ("record 0", "field text")),
    Mistake("prepare --source own=DIR/latin.csv --out DIR/out", ("latin.csv", "UTF-8")),
    Mistake("prepare --source own=DIR/word.csv --out DIR/notes.txt --skip-invalid", ("no record",)),
    Mistake("evaluate --checkpoint DIR/nothing", ("DIR/nothing does not exist",)),
    Mistake("evaluate --checkpoint DIR/word.csv", ("DIR/word.csv is a file", "directory")),
    Mistake("evaluate --checkpoint DIR/export --report DIR/folder", ("DIR/folder is a directory", "report.md")),
    Mistake("evaluate --checkpoint DIR/folder", ("DIR/folder", "manifest")),
    Mistake("predict --checkpoint DIR/nothing text", ("DIR/nothing does not exist",)),
    Mistake("predict --checkpoint DIR/export --input DIR/gone.csv", ("DIR/gone.csv", ".csv")),
    Mistake("predict --checkpoint DIR/export --input DIR/word.csv --column body", ("'body'", "text, regret", "--column")),
    Mistake("predict --checkpoint DIR/export --input DIR/hole.csv", ("hole.csv:3", "leave the row out")),
    Mistake("predict --checkpoint DIR/export --input DIR/word.csv --output DIR/out.xls", ("out.xls", ".csv or .jsonl")),
    Mistake("predict --checkpoint DIR/export --input DIR/word.csv --output DIR/folder", ("folder is a directory", "answers.csv")),
    Mistake("export --checkpoint DIR/export --out DIR/notes.txt", ("DIR/notes.txt is a file", "name a directory")),
    Mistake("grow --checkpoint DIR/export --to 1b4 --out DIR/out", ("'1b4'", "did you mean 1b3?")),
    Mistake("dedup --data DIR/word.csv", ("word.csv is a file", "redheart prepare")),
]  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    calls = [m.arguments.replace("DIR/", f"{directory}/").split() for m in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=json.dumps(calls),
        text=True,
        capture_output=True,
        cwd=directory,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()) == sorted(FILES)
    return str(directory), json.loads(done.stdout)


def test_a_reader_that_has_gone_such_as_head_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "redheart", "train", "--help-config"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")  # as a shell tells SIGPIPE


def test_there_are_thirty_of_them():
    assert len(MISTAKES) >= 30


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[m.arguments for m in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_remedy_before_torch_is_there(
    told: tuple[str, list[dict[str, Any]]], number: int
):
    mistake, (directory, all_told) = MISTAKES[number], told
    one = all_told[number]
    said = one["said"].replace(f"{directory}/", "DIR/")
    assert one["code"] == mistake.code, said
    lines = [line for line in said.splitlines() if line.startswith(("redheart: ", "Error: "))]
    assert len(lines) == 1, said
    assert mistake.code == 2 or said.strip() == lines[0], said  # the parser puts the usage above its line
    assert all(word in lines[0] for word in mistake.words), lines[0]
    assert not one["torch"]


KOREAN = ["나는 오늘 정말 기쁘다", "전화하겠다고 약속하고 잊었다", "그녀는 밤새 춤을 추었다"]
OWN = ["--set", 'data.columns={"own":{"body":"text","sorry":"regret"}}', "--set", "data.labeler.max_texts=0"]


def korean(directory: Path) -> None:
    records = [{"text": f"{t} {n}", "lang": "ko", "regret": 0.5} for n, t in enumerate(KOREAN * 4)]
    (directory / "ko.json").write_text(json.dumps(records))
    (directory / "ko.csv").write_text("body,sorry\n" + "".join(f"{r['text']},0.5\n" for r in records))


def too_long(directory: Path) -> None:
    (directory / "long.csv").write_text("body,sorry\n" + "".join(f"{'day ' * 80}{n},0.{n % 9}\n" for n in range(12)))


def old(directory: Path) -> None:
    """An export of a version whose network had another layout, and one whose configuration had no sections yet."""
    for name, config in (("old", load_config("local").model_dump(mode="json")), ("older", {})):
        (directory / name).mkdir()
        (directory / name / "config.json").write_text("{}")
        (directory / name / "redheart.json").write_text(json.dumps({"config": config, "progress": {"layout": 1}}))


# what only a tokenizer, or what was written beside weights, can tell; files, arguments, what is said, exit code
WITH_TORCH = [
    (korean, ["prepare", "--source", "own=ko.json", "--out", "out"],
     ("12 records are in 'ko'", "package:minilm", "--set data.encoder.name"), 1),
    (korean, ["train", "--data", "ko.csv", "--text", "body", "--label", "sorry=regret", "--out", "out"],
     ("12 of 12 records cannot be read by encoder package:minilm", "ko.csv:2", "--set data.encoder.name"), 1),
    (too_long, ["prepare", "--source", "own=long.csv", "--out", "out", *OWN],
     ("12 of 12 texts of own exceed 64 tokens", "--set data.encoder.max_tokens=N"), 0),
    (old, ["predict", "--checkpoint", "old", "a text"], ("old/redheart.json was made by an earlier version", "train again"), 1),
    (old, ["evaluate", "--checkpoint", "older"], ("older/redheart.json: config key preset is missing", "export the checkpoint again"), 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "arguments", "words", "code"), WITH_TORCH, ids=[" ".join(m[1][:3]) for m in WITH_TORCH]
)
def test_a_mistake_that_takes_a_tokenizer_or_a_checkpoint_is_one_line_too(
    files: Any, arguments: list[str], words: tuple[str, ...], code: int, tmp_path: Path
):
    files(tmp_path)
    named = ("ko.json", "ko.csv", "long.csv", "old", "older", "out")
    at = [str(tmp_path / a) if a in named else a.replace("own=", f"own={tmp_path}/") for a in arguments]
    done = redheart(*at)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if all(word in line for word in words)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("redheart: ") == (code == 1)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "index.json").exists() == (code == 0)
