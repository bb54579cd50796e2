"""One server and one small world for all trials of a session, and their table at its end."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.trials import TABLE, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as one:
        yield one


@pytest.fixture(scope="session")
def world(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/: two training shards and a dev shard; run/: a run at its first step."""
    home = tmp_path_factory.mktemp("world") / "home"
    server.done("make_world", {"home": str(home)})
    return home


@pytest.fixture
def home(world: Path, tmp_path: Path) -> Path:
    """A copy of the world."""
    return Path(shutil.copytree(world, tmp_path / "home"))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Of a module with a SAMPLE the tests of these names belong to the default suite, the others to the matrix alone."""
    sample = getattr(getattr(item, "module", None), "SAMPLE", None)
    if sample is not None and item.name not in sample:
        item.add_marker(pytest.mark.faults)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    started, before = time.monotonic(), {k: v.total() for k, v in TABLE.rows.items()}
    yield
    grown = {k: v.total() - before.get(k, 0) for k, v in TABLE.rows.items() if v.total() > before.get(k, 0)}
    for fault, trials in grown.items():
        TABLE.seconds[fault] += (time.monotonic() - started) * trials / sum(grown.values())


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist
        session.config.workeroutput["faults"] = json.dumps([TABLE.rows, TABLE.seconds])


def pytest_testnodedown(node: Any) -> None:
    rows, seconds = json.loads(getattr(node, "workeroutput", {}).get("faults", "[{}, {}]"))
    for fault, ends in rows.items():
        for end, n in ends.items():
            TABLE.rows.setdefault(fault, type(TABLE.seconds)())[end] += n
    TABLE.seconds.update(seconds)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if lines := TABLE.lines():
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)
        if file := os.environ.get("REDHEART_FAULTS_TABLE"):
            Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")
