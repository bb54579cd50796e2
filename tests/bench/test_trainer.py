"""The trainer bench: what Transformers' Trainer is given is the batch and the loss of the others; one whole bench of a tiny network."""

import json
from pathlib import Path

import pytest
import torch

from redheart.bench.trainer import LEGS, WARM, _batch, _Clock, _flat
from redheart.config import load_config
from redheart.schema import Batch
from tests.runs import redheart
from tests.train.conftest import data  # noqa: F401 (fixture)
from tests.train.tiny import SETTINGS, make_batch


def test_a_batch_is_the_same_through_its_tensors():
    batch = make_batch(range(8))
    again = _batch(_flat(batch))
    assert isinstance(again, Batch)
    assert _flat(again).keys() == _flat(batch).keys()
    assert all(torch.equal(a, b) for a, b in zip(_flat(again).values(), _flat(batch).values(), strict=True))
    assert again.labels.keys() == batch.labels.keys()


def test_steps_are_timed_from_the_first_that_counts(monkeypatch):
    clock = _Clock({"warm": 2, "steps": 6}, load_config("local", SETTINGS))  # batches of 8
    for step in range(1, 7):
        monkeypatch.setattr("time.perf_counter", lambda step=step: 10.0 + 0.5 * step)
        clock.ended(step)
    assert clock.rate == pytest.approx(8 / 0.5)


@pytest.mark.slow  # three processes a strategy
@pytest.mark.parametrize("strategy", ["plain", "zero2_offload"])
def test_a_whole_bench(data: Path, strategy: str):  # noqa: F811
    tiny = [x for s in SETTINGS if not s.startswith("memory") for x in ("--set", s)]
    done = redheart(
        "bench", "trainer", "--data", data, "--strategy", strategy, *tiny, "--steps", "5", "--rounds", "1", "--json", timeout=600
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["samples_per_s"].keys() == set(LEGS)
    speed = found["samples_per_s"]
    assert found["ratio_to_bare_loop"] == pytest.approx(speed["redheart"] / speed["bare_loop"])
    assert found["ratio_to_hf_trainer"] == pytest.approx(speed["redheart"] / speed["hf_trainer"])
    assert found["steps"] == 10  # whole windows of the log
    assert WARM % 10 == 0
