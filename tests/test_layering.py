"""The house rules, read from the source by `ast`; every rule also meets a small offender, to show that it can fail."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import redheart

PACKAGE = Path(redheart.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [
    [
        "schema",
        "config",
        "sections",
        "files",
        "origins",
        "caches",
        "owned",
        "device",
        "ranks",
        "console",
        "ends",
        "plain_yaml",
        "options",
        "version",
        "presets",
    ],
    ["signals", "causality", "losses", "metrics", "optim", "finite"],
    ["model", "tasks"],
    ["data"],
    ["memory"],
    ["evaluation"],  # beneath train: the trainer asks evaluate, nothing here knows the trainer
    ["train"],
    ["infer", "closing", "doctor", "bench", "early", "reading", "doors"],
    [
        "cli",
        "asking",
        "__main__",
        "__init__",
    ],  # the package's lazy names look anywhere; that they are lazy is tested below
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
HEAVY = [
    *("torch", "transformers", "deepspeed", "accelerate", "datasets", "pyarrow", "bitsandbytes", "numpy", "sklearn"),
    *("matplotlib", "pydantic", "yaml"),
]
OWNERS = {  # who may import a heavy library; a name that ends in / stands for a folder
    "accelerate": ("train/engine/",),
    "deepspeed": ("train/engine/", "optim/", "bench/optimizer.py"),
    "bitsandbytes": ("data/llm_labels.py", "train/engine/zero.py", "bench/optimizer.py"),
    "BitsAndBytesConfig": ("data/llm_labels.py",),
}
MAX_LINES = 400
MAX_LINES_OF = {"train/trainer.py": 150}
CODE = {".py", ".yaml", ".cpp", ".cc", ".h", ".cu"}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of everything a file of the package imports, at any depth; `from m import n` gives m and m.n."""
    package = ["redheart", *Path(file).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def room_of(dotted: str) -> str | None:
    """The room of a module of ours; None where it is not ours. `redheart` itself and names in it are `__init__`."""
    first, *rest = dotted.split(".")
    if first != "redheart":
        return None
    return rest[0] if rest and rest[0] in RANK else "__init__"


def upward_imports(source: str, file: str) -> list[str]:
    """Imports of a room above the file's own. `from redheart.a import b` is an import of room a alone."""
    tree = ast.parse(source)
    room = Path(file).parts[0].removesuffix(".py")
    if room not in RANK:
        return [f"{file}: room {room} has no place in the list"]
    # `from redheart import tasks` names the room only in its second part
    targets = {(line, name, room_of(name)) for line, name in imported(tree, file) if name != "redheart"}
    targets |= {(n.lineno, "redheart", "__init__") for n in ast.walk(tree) if _imports_package_alone(n)}
    return [
        f"{file}:{line}: {room} (rank {RANK[room]}) imports {name} (rank {RANK[target]})"
        for line, name, target in sorted(targets, key=str)
        if target is not None and RANK[target] > RANK[room]
    ]


def _imports_package_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.Import) and any(alias.name == "redheart" for alias in node.names)


def too_long(source: str, file: str) -> list[str]:
    limit = MAX_LINES_OF.get(file, MAX_LINES)
    lines = len(source.splitlines())
    return [f"{file}: {lines} lines, at most {limit}"] if lines > limit else []


def foreign_heavy_imports(source: str, file: str) -> list[str]:
    """Heavy libraries imported, and their classes named, outside the one place that owns them."""
    tree = ast.parse(source)
    used = [(line, name.split(".")[0]) for line, name in imported(tree, file)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            used.append((node.lineno, node.id if isinstance(node, ast.Name) else node.attr))
        elif isinstance(node, ast.ImportFrom):
            used += [(node.lineno, alias.name) for alias in node.names]
    return [
        f"{file}:{line}: {name} belongs to {' and '.join(OWNERS[name])}"
        for line, name in sorted(set(used))
        if name in OWNERS and not any(file == o or (o.endswith("/") and file.startswith(o)) for o in OWNERS[name])
    ]


def loaded_by(statement: str) -> set[str]:
    """The heavy libraries in memory after a statement, in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(done.stdout.split())


def test_the_sources_are_found():
    assert {"schema.py", "train/engine/zero.py", "data/sources/records.py"} <= {relative(p) for p in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_downward(path):
    assert upward_imports(path.read_text(encoding="utf-8"), relative(path)) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("losses/combine.py", "from redheart.model.redheart import RedHeartModel"),
        ("evaluation/evaluate.py", "import redheart.train.trainer"),
        ("data/stream.py", "def f():\n    from redheart.evaluation import evaluate"),
        ("model/redheart.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import redheart.cli"),
        ("schema.py", "from redheart import tasks"),
        ("tasks.py", "from redheart import RedHeartModel"),
        ("infer.py", "import redheart"),
        ("data/sources/everyday.py", "from ...train import stages"),
        ("ranks.py", "from .data import order"),
        ("files.py", "import importlib\nx = importlib.import_module('redheart.memory.plan')"),
        ("utils.py", "x = 1"),
    ],
)
def test_an_upward_import_or_a_room_without_a_place_is_caught(file, source):
    assert upward_imports(source, file) != []


def test_downward_and_level_imports_are_allowed():
    assert upward_imports("from redheart.evaluation import evaluate\nfrom redheart import schema", "train/a.py") == []
    assert upward_imports("from . import b\nfrom ..losses import emotion\nimport torch", "causality/a.py") == []


@pytest.mark.parametrize("path", [p for p in sorted(PACKAGE.rglob("*")) if p.suffix in CODE], ids=relative)
def test_no_file_is_too_long(path):
    assert too_long(path.read_text(encoding="utf-8"), relative(path)) == []


@pytest.mark.parametrize(("file", "limit"), [("schema.py", 400), ("train/trainer.py", 150)])
def test_a_file_that_is_too_long_is_caught(file, limit):
    assert too_long("x = 1\n" * limit, file) == []
    assert too_long("x = 1\n" * (limit + 1), file) != []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_heavy_libraries_have_one_owner(path):
    assert foreign_heavy_imports(path.read_text(encoding="utf-8"), relative(path)) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("train/trainer.py", "import deepspeed"),
        ("train/stages.py", "def f():\n    from accelerate.utils import set_seed"),
        ("train/engine/plain.py", "import bitsandbytes as bnb"),
        ("optim/adam8bit.py", "import accelerate"),
        ("data/encode.py", "from transformers import BitsAndBytesConfig"),
        ("data/encode.py", "import transformers\nq = transformers.BitsAndBytesConfig()"),
        ("memory/measure.py", "import importlib\nimportlib.import_module('deepspeed.ops')"),
    ],
)
def test_a_foreign_heavy_import_is_caught(file, source):
    assert foreign_heavy_imports(source, file) != []


def test_owners_may_import_what_they_own():
    assert foreign_heavy_imports("import accelerate, deepspeed", "train/engine/zero.py") == []
    assert foreign_heavy_imports("from deepspeed.ops.op_builder import OpBuilder", "optim/adam8bit.py") == []
    assert foreign_heavy_imports("from transformers import BitsAndBytesConfig", "data/llm_labels.py") == []


@pytest.mark.parametrize("module", ["redheart", "redheart.cli"])
def test_importing_the_package_or_its_commands_loads_nothing_heavy(module):
    assert loaded_by(f"import {module}") == set()


@pytest.mark.parametrize(
    ("arguments", "seconds"), [(["-c", "import redheart"], 0.3), (["-m", "redheart", "--help"], 0.5)]
)
def test_the_fixed_costs_are_small(arguments, seconds):
    """Of the processor, the least of three runs: what else the machine does is not counted."""

    def cost() -> float:
        with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, cwd=PACKAGE.parent) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_utime + usage.ru_stime

    assert min(cost() for _ in range(3)) <= seconds


def test_a_heavy_import_of_the_package_would_be_seen():
    assert loaded_by("import redheart, numpy") == {"numpy"}
