"""SIGKILL at every file operation of a save, a pruning, an export, a preparation, a growth: the next start goes on by itself.

The operations are counted at the operating system's door (door.c), those of C++ and Rust among them; a write dies half-way. What the
next start leaves is, name by name and bit by bit, what an undisturbed work leaves.
"""

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.trials import COUNT, KILL, TABLE, Door, Server

SEED = 24
AGAIN = {
    "start_training": "train_again", "resume_training": "train_again", "export": "export_again", "grow": "grow_again",
    "prepare": "prepare_again", "calibrate": "calibrate_again",
}  # fmt: skip
LEAST = {"start_training": 80, "resume_training": 60, "export": 30, "grow": 40, "prepare": 60, "calibrate": 6}


def fresh(world: Path, home: Path, work: str) -> Path:
    """The world as it is before a work."""
    shutil.copytree(world, home)
    if work == "start_training":
        shutil.rmtree(home / "run")
    return home


def kill_at(server: Server, world: Path, folder: Path, work: str, positions: list[int] | None) -> int:
    """Kills at each of `positions` (None: at every one) and compares what the next start leaves; how many there are."""
    whole = server.done(work, {"home": str(fresh(world, folder / "whole", work))}, Door(folder / "whole", COUNT))
    assert whole.operations is not None
    for at in positions or range(1, whole.operations + 1):
        home = fresh(world, folder / f"killed-{at}", work)
        # the homes have names of one length, since a run says where its data are
        killed = server.ask(work, {"home": str(home)}, Door(home, KILL, at))
        assert killed.code == -signal.SIGKILL, (at, killed.code, killed.said[-2000:])
        again = server.ask(AGAIN[work], {"home": str(home)})
        assert again.code == 0, (work, at, again.said[-3000:])
        assert comparable(again.result) == comparable(whole.result), (work, at)
        TABLE.add(f"SIGKILL at a file operation of {work}", "went on, nothing left over")
        shutil.rmtree(home)
    return whole.operations


def comparable(result: list) -> list:
    """Without the number of the process that held a directory, and where it is."""
    content, names = result
    if isinstance(content, dict):
        content = {k: v for k, v in content.items() if k not in (".redheart.lock",)}
    return [content, names]


# growing twice for every position takes a minute
@pytest.mark.parametrize("work", [w for w in AGAIN if w != "grow"])
def test_a_kill_at_some_operations(server: Server, world: Path, tmp_path: Path, work: str):
    chosen = random.Random(f"{SEED} {work}")
    positions = sorted(chosen.sample(range(1, LEAST[work]), 2))
    print(f"seed {SEED}: {work} killed at operations {positions}")
    kill_at(server, world, tmp_path, work, positions)


@pytest.mark.faults
@pytest.mark.parametrize("work", AGAIN)
def test_a_kill_at_every_operation(server: Server, world: Path, tmp_path: Path, work: str):
    assert kill_at(server, world, tmp_path, work, None) >= LEAST[work]
