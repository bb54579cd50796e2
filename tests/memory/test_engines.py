"""Every DeepSpeed file starts a real engine: a tiny network takes four steps, its optimizer the one that was asked for."""

import json
import os

import pytest
import torch

from redheart.config import load_config
from redheart.memory.ds_files import FILES, ds_settings
from redheart.memory.states import chunked
from redheart.model.build import build_model
from redheart.tasks import task_weights
from redheart.train.engine import base, make_engine, zero
from redheart.train.stages import compute, forward, open_window, update
from tests.train.tiny import SETTINGS, make_batch

# few modules: ZeRO hooks into every one of them
FEW = "model.ablate=[analyzers.emotion, analyzers.regret, analyzers.surd, heads.surd, aux.dsp, aux.kalman]"


@pytest.mark.parametrize("file", FILES)
def test_a_file_starts_an_engine_that_steps(file: str, monkeypatch):
    settings = [*SETTINGS, FEW, "training.precision=fp32", f"memory.strategy={FILES[file]}"]
    config = load_config("local", settings)

    def of_this_file(config, accumulation, micro_batch_size, world_size):
        found = ds_settings(file)
        found |= {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "train_batch_size": 8}
        found["bf16"]["enabled"] = False
        found["zero_optimization"].get("offload_optimizer", {})["pin_memory"] = False
        return found

    monkeypatch.setattr(zero, "deepspeed_config", of_this_file)
    engine = make_engine(lambda place: build_model(config, None, place), config, 1, 8)
    assert json.dumps(engine.settings)
    batch, factors = make_batch(range(8)), task_weights(config.loss)
    losses = []
    for _ in range(4):
        window = open_window([batch], False)
        loss, _ = compute(forward(engine, batch), batch, window.counts, factors, 1, config.loss)
        engine.backward(loss, True)
        assert update(engine, 1e-3).applied
        losses.append(float(loss))
    expected = {"_offload_8bit": "CPUAdamW8bit", "_offload": "DeepSpeedCPUAdam"}
    wanted = next((v for k, v in expected.items() if FILES[file].endswith(k)), "AdamW")
    assert type(engine._zero.optimizer).__name__ == wanted
    assert losses[-1] < losses[0]
    engine.close()
    assert torch.distributed.is_initialized()
    assert os.environ["WORLD_SIZE"] == "1"


@pytest.mark.slow  # two engines
def test_groups_that_are_cut_take_the_same_steps(monkeypatch):
    """What large networks have: several groups of each kind, here of a small one."""
    config = load_config("local", [*SETTINGS, "training.precision=fp32", "memory.strategy=zero2_offload"])
    batch, factors, found = make_batch(range(8)), task_weights(config.loss), []
    for most in (2**25, 20_000):
        monkeypatch.setattr(base, "chunked", lambda sizes, most=most: chunked(sizes, most))
        torch.manual_seed(0)
        engine = make_engine(lambda place: build_model(config, None, place), config, 1, 8)
        losses = []
        for _ in range(3):
            window = open_window([batch], False)
            loss, _ = compute(forward(engine, batch), batch, window.counts, factors, 1, config.loss)
            engine.backward(loss, True)
            assert update(engine, 1e-3).applied
            losses.append(float(loss))
        found.append((losses, len(engine.optimizer_groups())))
        engine.close()
    (whole, few), (cut, many) = found
    assert few == 2 < many
    assert cut == pytest.approx(whole, rel=1e-5)
