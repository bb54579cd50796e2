"""A kill between any two operations of a save or of a start changes nothing but how far the run had come.

The engine is a stand-in that writes one small file, so that every single point can be tried.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from redheart.config import load_config
from redheart.files import MANIFEST, read_pointer, verify_manifest, write_manifest, write_pointer, write_text
from redheart.schema import RedHeartError
from redheart.train import checkpoint
from redheart.train.checkpoint import best, clear, committed, find, go_on, holds, last, read_progress, save
from redheart.train.progress import Progress

CONFIG = load_config("local")
OPERATIONS = ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync")
FALLING = {1: 0.9, 2: 0.5, 3: 0.7, 4: 0.6, 5: 0.4}
RISING = {2: 1.5, 3: 1.6, 4: 1.7, 5: 1.8}


class KilledError(BaseException):
    """Stands for the end of the process: nothing that it does from then on reaches the disk."""


class Killer:
    """Ends the process before its `at`-th operation on the file system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int):
        self.left = at
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, operation):
        def run(*arguments, **options):
            self.left -= 1
            if self.left <= 0:
                raise KilledError
            return operation(*arguments, **options)

        return run


class StandIn:
    def save(self, directory: Path) -> None:
        (directory / "state").write_text("weights")
        (directory / "deep").mkdir()
        (directory / "deep" / "state").write_text("moments")


def train(run: Path, state: Progress, steps: int, losses: dict[int, float], keep: int = 2) -> None:
    while state.step < steps:
        state.step += 1
        state.improves(losses[state.step])
        save(StandIn(), run, CONFIG, state, keep)


def resume(run: Path, wanted: str = "last") -> Progress:
    source = find(wanted, run)
    state = read_progress(source)
    go_on(state, source, run)
    clear(run)
    return state


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, and what the configuration says is no matter."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(checkpoint, "write_config", lambda path, config: write_text(path, "preset: local\n"))


def first_run(run: Path) -> None:
    run.mkdir()
    train(run, Progress(), 4, FALLING)


def one_more(run: Path) -> None:
    train(run, resume(run), 5, FALLING)


def back_to_2(run: Path) -> None:
    train(run, resume(run, str(run / "checkpoints" / "step-00000002")), 3, RISING)


@pytest.mark.parametrize("work", [one_more, back_to_2])
def test_a_kill_at_any_point_leaves_a_good_checkpoint_and_the_next_start_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work
):
    first_run(tmp_path / "whole")
    assert names(tmp_path / "whole") == ["best", "last", "step-00000002", "step-00000003", "step-00000004"]
    assert [holds(tmp_path / "whole", step) for step in (1, 2, 3, 4, 5)] == [False, True, True, True, False]
    before = len(committed(tmp_path / "whole"))
    work(tmp_path / "whole")
    expected = names(tmp_path / "whole")
    points = 0
    first_run(tmp_path / "first")
    for at in range(1, 1000):
        run = tmp_path / f"killed-{at}"
        shutil.copytree(tmp_path / "first", run)
        with monkeypatch.context() as patched:
            killer = Killer(patched, at)
            try:
                work(run)
            except KilledError:
                points += 1
        if killer.left > 0:
            break
        newest = last(run)
        assert newest is not None
        for directory in committed(run):
            verify_manifest(directory)
            assert (directory / "deep" / "state").read_text() == "moments"
            assert (directory / "config.yaml").read_text() == "preset: local\n"
        said = read_progress(newest)
        assert said.step in (4, 5 if work is one_more else 3)
        assert best(run) is not None
        assert read_progress(best(run)).step == said.best_step == min(said.best_step, said.step)
        assert len(committed(run)) >= min(before, 2)
        state = resume(run)
        assert state.step == said.step
        here = [d.name for d in committed(run)]
        assert names(run) == sorted([*here, "best", "last"])
        assert all("." not in name for name in here)
        assert read_pointer(run / "checkpoints" / "last") == last(run)
        assert read_pointer(run / "checkpoints" / "best") == best(run)
        if state.step == 4 and work is one_more:
            train(run, state, 5, FALLING)
            assert names(run) == expected
    assert points > 30
    assert points == at - 1


def test_a_kill_while_the_next_start_clears_up_is_cleared_up_by_the_one_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first_run(tmp_path / "first")
    for at in range(1, 1000):
        run = tmp_path / f"killed-{at}"
        shutil.copytree(tmp_path / "first", run)
        folder = run / "checkpoints"
        for name in (
            "step-00000005.tmp",
            "step-00000001.removed",
            ".step-00000004.redheart-universal",
            "step-00000004.old",
        ):
            (folder / name / "deep").mkdir(parents=True)
            (folder / name / "deep" / "state").write_text("half")
        (run / "rebuild.tmp").mkdir()
        os.rename(folder / "step-00000003", folder / "step-00000003.old")  # a final name that is missing
        write_pointer(folder / "last", "step-00000009")
        (folder / "best").write_bytes(b"\xff")
        (run / "notes.tmp").write_text("mine")
        with monkeypatch.context() as patched:
            killer = Killer(patched, at)
            with suppress(KilledError):
                resume(run)
        resume(run)
        assert names(run) == ["best", "last", "step-00000002", "step-00000003", "step-00000004"]
        assert read_pointer(folder / "last") == folder / "step-00000004"
        assert read_pointer(folder / "best") == folder / "step-00000002"
        assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "notes.tmp"]
        if killer.left > 0:
            return
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("pointer", [None, "step-00000009\n", "", "\xff", "../../elsewhere\n"])
def test_pointers_decide_nothing(tmp_path: Path, pointer: str | None):
    run = tmp_path / "run"
    first_run(run)
    for name in ("last", "best"):
        (run / "checkpoints" / name).unlink()
        if pointer is not None:
            (run / "checkpoints" / name).write_text(pointer, encoding="latin-1")
    assert find("last", run) == run / "checkpoints" / "step-00000004"
    assert find("best", run) == run / "checkpoints" / "step-00000002"
    assert find(str(run), tmp_path) == run / "checkpoints" / "step-00000004"


def test_going_back_abandons_what_came_after_once_there_is_something_new(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    train(run, Progress(), 4, FALLING, keep=9)
    state = resume(run, str(run / "checkpoints" / "step-00000001"))
    assert names(run) == ["best", "last", *(f"step-0000000{s}" for s in (1, 2, 3, 4))]
    assert (
        last(run) == run / "checkpoints" / "step-00000004"
    )  # a run that ends before its first save has abandoned nothing
    train(run, state, 2, RISING, keep=9)
    assert names(run) == ["best", "last", "step-00000001", "step-00000002"]
    assert best(run) == run / "checkpoints" / "step-00000001"
    train(run, resume(run), 4, RISING, keep=1)
    assert names(run) == ["best", "last", "step-00000001", "step-00000004"]  # the best stays, however few are kept
    train(run, resume(run, "best"), 2, {2: 0.1}, keep=1)
    assert best(run) == last(run) == run / "checkpoints" / "step-00000002"


def test_checkpoints_of_an_abandoned_branch_are_no_candidates_even_while_they_are_there(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    train(run, Progress(), 4, FALLING, keep=9)
    abandoned = run / "checkpoints" / "step-00000004"
    os.rename(abandoned, tmp_path / "kept")
    back_to_2(run)
    os.rename(tmp_path / "kept", abandoned)  # as a kill between the commit and the removal leaves it
    assert last(run) == run / "checkpoints" / "step-00000003"
    assert best(run) == run / "checkpoints" / "step-00000002"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_never_the_best(tmp_path: Path, value: float):
    run = tmp_path / "run"
    run.mkdir()
    state = Progress()
    train(run, state, 2, {1: value, 2: value})
    assert (state.best_value, state.best_step) == (None, None)
    assert best(run) is None
    assert names(run) == ["last", "step-00000001", "step-00000002"]
    with pytest.raises(RedHeartError, match="no best checkpoint"):
        find("best", run)
    train(run, state, 5, {3: 0.5, 4: value, 5: value}, keep=1)
    assert (state.best_value, state.best_step) == (0.5, 3)
    assert names(run) == ["best", "last", "step-00000003", "step-00000005"]
    state.evaluated(value, {"emotion": value, "regret": 0.25})
    assert state.last_dev_loss is None
    assert state.dev_losses == {"regret": 0.25}


def test_a_best_that_an_earlier_version_took_from_a_nan_is_forgotten(tmp_path: Path):
    run = tmp_path / "run"
    first_run(run)
    trainer = last(run) / "trainer.json"
    said = json.loads(trainer.read_text()) | {"best_value": float("nan"), "best_step": 4}
    trainer.write_text(json.dumps(said))
    write_manifest(trainer.parent)
    assert best(run) is None
    assert resume(run).best_value is None


def test_a_damaged_newest_checkpoint_is_refused_and_going_on_from_the_one_before_replaces_it(tmp_path: Path):
    run = tmp_path / "run"
    first_run(run)
    (run / "checkpoints" / "step-00000004" / "trainer.json").write_text('{"step": 4, "branch": 7}')
    for wanted in ("last", "best", str(run)):
        with pytest.raises(RedHeartError, match=r"trainer\.json is damaged.*the one before it is .*step-00000003"):
            find(wanted, run)
    train(run, resume(run, str(run / "checkpoints" / "step-00000003")), 5, FALLING)
    assert names(run) == ["best", "last", "step-00000004", "step-00000005"]
    assert read_progress(last(run)).branch == 1


def test_a_checkpoint_of_another_run_does_not_go_on_among_a_run_s_own(tmp_path: Path):
    first_run(tmp_path / "a")
    first_run(tmp_path / "b")
    source = tmp_path / "b" / "checkpoints" / "step-00000002"
    with pytest.raises(RedHeartError, match="not among them"):
        go_on(read_progress(source), source, tmp_path / "a")
    for best_step in (2, None):  # none: no dev loss was finite so far
        state = read_progress(source)
        state.best_step, state.looks_since_best = best_step, 3
        go_on(state, source, tmp_path / "new")
        assert (state.branch, state.best_step, state.looks_since_best) == (0, None, 0)  # its best is not there


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path: Path):
    run = tmp_path / "run"
    first_run(run)
    (run / "checkpoints" / "step-00000004" / MANIFEST).unlink()
    assert last(run) == run / "checkpoints" / "step-00000003"


def test_what_is_kept_and_what_is_removed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    told = lambda: " ".join("".join(capsys.readouterr()).split())  # noqa: E731
    run = tmp_path / "run"
    run.mkdir()
    state = Progress()
    assert state.note() == ""
    state.last_loss = 1.25
    assert state.note() == "loss 1.2500"
    wrong = dict.fromkeys(("vad", "surd", "ethics", "emotion", "culture"), float("nan"))
    state.evaluated(0.5, {**wrong, "bentham": float("-inf"), "regret": 0.5})
    assert told() == "step 0: dev losses that are not finite: bentham, culture, emotion, ethics, surd, vad"
    state.evaluated(0.5, {"regret": 0.5})
    assert (told(), state.note()) == ("", "loss 1.2500 dev 0.5000".replace(" dev", "  dev"))
    train(run, state, 4, FALLING, keep=9)
    resume(run)
    assert told() == ""
    resume(run, str(run / "checkpoints" / "step-00000002"))
    after = "step-00000003, step-00000004 will be removed once a new checkpoint is there"
    assert told() == f"going back to step 2: {after}"
    for name in ("step-00000009.tmp", "step-00000005.removed"):
        (run / "checkpoints" / name).mkdir()
    (run / "rebuild.tmp").mkdir()
    (run / "checkpoints" / "last").unlink()
    resume(run)
    assert told().replace(f"{run}/", "") == (
        "removed what an earlier end left unfinished: rebuild.tmp, step-00000005.removed, step-00000009.tmp "
        "checkpoints/last names step-00000004 again"
    )
    newest = read_progress(last(run))
    source = run / "checkpoints" / "step-00000004"
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    newest.looks_since_best = 2
    go_on(newest, source, run)
    assert "the best checkpoint so far, of step 2, is not in" in told()
    assert (newest.best_value, newest.best_step, newest.looks_since_best) == (None, None, 0)
