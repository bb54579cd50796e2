"""A power cut at any operation of a save, an export, a preparation, a growth: what was not synced is lost or torn, and the next start goes
on from the newest good state; what was told to be committed is there.
"""

import hashlib
import random
import shutil
from pathlib import Path

import pytest

from tests.faults.journal import STATES, Operation, after_cut, read_journal
from tests.faults.kinds import tree
from tests.faults.test_kills import AGAIN, SEED, comparable, fresh
from tests.faults.trials import JOURNAL, TABLE, Door, Server

WORKS = {  # work: trials of the whole matrix, what a commit makes
    "start_training": (24, "run/checkpoints/step-00000001"), "resume_training": (24, "run/checkpoints/step-00000002"),
    "export": (12, "export"), "grow": (12, "grown"), "prepare": (24, "prepared/index.json"),
}  # fmt: skip


def is_promised(operations: list[Operation], cut: int, home: Path, result: str) -> bool:
    """Whether `result` had its name, and the folder that names it was synced, before the cut."""
    named = [n for n, o in enumerate(operations[:cut]) if o.kind == "r" and o.other == str(home / result)]
    synced = [n for n, o in enumerate(operations[:cut]) if o.kind == "s" and o.path == str((home / result).parent)]
    return bool(named) and bool(synced) and named[0] < synced[-1]


def cut_power(server: Server, world: Path, folder: Path, work: str, trials: int) -> int:
    start, home = fresh(world, folder / "start", work), folder / "home0"
    shutil.copytree(start, home)
    journal = folder / "journal"
    whole = server.done(work, {"home": str(home)}, Door(home, JOURNAL, journal=str(journal)))
    operations = read_journal(journal)
    assert len(operations) > 20
    after_cut(start, home, operations, len(operations), "contents torn", folder / "all")
    left_out = ("tensorboard", ".lock")
    assert {n: d for n, d in tree(folder / "all").items() if not any(w in n for w in left_out)}.keys() == {
        n for n in tree(home) if not any(w in n for w in left_out)
    }
    shutil.rmtree(folder / "all")
    chosen, seen, done = random.Random(f"{SEED} {work}"), set(), 0
    for cut, state in sorted(
        ((c, s) for c in range(1, len(operations) + 1) for s in STATES), key=lambda _: chosen.random()
    ):
        if done == trials:
            break
        target = folder / f"cut-{cut}-{state.replace(' ', '-')}"
        after_cut(start, home, operations, cut, state, target)
        digest = hashlib.sha256(repr([tree(target), [str(p) for p in target.rglob("*")]]).encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            result = WORKS[work][1]
            if is_promised(operations, cut, home, result) and work != "start_training":
                assert (target / result).exists(), (work, cut, state)
            again = server.ask(AGAIN[work], {"home": str(target)})
            assert again.code == 0, (work, cut, state, operations[cut - 1][:3], again.said[-3000:])
            assert comparable(again.result) == comparable(whole.result), (work, cut, state, operations[cut - 1][:3])
            TABLE.add(f"power cut in {work}", "went on, nothing left over")
            done += 1
        shutil.rmtree(target)
    return done


@pytest.mark.parametrize("work", ["resume_training"])
def test_a_few_power_cuts(server: Server, world: Path, tmp_path: Path, work: str):
    print(f"seed {SEED}")
    assert cut_power(server, world, tmp_path, work, 2) == 2


@pytest.mark.faults
@pytest.mark.parametrize("work", WORKS)
def test_power_cuts(server: Server, world: Path, tmp_path: Path, work: str):
    print(f"seed {SEED}")
    assert cut_power(server, world, tmp_path, work, WORKS[work][0]) == WORKS[work][0]
