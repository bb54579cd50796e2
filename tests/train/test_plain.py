"""torch alone with 8-bit states on the CPU: what it saves goes on bit by bit, and it learns."""

from functools import partial
from pathlib import Path

import pytest
import torch

from redheart.config import load_config
from redheart.model.build import build_model
from redheart.optim import CPUAdamW8bit
from redheart.schema import RedHeartError
from redheart.tasks import task_weights
from redheart.train.engine import PlainEngine, make_engine
from redheart.train.stages import compute, forward, open_window, update
from tests.train.tiny import SETTINGS, make_batch

WANTED = [*SETTINGS, "training.precision=fp32", "memory.strategy=plain", "optimizer.name=adamw_8bit"]


def engine(optimizer: str = "adamw_8bit") -> PlainEngine:
    config = load_config("local", [*WANTED, f"optimizer.name={optimizer}"])
    torch.manual_seed(0)
    made = make_engine(partial(build_model, config, None), config, 1, 8)
    assert isinstance(made, PlainEngine)
    assert isinstance(made._optimizer, CPUAdamW8bit if optimizer == "adamw_8bit" else torch.optim.AdamW)
    return made


def steps(one: PlainEngine, count: int) -> list[float]:
    batch, config, losses = make_batch(range(8)), load_config("local", WANTED), []
    for _ in range(count):
        window = open_window([batch], False)
        loss, _ = compute(forward(one, batch), batch, window.counts, task_weights(config.loss), 1, config.loss)
        one.backward(loss, True)
        assert update(one, 3e-4).applied
        losses.append(float(loss.detach()))
    return losses


def test_8_bit_states_are_saved_and_go_on_bit_by_bit(tmp_path: Path):
    whole, first, second = engine(), engine(), engine()
    losses = steps(whole, 6)
    assert losses[-1] < losses[0]
    assert steps(first, 3) == losses[:3]
    first.save(tmp_path)
    second.load(tmp_path)
    assert steps(second, 3) == losses[3:]
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_swap_and_8_bit_states_are_refused_together():
    config = load_config("local", [*WANTED, "memory.swap=[analyzers.emotion]"])
    with pytest.raises(RedHeartError, match=r"without memory\.swap"):
        make_engine(partial(build_model, config, None), config, 1, 8)
