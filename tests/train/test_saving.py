"""When checkpoints are written, which of them stay, and what a save that is slow or fails does to a run."""

import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from redheart.config import RunConfig, load_config
from redheart.files import verify_manifest
from redheart.memory.activations import MicroStep
from redheart.memory.plan import Request, parameters_of, predict
from redheart.schema import RedHeartError
from redheart.train import checkpoint, saving
from redheart.train.checkpoint import committed, read_progress
from redheart.train.guard import StopRequest
from redheart.train.progress import Progress
from redheart.train.start import train as start
from redheart.train.trainer import Trainer
from tests.runs import last_weights, train
from tests.train.tiny import SETTINGS

STEPS = 6
QUICK = [
    *SETTINGS,
    *("training.log_every=1", "training.evaluate_every=1000", "training.synergy_every=1000", "memory.strategy=plain"),
    *(f"training.max_steps={STEPS}", "training.checkpoint_every=2", "checkpoint.keep_last=9"),
]  # fmt: skip


def config(*settings: str) -> RunConfig:
    return load_config("local", [*QUICK, *settings])


def names(run: Path) -> list[str]:
    return [d.name for d in committed(run)]


def steps(*numbers: int) -> list[str]:
    return [f"step-{n:08d}" for n in numbers]


def events(run: Path) -> list[dict]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def blocking(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("saving") / "blocking"
    start(config(), data, run)
    return run


def test_training_goes_on_while_a_copy_is_written(data: Path, blocking: Path, tmp_path: Path, monkeypatch):
    """The commit of step 2 waits for step 3: what it holds is step 2's nevertheless, and one is under way at a time."""
    passed, waited = threading.Event(), []
    commit, begin = checkpoint.commit_directory, saving.checkpoint.begin

    def slow(temporary, final, aside):
        if final.name == steps(2)[0]:
            waited.append(passed.wait(60))
        commit(temporary, final, aside)

    def noting(run, *rest):
        assert not list((run / "checkpoints").glob("*.tmp"))
        return begin(run, *rest)

    step = Trainer._step

    def stepping(self, stop):
        if self.state.step == 3:
            assert names(self.run_directory) == []
            passed.set()
        return step(self, stop)

    monkeypatch.setattr(checkpoint, "commit_directory", slow)
    monkeypatch.setattr(saving.checkpoint, "begin", noting)
    monkeypatch.setattr(Trainer, "_step", stepping)
    start(config("checkpoint.background=true"), data, tmp_path / "run")
    assert waited == [True]
    assert names(tmp_path / "run") == names(blocking) == steps(2, 4, 6)
    for ours, theirs in zip(committed(tmp_path / "run"), committed(blocking), strict=True):
        verify_manifest(ours)
        a, b = (torch.load(d / "plain_state.pt", weights_only=True) for d in (ours, theirs))
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in b["model"])
        assert all(
            torch.equal(v, a["optimizer"]["state"][k][name])
            for k, state in b["optimizer"]["state"].items()
            for name, v in state.items()
        )
        assert read_progress(ours) == read_progress(theirs)


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_save_that_fails_leaves_no_half_file(data: Path, tmp_path: Path, monkeypatch, capsys, background, goes_on):
    """The disk is full at step 4's commit; in the background the run learns of it at its next step."""
    commit = checkpoint.commit_directory

    def full(temporary, final, aside):
        if final.name == steps(4)[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
        commit(temporary, final, aside)

    monkeypatch.setattr(checkpoint, "commit_directory", full)
    settings = config(f"checkpoint.background={background}", f"checkpoint.on_error={'go_on' if goes_on else 'end'}")
    run = tmp_path / "run"
    if goes_on:
        result = start(settings, data, run)
        assert result.state.step == STEPS
        assert (result.saving["failed"], result.saving["checkpoints"]) == (1, 2)
        assert names(run) == steps(2, 6)
        assert [(e["event"], e["step"]) for e in events(run)] == [("save_failed", 4)]
        said = capsys.readouterr().err
        assert "step 4: saving failed (No space left on device" in said
        assert "1 failed saves" in said
    else:
        with pytest.raises(RedHeartError, match=r"No space left on device.*--resume goes on from .*step-00000002"):
            start(settings, data, run)
        assert names(run) == steps(2)
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_a_best_checkpoint_that_could_not_be_saved_is_searched_anew(data: Path, tmp_path: Path, monkeypatch):
    """Else no later one would be the best, unless it were better than one that is not there."""
    commit, values = checkpoint.commit_directory, {2: 3.0, 4: 2.0, 6: 2.5}

    def full(temporary, final, aside):
        if final.name == steps(4)[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
        commit(temporary, final, aside)

    monkeypatch.setattr(checkpoint, "commit_directory", full)
    monkeypatch.setattr(Trainer, "_is_best", lambda self, _: self.state.improves(values[self.state.step]))
    result = start(config("checkpoint.on_error=go_on", "training.evaluate_every=2"), data, tmp_path / "run")
    assert (result.state.best_step, result.saving["failed"]) == (6, 1)
    assert result.calibration is not None


def test_a_best_checkpoint_whose_save_fails_as_the_run_ends_is_searched_anew(data: Path, tmp_path: Path, monkeypatch):
    """In the background the run learns of it when it saves its last step, which was worse, and is the best of what is there."""
    commit, values = checkpoint.commit_directory, {1: 2.0, 2: 2.5}

    def full(temporary, final, aside):
        if final.name == steps(1)[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
        commit(temporary, final, aside)

    monkeypatch.setattr(checkpoint, "commit_directory", full)
    monkeypatch.setattr(Trainer, "_is_best", lambda self, _: self.state.improves(values[self.state.step]))
    background = ("checkpoint.background=true", "checkpoint.on_error=go_on", "training.evaluate_every=1")
    result = start(config("training.max_steps=2", *background), data, tmp_path / "run")
    assert (result.state.best_step, result.saving["failed"], names(tmp_path / "run")) == (2, 1, steps(2))
    assert checkpoint.best(tmp_path / "run") == checkpoint.last(tmp_path / "run")
    assert result.calibration is not None


@pytest.mark.parametrize("times", [1, 2])
def test_a_run_ends_well_only_with_its_last_checkpoint(data: Path, tmp_path: Path, monkeypatch, times: int):
    """The last step is saved in the background; a save of it that failed is tried again, and has then to succeed."""
    commit, tried = checkpoint.commit_directory, []

    def full(temporary, final, aside):
        tried.append(final.name)
        if len(tried) <= times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
        commit(temporary, final, aside)

    monkeypatch.setattr(checkpoint, "commit_directory", full)
    background = ("checkpoint.background=true", "checkpoint.on_error=go_on", "training.checkpoint_every=99")
    settings, run = config("training.max_steps=1", *background), tmp_path / "run"
    if times == 1:
        assert start(settings, data, run).saving["failed"] == 1
        assert names(run) == steps(1)
    else:
        with pytest.raises(RedHeartError, match=r"No space left on device.*there is no checkpoint yet"):
            start(settings, data, run)
        assert names(run) == []
    assert tried == steps(1) * 2


def test_a_limit_on_files_ends_no_run_that_shall_go_on(data: Path, blocking: Path, tmp_path: Path, capsys):
    """No checkpoint fits any more; a later run on a disk with room goes on from what is there."""
    run = shutil.copytree(blocking, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            RedHeartError, match=r"step-00000010.*--resume goes on from .*step-00000006"
        ):  # the last save
            start(config("training.max_steps=10", "checkpoint.on_error=go_on"), data, run, "last")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [(e["event"], e["step"]) for e in events(run)] == [("save_failed", 8), ("save_failed", 10)]
    assert names(run) == names(blocking)
    assert "step 8: saving failed" in capsys.readouterr().err
    assert start(config("training.max_steps=10"), data, run, "last").from_step == STEPS
    assert names(run)[-1:] == steps(10)


def test_room_is_looked_for_before_anything_is_written(data: Path, blocking: Path, tmp_path: Path, monkeypatch):
    size = checkpoint.size_of(committed(blocking)[0])
    on_disk = sum(
        p.stat().st_size for p in committed(blocking)[0].rglob("*") if p.name != "manifest.json" and p.is_file()
    )
    assert size == on_disk
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=int(size * 0.9)))
        with pytest.raises(
            RedHeartError, match=r"a checkpoint takes .* MiB and .* has .* MiB free: .*no checkpoint yet"
        ):
            start(config(), data, tmp_path / "first")
        run = shutil.copytree(blocking, tmp_path / "later")
        with pytest.raises(RedHeartError, match=r"MiB free: make room; --resume goes on from .*step-00000006"):
            start(config("training.max_steps=8"), data, run, "last")
    assert names(tmp_path / "first") == []
    assert names(run) == names(blocking)
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_checkpoints_by_the_clock_and_by_signal(data: Path, tmp_path: Path, monkeypatch):
    timed = start(
        config("training.max_steps=3", "training.checkpoint_every=99", "checkpoint.minutes=1e-9"),
        data,
        tmp_path / "timed",
    )
    assert names(tmp_path / "timed") == steps(0, 1, 2, 3)
    assert timed.saving["checkpoints"] == 4
    step = Trainer._step

    def asked(self, stop):
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, stop)

    monkeypatch.setattr(Trainer, "_step", asked)
    ended = start(config("training.checkpoint_every=99"), data, tmp_path / "asked")
    assert names(tmp_path / "asked") == steps(3, 6)
    assert ended.signal is None


def test_a_second_signal_ends_at_once(monkeypatch):
    for grace in ("ALONE_S", "GRACE_S"):  # an engine before in this process looks like a launcher
        monkeypatch.setattr(f"redheart.train.guard.{grace}", 0.05)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where a shell runs this in the background
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # what a shell passes on as well
        assert stop.wanted
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            _interrupted()
    signal.signal(signal.SIGINT, before)


def _interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


def test_the_plan_counts_the_copy():
    copies = []
    for background in ("true", "false"):
        settings = config(f"checkpoint.background={background}")
        request = Request(
            settings, "plain", 2, 4, False, MicroStep(0, 0, 0, 0, 0, 0), parameters_of(settings), on_cpu=True
        )
        copies.append(predict(request).host_peak)
    assert copies[0] - copies[1] == 12 * parameters_of(settings).total  # weights and both moments in fp32


class StandIn:
    def save(self, directory: Path) -> None:
        (directory / "state").write_text("weights")


def test_which_checkpoints_stay(tmp_path: Path):
    """The newest, the best, those of round steps, and with rewinds one that lies far enough back."""
    up_and_down, falling = [0.9, 0.5, 0.7, 0.4, 0.8, 0.6, 0.95, 0.99], [1 / n for n in range(1, 9)]

    def kept(values: list[float], *more: str) -> list[str]:
        settings, run, state = config("checkpoint.keep_last=1", *more), tmp_path / "-".join(["run", *more]), Progress()
        for value in values:
            state.step += 1
            state.improves(value)
            checkpoint.save(StandIn(), run, settings, state, settings.checkpoint.keep_last)
        return names(run)

    assert kept(up_and_down) == steps(4, 8)
    assert kept(up_and_down, "checkpoint.keep_best=3") == steps(2, 4, 6, 8)
    assert kept(up_and_down, "checkpoint.keep_every=3") == steps(3, 4, 6, 8)
    assert kept(falling, "checkpoint.keep_best=2") == steps(7, 8)
    back, newest = kept(falling, "guard.on_spike=rewind", "guard.skip_steps=3")
    assert (back <= steps(6)[0], newest) == (True, steps(8)[0])


def test_the_end_of_a_run_says_what_saving_took(data: Path, blocking: Path, tmp_path: Path, capsys):
    run = shutil.copytree(blocking, tmp_path / "run")
    result = start(config("training.max_steps=8"), data, run, "last")
    line = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("saved: "))
    mib = checkpoint.size_of(committed(run)[-1]) / 2**20
    assert f"saved: 1 checkpoints, {mib:,.1f} MiB" in line
    assert f"resumed after {result.resume_s:.1f} s; no spikes, no skipped steps" in line
    assert 0 < result.saving["share"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2_offload_8bit", "zero3"])
def test_two_ranks_write_in_the_background_what_they_would_have_written(data: Path, tmp_path: Path, strategy: str):
    settings = [x for s in [*QUICK, f"memory.strategy={strategy}"] for x in ("--set", s)]
    for name, background in (("copied", "true"), ("blocked", "false")):
        train(data, tmp_path / name, STEPS, *settings, "--set", f"checkpoint.background={background}", ranks=2)
    copied, blocked = last_weights(tmp_path / "copied"), last_weights(tmp_path / "blocked")
    assert all(torch.equal(copied[k], blocked[k]) for k in blocked)
    assert names(tmp_path / "copied") == steps(2, 4, 6)
    shutil.copytree(tmp_path / "copied" / "checkpoints" / steps(4)[0], tmp_path / "run" / "checkpoints" / steps(4)[0])
    train(data, tmp_path / "run", STEPS, *settings, "--resume", tmp_path / "run" / "checkpoints" / steps(4)[0], ranks=2)
    again = last_weights(tmp_path / "run")
    assert all(torch.equal(again[k], blocked[k]) for k in blocked)
