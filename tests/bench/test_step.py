"""What a training step asks of the machine is counted, so that it does not grow unseen."""

import json
from pathlib import Path

import pytest
import torch

from redheart.bench.step import counting
from redheart.config import load_config
from redheart.train import stages
from redheart.train.start import train
from redheart.train.trainer import Trainer
from tests.faults.kinds import SETTINGS, write_data
from tests.runs import redheart


def test_a_step_is_arithmetic_and_waits_for_nothing():
    # in a process of its own: DeepSpeed exchanges torch's linear function for good, which counts otherwise
    ran = redheart("bench", "step", "--micro-batch", "2", "--repeats", "1", "--json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["ops"] <= 2500, result["most_frequent"]
    assert result["tensors"] <= 300
    assert result["waits_per_micro_step"] == 0
    assert result["waits_per_step"] <= 2
    assert result["samples_per_s"] > 0
    assert result["matmul_share"] > 0


def test_the_count_knows_views_allocations_and_waits():
    x = torch.ones(4, requires_grad=True)

    def work() -> None:
        y = (x * 2).view(2, 2).sum()
        torch.empty(3)
        assert y.item() == 8
        assert x.tolist()[0] == 1
        y.backward()

    with counting() as (operations, waits):
        work()
    assert operations["mul"] == 2  # forward and backward
    assert operations["sum"] == 1
    assert "view" not in operations
    assert "empty" not in operations
    assert waits == {"_local_scalar_dense": 1, "tolist": 1}


@pytest.mark.parametrize("on_spike", ["warn", "rewind"])
def test_the_losses_of_a_step_are_read_once_it_has_waited_anyway(tmp_path: Path, monkeypatch, on_spike: str):
    """By the guard, which looks at all of them: reading a number before the gradient's norms would be a wait of its own."""
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    config = load_config(
        "local", [*SETTINGS, f"guard.on_spike={on_spike}", "training.log_every=100", "training.max_steps=3"]
    )
    seen: dict[str, list[int]] = {"between": [], "whole": []}
    accumulate, update, step = stages.accumulate, stages.update, Trainer._step
    with counting() as (_, waits):

        def accumulated(*arguments):
            found = accumulate(*arguments)
            seen["between"].append(-waits.total())
            return found

        def updated(*arguments):
            seen["between"][-1] += waits.total()
            seen["whole"].append(-waits.total())
            return update(*arguments)

        def stepped(self, stop):
            found = step(self, stop)
            seen["whole"][-1] += waits.total()
            return found

        monkeypatch.setattr(stages, "accumulate", accumulated)
        monkeypatch.setattr(stages, "update", updated)
        monkeypatch.setattr(Trainer, "_step", stepped)
        train(config, tmp_path / "data", tmp_path / "run")
    assert seen == {"between": [0, 0, 0], "whole": [2, 2, 2]}  # the norms, the losses
