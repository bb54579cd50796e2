"""The parity bench with runs that are written, not trained: what it compares, and which of them it repeats."""

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from redheart.bench import made
from redheart.bench.made import training_code
from redheart.bench.parity import bench_parity
from redheart.schema import RedHeartError
from tests.data.shard_data import write_directory

LAST = {
    **{"adamw-seed0": 2.0, "adamw_8bit-seed0": 2.02, "adamw-seed1": 3.0, "adamw_8bit-seed1": 2.97},
    "adamw_again-seed1": 3.06,
}


def write_run(directory: Path, last: float, steps: int) -> None:
    with SummaryWriter(str(directory / "tensorboard")) as board:
        for step in range(0, steps + 1, 10):
            board.add_scalar("0_overview/dev_loss", last + (100 - step) / 100, step)
            board.add_scalar("2_modules/heads.regret/regret/dev_loss", last / 10, step)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that `redheart train` was called for; each is written at once."""
    names: list[str] = []

    def train(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        run = Path(command[command.index("--out") + 1])
        shutil.rmtree(run, ignore_errors=True)
        names.append(run.name)
        *_, steps = (s for s in command if s.startswith("training.max_steps="))
        write_run(run, LAST[run.name], int(steps.partition("=")[2]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", train)
    return names


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_directory(tmp_path, [4])
    return tmp_path


def test_finished_runs_are_compared_seed_by_seed(data: Path, tmp_path: Path, trained: list[str]):
    out = tmp_path / "parity.json"
    told = bench_parity(data, tmp_path / "work", "local", [], 100, 2, 1, out, control=[1])
    assert told["relative_difference_by_seed"] == pytest.approx([0.01, -0.01], abs=1e-6)
    assert told["relative_difference"] == pytest.approx(4.99 / 5 - 1, abs=1e-6)
    assert told["relative_difference_of_controls"] == {1: pytest.approx(0.02, abs=1e-6)}
    assert told["curves"]["adamw_8bit seed 0"][50] == pytest.approx(2.52)
    regret = told["final_dev_loss_by_answer"]["heads.regret/regret"]
    assert regret["adamw_8bit"] == pytest.approx([0.202, 0.297])
    assert regret["adamw_again"] == pytest.approx([0.306])
    assert out.stat().st_size > 500
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert sorted(trained) == sorted(LAST)
    assert bench_parity(data, tmp_path / "work", "local", [], 100, 2, 1, None, control=[1, 1]) == told
    assert len(trained) == len(LAST)


def test_a_run_stands_for_its_own_data_settings_and_steps_alone(data: Path, tmp_path: Path, trained: list[str]):
    work = tmp_path / "work"
    bench_parity(data, work, "local", [], 100, 1, 1)
    (tmp_path / "other").mkdir()
    write_directory(tmp_path / "other", [5])
    for asked in (
        (tmp_path / "other", work, "local", [], 100),
        (data, work, "base", [], 100),
        (data, work, "local", ["optimizer.weight_decay=0.5"], 100),
        (data, work, "local", [], 50),
        (data, work, "local", [], 150),
    ):
        with pytest.raises(RedHeartError, match=r"adamw-seed0 was made with other data, settings .* another --work"):
            bench_parity(*asked, 2, 1)
    (work / "adamw-seed0.made.json").unlink()  # as an earlier version left it
    with pytest.raises(RedHeartError, match=r"adamw-seed0 was made by an earlier version, .* another --work"):
        bench_parity(data, work, "local", [], 100, 1, 1)
    assert len(trained) == 2
    shutil.rmtree(work / "adamw-seed0")
    bench_parity(data, work, "local", [], 100, 1, 1)
    assert trained[2:] == ["adamw-seed0"]


def test_a_control_without_its_run_is_refused_before_any_trains(data: Path, tmp_path: Path, trained: list[str]):
    with pytest.raises(RedHeartError, match=r"--control 2 has .* 0 to 1: name one of these, or --seeds 3"):
        bench_parity(data, tmp_path / "work", "local", [], 100, 2, 1, control=[1, 2])
    assert not trained


def test_a_run_that_did_not_come_to_its_end_is_trained_again(data: Path, tmp_path: Path, trained: list[str]):
    work = tmp_path / "work"
    told = bench_parity(data, work, "local", [], 20, 1, 1)
    shutil.rmtree(work / "adamw-seed0")
    write_run(work / "adamw-seed0", 9.0, 10)
    assert bench_parity(data, work, "local", [], 20, 1, 1) == told
    assert trained[2:] == ["adamw-seed0"]
    with pytest.raises(RedHeartError, match="ended at step 30, not 20"):
        bench_parity(data, tmp_path / "long", "local", ["training.max_steps=30"], 20, 1, 1)


@pytest.mark.parametrize("file", ["adam8bit.py", "csrc/adam8bit.cpp", "csrc/blocks.h"])
def test_what_another_optimizer_made_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str):
    before = training_code()
    monkeypatch.setattr(made, "OPTIM", Path(shutil.copytree(made.OPTIM, tmp_path / "optim")))
    assert training_code() == before
    (tmp_path / "optim" / file).write_text("another")
    assert training_code() != before
