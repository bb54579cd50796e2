"""Thirty mistakes that people make: one line each, with the cause and the remedy in it, before torch is imported.

All of them run one after another in one fresh interpreter, which says of each what it printed and whether torch was there by then.
"""

import json
import subprocess
import sys
from typing import Any, NamedTuple

import pytest

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
