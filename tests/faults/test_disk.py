"""A disk that is full, over its quota or read-only at an operation of a save, an export, a preparation, a growth: one line that names the
path or the cause, exit code 1, the old state intact, nothing half-written; with room again the same command goes on.
"""

import errno
import random
import shutil
from pathlib import Path

import pytest

from tests.faults.kinds import tree
from tests.faults.test_kills import AGAIN, SEED, comparable, fresh
from tests.faults.trials import REFUSE, REFUSE_ALL, TABLE, Door, Server

COMMANDS = {
    "resume_training": ("train", "--data", "{home}/data", "--out", "{home}/run", "--resume", "--set", "training.max_steps=2"),
    "export": ("export", "--checkpoint", "{home}/run", "--out", "{home}/export"),
}  # fmt: skip
FULL = {
    "disk full": (REFUSE, errno.ENOSPC),
    "over the quota": (REFUSE, errno.EDQUOT),
    "read-only": (REFUSE_ALL, errno.EROFS),
}


def refuse_at(server: Server, world: Path, folder: Path, work: str, positions: list[int], why: str) -> None:
    whole = server.done(work, {"home": str(fresh(world, folder / "whole", work))})
    mode, reason = FULL[why]
    for at in positions:
        home = fresh(world, folder / f"refused-{at}", work)
        before = {n: d for n, d in tree(home).items() if "/step-" in n or n.startswith("data/")}
        arguments = [a.format(home=home) for a in COMMANDS[work]]
        reply = server.ask("command", {"arguments": arguments}, Door(home, mode, at, reason), seconds=60)
        assert "Traceback" not in reply.said, (work, at, why, reply.said[-1500:])
        assert (reply.code, len(reply.lines)) == (1, 1), (work, at, why, reply.code, reply.said[-1500:])
        assert {n: d for n, d in tree(home).items() if n in before} == before, (work, at, why)
        again = server.ask(AGAIN[work], {"home": str(home)})
        assert again.code == 0, (work, at, why, again.said[-2000:])
        assert comparable(again.result) == comparable(whole.result), (work, at, why)
        TABLE.add(f"{why} in {work}", "one line, old state intact, went on with room")
        shutil.rmtree(home)


def chosen(work: str, why: str, trials: int) -> list[int]:
    last = {"resume_training": 45, "export": 34}[work]
    return sorted(random.Random(f"{SEED} {work} {why}").sample(range(1, last), trials))


def test_a_full_disk_once(server: Server, world: Path, tmp_path: Path):
    refuse_at(server, world, tmp_path, "resume_training", chosen("resume_training", "disk full", 1), "disk full")


@pytest.mark.faults
@pytest.mark.parametrize("why", FULL)
@pytest.mark.parametrize("work", COMMANDS)
def test_no_room(server: Server, world: Path, tmp_path: Path, work: str, why: str):
    print(f"seed {SEED}")
    refuse_at(server, world, tmp_path, work, chosen(work, why, 6), why)
