"""SIGKILL before steps drawn at random, resumed until the run is done: parameters, losses and samples of an undisturbed run.

On two ranks one of them is killed; the other finds it gone and ends by itself.
"""

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.test_kills import SEED
from tests.faults.trials import TABLE, Server, fresh, train

STEPS = 6
MORE = {0: [f"training.max_steps={STEPS}"], 2: [f"training.max_steps={STEPS}", "memory.strategy=zero2_offload_8bit"]}


@pytest.fixture(scope="module")
def whole(server: Server, world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list]:
    """By the number of ranks."""
    found = {}
    for ranks, more in MORE.items():
        reply = train(server, fresh(world, tmp_path_factory.mktemp("whole") / "home"), more=more, ranks=ranks)
        assert reply.code == 0, reply.said[-2000:]
        found[ranks] = reply.result
    return found


def until_done(server: Server, home: Path, ranks: int, chosen: random.Random) -> list:
    for _ in range(100):
        victim = chosen.randrange(max(ranks, 1))
        hurt = ["kill", victim, chosen.randrange(STEPS + 3)]
        reply = train(server, home, hurt, more=MORE[ranks], ranks=ranks)
        if reply.code == 0:
            return reply.result
        assert reply.codes.pop(victim) == -signal.SIGKILL, reply.said[-2000:]
        assert reply.codes == [75] * len(reply.codes), reply.said[-2000:]
        assert not reply.late
    raise AssertionError("it never came to its end")


@pytest.mark.faults
@pytest.mark.parametrize(("ranks", "part"), [*((0, part) for part in range(4)), (2, 0), (2, 1)])
def test_kills_at_random_steps(
    server: Server, world: Path, tmp_path: Path, whole: dict[int, list], ranks: int, part: int
):
    print(f"seed {SEED}")
    for trial in range(5):
        home = fresh(world, tmp_path / f"trial-{trial}")
        got = until_done(server, home, ranks, random.Random(f"{SEED} steps {ranks} {part} {trial}"))
        assert got[:3] == whole[ranks][:3], trial
        where = "two ranks" if ranks else "one process"
        TABLE.add(f"SIGKILL before random steps, resumed until done, {where}", "same parameters, losses and samples")
        shutil.rmtree(home)
