"""Two ranks and what happens to one of them: killed, stopped, slow, with samples that are not finite or leap, short of memory; and runs
that go on with another number of ranks or another micro-batch.
"""

import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_kills import SEED
from tests.faults.trials import TABLE, Reply, Server, fresh, train

pytestmark = pytest.mark.faults
STEPS, TIMEOUT_S = 6, 5
ZERO = [
    "memory.strategy=zero2_offload_8bit",
    f"training.max_steps={STEPS}",
    f"training.collective_timeout_s={TIMEOUT_S}",
]
# leaping losses need a window before them
LONG = [*ZERO, "training.max_steps=14", "guard.window=8", "training.evaluate_every=99", "checkpoint.keep_last=9"]


def done(server: Server, home: Path, *hurt: list[Any], more: list[str], ranks: int = 2) -> Reply:
    reply = train(server, home, *hurt, more=more, ranks=ranks)
    assert (reply.code, reply.late) == (0, False), reply.said[-3000:]
    return reply


@pytest.fixture(scope="module")
def whole(server: Server, world: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    return done(server, fresh(world, tmp_path_factory.mktemp("whole") / "home"), more=ZERO).result


def same_after_resume(server: Server, home: Path, whole: list) -> None:
    assert done(server, home, more=ZERO).result[:3] == whole[:3]


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("what", ["kill", "stop"])
def test_a_rank_that_is_lost_is_named_by_the_other(
    server: Server, world: Path, tmp_path: Path, whole: list, what: str, victim: int, at: int
):
    home, other = fresh(world, tmp_path / "home"), 1 - victim
    reply = train(server, home, [what, victim, at], more=ZERO, ranks=2)
    assert not reply.late
    assert reply.codes[victim] == -signal.SIGKILL  # a stopped one is ended once the other has
    assert reply.codes[other] == 75, reply.said[-3000:]
    (line,) = reply.lines
    assert re.search(rf"rank {other} of 2 at step {at} lost another rank in \w+\.py:\d+ \(\w+\)", line), line
    assert "Traceback" not in reply.said
    if what == "stop":
        assert reply.seconds[other] < 30 + TIMEOUT_S  # start, the steps before, the wait
    same_after_resume(server, home, whole)
    TABLE.add(
        f"one of two ranks {what}{'ped' if what == 'stop' else 'ed'}", "the other ended, named; resumed to the same"
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_slow_rank_is_waited_for(server: Server, world: Path, tmp_path: Path, whole: list, victim: int):
    home = fresh(world, tmp_path / "home")
    assert done(server, home, ["slow", victim, 10], more=ZERO).result[:3] == whole[:3]
    TABLE.add("one of two ranks ten times slower", "same parameters, losses and samples")


# numbers that are not finite


@pytest.mark.parametrize("at", [1, 3, 4])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(
    server: Server, world: Path, tmp_path: Path, victim: int, at: int
):
    """On all ranks; a run that is killed after it and resumed is the same."""
    poison, home = ["planted", victim, "features", at], fresh(world, tmp_path / "home")
    through = done(server, home, poison, more=ZERO)
    assert through.result[3]["skipped_steps"] == 1
    (event,) = [e for e in events(home) if e["event"] == "skipped_step"]
    assert (event["step"], "backbone" in event["modules"]) == (at, True)
    again = fresh(world, tmp_path / "again")
    assert train(server, again, poison, ["kill", 1 - victim, at + 1], more=ZERO, ranks=2).code
    resumed = done(server, again, poison, more=ZERO)
    assert resumed.result[:3] == through.result[:3]
    assert resumed.result[3]["skipped_steps"] == 1
    TABLE.add("a batch of one of two ranks not finite", "skipped, counted; same after resume")


@pytest.mark.parametrize("victim", [0, 1])
def test_three_in_a_row_end_the_run_on_all_ranks(server: Server, world: Path, tmp_path: Path, victim: int):
    home = fresh(world, tmp_path / "home")
    reply = train(server, home, ["planted", victim, "features", 1, 2, 3], more=ZERO, ranks=2)
    assert reply.codes == [1, 1], reply.said[-3000:]
    assert all("3 steps in a row were not finite" in line for line in reply.lines)
    assert "backbone" in json.loads((home / "run" / "non_finite_step_00000003.json").read_text())["modules"]
    done(server, home, more=ZERO)
    TABLE.add("three batches in a row not finite", "ended by name on both ranks")


def events(home: Path) -> list[dict]:
    return [json.loads(line) for line in (home / "run" / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("at", [10])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_planted_spike_is_rewound_on_all_ranks(server: Server, world: Path, tmp_path: Path, victim: int, at: int):
    """And by a run that is killed before it comes to the spike, or after the rewind, and resumed."""
    spike, more = ["planted", victim, "bentham", at], [*LONG, "guard.on_spike=rewind", "guard.skip_steps=2"]
    home = fresh(world, tmp_path / "home")
    through = done(server, home, spike, more=more)
    assert [through.result[3][k] for k in ("spikes", "rewinds", "left_out")] == [1, 1, [at - 1, at]]
    assert [e["to_step"] for e in events(home) if e["event"] == "rewind"] == [at - 1]
    again = fresh(world, tmp_path / "again")
    for died in (at, at + 1):  # the second time the samples at fault are left out already
        assert train(server, again, spike, ["kill", 1 - victim, died], more=more, ranks=2).code
    resumed = done(server, again, spike, more=more)
    assert resumed.result[:3] == through.result[:3]
    assert resumed.result[3]["left_out"] == [at - 1, at]
    TABLE.add("a planted spike on one of two ranks", "rewound; same after resume")


# another number of ranks, another micro-batch


@pytest.mark.parametrize("trial", range(6))
def test_another_world_goes_on_with_the_same_batches(
    server: Server, world: Path, tmp_path: Path, whole: list, trial: int
):
    """2 ranks, then 1, then 2, with half or twice the micro-batch, at random steps: samples in the same order, losses within 1 % (fp32
    weights come over bit by bit, 8-bit moments are coded anew over other blocks)."""
    chosen, home = random.Random(f"{SEED} worlds {trial}"), fresh(world, tmp_path / "home")
    first, second = sorted(chosen.sample(range(1, STEPS), 2))
    micro = [f"training.micro_batch_size={m}" for m in chosen.choice([(2, 1, 2), (1, 2, 1), (2, 4, 1)])]
    print(f"seed {SEED}: 2 → 1 at {first}, 1 → 2 at {second}, {micro}")
    for at, ranks, size in ((first, 2, micro[0]), (second, 1, micro[1])):
        reply = train(server, home, ["end", 0, at], more=[*ZERO, size], ranks=ranks)
        assert reply.code == 128 + signal.SIGTERM, reply.said[-3000:]
    _, samples, losses, state = done(server, home, more=[*ZERO, micro[2]]).result
    assert samples == whole[1]
    assert losses == pytest.approx(whole[2], rel=1e-2)
    assert state["step"] == STEPS
    TABLE.add("2 → 1 → 2 ranks, micro-batch halved and doubled", "same samples, losses within 1 %")


# memory that runs out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_micro_batch_that_does_not_fit_is_halved(
    server: Server, world: Path, tmp_path: Path, whole: list, where: str, ranks: int
):
    """Backward holds ZeRO's collectives: there the first step's rehearsal is what runs out."""
    at = 3 if where == "forward" or ranks == 1 else 0
    rows = 2 // ranks
    micro = f"training.micro_batch_size={2 * rows}"
    reply = done(
        server, fresh(world, tmp_path / "home"), ["rows", ranks - 1, where, at, rows], more=[*ZERO, micro], ranks=ranks
    )
    _, samples, losses, state = reply.result
    assert samples == whole[1]
    assert losses == pytest.approx(whole[2], rel=1e-2)
    assert [(e["step"], e["micro_batch_size"]) for e in state["out_of_memory"]] == [(at, rows)]
    TABLE.add("out of memory in forward or backward", "smaller micro-batch, same samples")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("where", ["step", "save"])
def test_what_a_smaller_micro_batch_cannot_help_ends_the_run_by_name(
    server: Server, world: Path, tmp_path: Path, whole: list, where: str, ranks: int
):
    home = fresh(world, tmp_path / "home")
    reply = train(server, home, ["memory", ranks - 1, where, 3], more=ZERO, ranks=ranks)
    assert reply.codes[ranks - 1] == 1, reply.said[-3000:]
    assert all(code in (1, 75) for code in reply.codes)
    assert "Traceback" not in reply.said
    assert any("out of memory" in line for line in reply.lines), reply.lines
    assert not list((home / "run" / "checkpoints").glob("*.tmp"))
    _, samples, losses, _ = done(server, home, more=ZERO, ranks=2).result
    assert samples == whole[1]
    assert losses == pytest.approx(whole[2], rel=1e-2)
    TABLE.add("out of memory in the optimizer's step or a save", "ended by name; resumed")
