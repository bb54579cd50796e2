"""ZeRO-2 and ZeRO-3 with 8-bit states: resumed bit by bit, on another number of ranks too."""

import json
from pathlib import Path
from typing import Any

import pytest

from redheart.model.select import MODULES
from tests.runs import forked


def run(ranks: int, **wanted: Any) -> dict[str, Any]:
    done = forked("tests.train.tiny_run", json.dumps({"precision": "fp32", **wanted}), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("strategy", ["zero2_offload_8bit", pytest.param("zero3_offload_8bit", marks=pytest.mark.slow)])
def test_two_ranks_become_one_and_two_again(strategy: str, tmp_path: Path):
    whole = run(2, strategy=strategy, steps=14, save_at=2, save=str(tmp_path / "a"), twice=True)
    assert whole["optimizer"] == "CPUAdamW8bit"
    assert whole["bitwise"]  # as many ranks: native states
    assert whole["losses"][-1] < whole["losses"][0]
    one = run(1, strategy=strategy, steps=6, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    two = run(2, strategy=strategy, steps=6, load=str(tmp_path / "b"), save=str(tmp_path / "c"))
    assert one["losses"][0] == pytest.approx(whole["losses"][2], rel=1e-5)
    assert one["losses"] + two["losses"] == pytest.approx(whole["losses"][2:], rel=1e-3)
    assert not list(tmp_path.glob("*.universal"))


def test_one_rank_resumes_bitwise_under_zero_3_and_its_losses_are_zero_2s(tmp_path: Path):
    three = run(1, strategy="zero3_offload_8bit", steps=6, save_at=3, save=str(tmp_path / "a"), twice=True)
    two = run(1, strategy="zero2_offload_8bit", steps=6, save=str(tmp_path / "b"))
    assert three["bitwise"]
    assert three["losses"] == pytest.approx(two["losses"], rel=2e-3)
    assert len(three["norms"]) == len(MODULES)  # no module's gradient goes missing on its way into a partition
    assert three["norms"] == pytest.approx(two["norms"], rel=1e-3)


@pytest.mark.slow
def test_fp32_states_change_their_world_size_too(tmp_path: Path):
    whole = run(1, strategy="zero2_offload", steps=6, save_at=2, save=str(tmp_path / "a"), twice=True)
    assert whole["optimizer"] == "DeepSpeedCPUAdam"
    assert whole["bitwise"]
    two = run(2, strategy="zero2_offload", steps=4, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    assert two["losses"] == pytest.approx(whole["losses"][2:], rel=1e-4)


@pytest.mark.parametrize("rows", [7, 2], ids=["two and one batches", "one and none"])
def test_ranks_with_unlike_numbers_of_batches_evaluate_under_zero_3(rows: int):
    wanted = json.dumps({"rows": rows, "batch_size": 3})
    done = forked("tests.train.evaluate_run", wanted, ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["ranks"] == 2
    assert told["together"]["rows"] == told["alone"]["rows"] == rows
    assert told["together"]["losses"] == pytest.approx(told["alone"]["losses"], rel=1e-5)
