"""What the READMEs say: files that are linked exist, commands and options are those of the programs, blocks of Python run."""

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from redheart import cli
from redheart.config import config_keys, load_config
from redheart.early import UsageError, _with_optional_path
from redheart.schema import LABELS
from tests.benchmarks import readme
from tests.runs import ROOT, environment

PAGES = sorted(
    p
    for folder in (".github", "ds_configs", "launch", "redheart", "tests")
    for p in (ROOT / folder).rglob("*.md")
)  # fmt: skip
PAGES = [ROOT / "README.md", *PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PROGRAMS = {
    "podman",
    "sbatch",
    "source",
    "pip",
    "pre-commit",
    "tensorboard",
}  # not ours: only their files are looked at


class Block(NamedTuple):
    page: Path
    kind: str
    text: str


BLOCKS = [Block(page, *found) for page in PAGES for found in FENCE.findall(page.read_text(encoding="utf-8"))]
COMMANDS = [
    (block.page.relative_to(ROOT).as_posix(), words)
    for block in BLOCKS
    if block.kind == "bash"
    for line in block.text.replace("\\\n", " ").splitlines()
    for part in line.split(" && ")
    if (words := shlex.split(part, comments=True))
]


def name(value: object) -> str:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_is_linked_exists(page: Path):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is not there"
        assert file.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path):
    """Paths below the folders of this project, in backticks: `launch/run_tests.sh`, `redheart/schema.py`."""
    folders = "ds_configs|launch|redheart|tests"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{path} is not there"


def check_redheart(words: list[str]) -> None:
    """`words` behind `redheart`: every command, option and --set key is one, and options that need a value have one."""
    command: Any = typer.main.get_command(cli.app)
    words = _with_optional_path(words, "--resume", "last")
    while isinstance(command, typer.core.TyperGroup):
        options = words[: next((i for i, w in enumerate(words) if not w.startswith("-")), len(words))]
        command.make_parser(typer.Context(command)).parse_args(options)
        words = words[len(options) :]
        if not words:
            return
        _, command, words = command.resolve_command(typer.Context(command), words)
    values, rest, _ = command.make_parser(typer.Context(command)).parse_args(list(words))
    assert not rest or any(isinstance(p, typer.core.TyperArgument) for p in command.params), f"what is {rest}?"
    for setting in values.get("set_") or ():
        key, leaves = setting.partition("=")[0], config_keys()
        assert key in leaves or key.rpartition(".")[0] in leaves, f"--set {key}: no such key"
        if not setting.endswith("…"):
            load_config("local", [setting])


def check_script(script: str, options: list[str]) -> None:
    path = ROOT / script
    assert path.is_file(), f"{script} is not there"
    text = path.read_text(encoding="utf-8")
    if "from legs import" in text:  # which has the options of several
        text += (path.parent / "legs.py").read_text(encoding="utf-8")
    for option in options:
        if option.startswith("--"):
            assert re.search(rf"{option.partition('=')[0]}(?![\w-])", text), f"{script} knows no {option}"


def check(words: list[str]) -> None:
    """One command line of a README. Raises what is wrong with it."""
    words = [w for i, w in enumerate(words) if not re.fullmatch(r"[A-Z_]+=\S*", w) or i > 0]
    program, rest = words[0], words[1:]
    if program == "redheart":
        check_redheart(rest)
    elif program == "bash":
        if "--" in rest:
            after = rest[rest.index("--") + 1 :]
            check(after) if rest[0].endswith("supervise.sh") else check_redheart(after)
            rest = rest[: rest.index("--")]
        arguments = [] if rest[0].endswith("run_tests.sh") else rest[1:]
        check_script(rest[0], arguments)
    elif program in ("accelerate", "deepspeed"):
        ours = rest.index("redheart")
        check_redheart(rest[ours + 1 :])
        files = [w for w in rest[:ours] if "/" in w]
        assert all((ROOT / f).exists() for f in files), files
    elif program == "sbatch":
        file = next(i for i, w in enumerate(rest) if w.endswith(".sbatch"))
        assert (ROOT / rest[file]).is_file()
        check_redheart(rest[file + 1 :])
    elif program == "python" and rest[0] != "-m":
        check_script(rest[0], rest[1:])
    elif program == "python":
        assert rest[1] in ("build", "pytest"), rest
    else:
        assert program in PROGRAMS, f"what is {program}?"


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {shlex.join(w)[:60]}" for page, w in COMMANDS])
def test_commands_and_options_are_those_of_the_programs(page: str, words: list[str]):
    check(words)


@pytest.mark.parametrize(
    "line",
    [
        "redheart trane --data x",
        "redheart train --datas x",
        "redheart train --data x --set training.epoch=3",
        "redheart params extra",
        "bash launch/run_lerning.sh train-local",
        "bash launch/run_learning.sh train-local --sample 3",
        "accelerate launch --config_file launch/accelerate/zero9.yaml -m redheart train --data x",
        "red-heart train",
    ],
)
def test_a_wrong_line_is_caught(line: str):
    with pytest.raises((AssertionError, UsageError)):
        check(shlex.split(line))


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.kind in ("json", "yaml", "python")], ids=lambda b: name(b.page)
)
def test_blocks_of_other_kinds_parse(block: Block):
    if block.kind == "json":
        json.loads(block.text)
    elif block.kind == "yaml":
        yaml.safe_load(block.text)
    else:
        compile(block.text, str(block.page), "exec")


def write_texts(path: Path) -> None:
    """Thirty rows with labels of their owner's names, as the README has them."""
    texts = ("I forgot to call her.", "We danced all night.", "I should have told him.")
    rows = [(f"{texts[i % 3]} Day {i}.", (i % 3 != 1) * 0.8, (i % 3 == 1) * 0.9) for i in range(30)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("body", "sorry", "happy"), *rows])


def python_blocks(page: str) -> Iterator[str]:
    return (b.text for b in BLOCKS if b.kind == "python" and b.page == ROOT / page)


def test_the_python_of_the_readmes_runs(tmp_path, monkeypatch):
    """All of it, one block after the other; the run of the main README for two steps."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts.csv")
    names: dict[str, object] = {}
    main = "".join(python_blocks("README.md"))
    assert main.count("training__max_steps=100") == 1
    exec(compile(main.replace("max_steps=100", "max_steps=2"), "README.md", "exec"), names)
    assert names["run"].result.state.step == 2
    for page in {b.page for b in BLOCKS if b.kind == "python"} - {ROOT / "README.md"}:
        exec(compile("".join(python_blocks(name(page))), name(page), "exec"), names)


@pytest.mark.slow  # trains, in processes of its own
def test_the_commands_about_ones_own_texts_run(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts.csv")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in FENCE.findall(text) if b[0] == "bash" and "texts.csv" in b[1]]
    for line in block[1].replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "redheart":
            command = [sys.executable, "-m", "redheart", "--debug", *words[1:]]
            variables = environment() | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr


def test_the_readme_is_short_and_knows_every_label():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    ranges = {cells[0].strip("`"): cells[-1] for cells in lines if len(cells) == 3}
    for label, entry in LABELS.items():
        if label != "surd":  # derived, never given
            assert ranges.get(label) == (
                f"{entry.low:g} or {entry.high:g}" if entry.binary else f"{entry.low:g} to {entry.high:g}"
            ), label


def test_the_page_of_figures_is_what_the_results_say():
    page = ROOT / "tests" / "benchmarks" / "README.md"
    assert page.read_text(encoding="utf-8") == readme.text(), "run: python tests/benchmarks/readme.py"
    for one in readme.read("figures.json"):
        assert {"about", "what", "figure", "command", "machine", "date"} <= one.keys()
        words = shlex.split(one["command"])
        check(words)
    assert all((readme.RESULTS / one["file"]).is_file() for one in readme.read("figures.json") if "file" in one)
