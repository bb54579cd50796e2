"""The parity bench on runs that are there already: what it compares, and that it repeats none of them."""

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from redheart.bench.parity import bench_parity


def write_run(directory: Path, last: float) -> None:
    with SummaryWriter(str(directory / "tensorboard")) as board:
        for step in range(0, 101, 10):
            board.add_scalar("0_overview/dev_loss", last + (100 - step) / 100, step)
            board.add_scalar("2_modules/heads.regret/regret/dev_loss", last / 10, step)


def test_finished_runs_are_compared_seed_by_seed(tmp_path: Path):
    for name, last in (
        ("adamw-seed0", 2.0),
        ("adamw_8bit-seed0", 2.02),
        ("adamw-seed1", 3.0),
        ("adamw_8bit-seed1", 2.97),
    ):
        write_run(tmp_path / "work" / name, last)
    write_run(tmp_path / "work" / "adamw_again-seed1", 3.06)
    out = tmp_path / "parity.json"
    told = bench_parity(tmp_path / "data", tmp_path / "work", "local", [], 100, 2, 1, out, control=[1])
    assert told["relative_difference_by_seed"] == pytest.approx([0.01, -0.01], abs=1e-6)
    assert told["relative_difference"] == pytest.approx(4.99 / 5 - 1, abs=1e-6)
    assert told["relative_difference_of_controls"] == {1: pytest.approx(0.02, abs=1e-6)}
    assert told["curves"]["adamw_8bit seed 0"][50] == pytest.approx(2.52)
    regret = told["final_dev_loss_by_answer"]["heads.regret/regret"]
    assert regret["adamw_8bit"] == pytest.approx([0.202, 0.297])
    assert regret["adamw_again"] == pytest.approx([0.306])
    assert out.stat().st_size > 500
    assert out.with_suffix(".png").stat().st_size > 10_000
