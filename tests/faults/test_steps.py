"""SIGKILL before steps drawn at random, resumed until the run is done: parameters, losses and samples of an undisturbed run."""

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.test_kills import SEED
from tests.faults.trials import TABLE, Server

STEPS = 6


@pytest.fixture(scope="module")
def whole(server: Server, world: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    home = fresh(world, tmp_path_factory.mktemp("whole") / "home")
    return server.done("train_dying", {"home": str(home), "steps": STEPS, "at": -1}).result


def fresh(world: Path, home: Path) -> Path:
    shutil.copytree(world, home)
    shutil.rmtree(home / "run")
    return home


def until_done(server: Server, home: Path, chosen: random.Random) -> list:
    for _ in range(100):
        reply = server.ask("train_dying", {"home": str(home), "steps": STEPS, "at": chosen.randrange(STEPS + 3)})
        if reply.code == 0:
            return reply.result
        assert reply.code == -signal.SIGKILL, reply.said[-2000:]
    raise AssertionError("it never came to its end")


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_kills_at_random_steps(server: Server, world: Path, tmp_path: Path, whole: list, part: int):
    print(f"seed {SEED}")
    for trial in range(5):
        home = fresh(world, tmp_path / f"trial-{trial}")
        parameters, samples, losses = until_done(server, home, random.Random(f"{SEED} steps {part} {trial}"))
        assert (parameters, samples) == (whole[0], whole[1]), trial
        assert losses == whole[2], trial
        TABLE.add("SIGKILL before random steps, resumed until done", "same parameters, losses and samples")
        shutil.rmtree(home)
