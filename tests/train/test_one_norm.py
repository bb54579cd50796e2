"""A step reads all gradient norms at once, on every engine, and clips, skips and updates as torch does."""

import inspect
from functools import partial

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from redheart.bench.step import counting
from redheart.config import load_config
from redheart.model.build import build_model
from redheart.tasks import task_weights
from redheart.train.engine import Engine, make_engine, parameter_groups
from redheart.train.engine.base import clip_coefficient, norms_of, read_norms
from redheart.train.stages import compute, forward, open_window, update
from tests.train.tiny import SETTINGS, make_batch

# waits of backward and step together; what is above 1 is DeepSpeed looking at the norm, on the host already
MOST = {
    "plain": 1,
    "zero1": 2,
    "zero2": 2,
    "zero2_offload": 2,
    "zero2_offload_8bit": 2,
    "zero3": 2,
    "zero3_offload_8bit": 2,
}


def start(strategy: str, precision: str = "fp32") -> Engine:
    config = load_config("local", [*SETTINGS, f"memory.strategy={strategy}", f"training.precision={precision}"])
    torch.manual_seed(0)
    return make_engine(partial(build_model, config, None), config, 1, 8)


def loss_of(engine: Engine, factor: float = 1.0) -> torch.Tensor:
    config = load_config("local", SETTINGS)
    batch = make_batch(range(8)).to(engine.device, engine.dtype)
    window = open_window([batch], False)
    loss, _ = compute(forward(engine, batch), batch, window.counts, task_weights(config.loss), 1, config.loss)
    return loss * factor


@pytest.mark.parametrize("strategy", MOST)
def test_a_step_waits_once_and_skips_what_is_not_finite(strategy: str):
    engine = start(strategy, "fp32" if strategy == "plain" else "bf16")
    try:
        step_by_step(engine, strategy)
    finally:
        engine.close()


def step_by_step(engine: Engine, strategy: str) -> None:
    for factor in (1.0, 1.0, float("nan"), 1.0):
        loss = loss_of(engine, factor)
        before = [p.detach().clone() for p in engine.model.parameters()]
        with counting() as (_, seen):
            engine.backward(loss, True)
            done = update(engine, 1e-3)
        assert done.applied is (factor == 1.0)
        finite = [torch.isfinite(torch.tensor(v)) for v in done.module_norms.values()]
        assert all(finite) if done.applied else not any(finite)
        assert seen.total() <= MOST[strategy], seen
        if engine.forward_has_collectives:
            continue  # cut up, and empty
        same = [torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True)]
        assert not all(same) if done.applied else all(same)


@pytest.mark.parametrize("size", [1e-3, 10.0])  # below and above what is clipped
def test_plain_steps_are_those_of_torch(size: float):
    """clip_grad_norm_ and AdamW, one tensor after the other; differences are of rounding."""
    engine, other = start("plain"), start("plain")
    reference = torch.optim.AdamW(parameter_groups(other.model, 0.01), lr=1e-3, foreach=False)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        for p, q in zip(engine.model.parameters(), other.model.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).mul_(size / 100)
            q.grad = p.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        reference.step()
        assert update(engine, 1e-3).grad_norm == pytest.approx(expected.item(), rel=1e-6)
    for p, q in zip(engine.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)  # of a way of 4e-3


def test_norms_by_module_are_those_of_float64():
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "backbone.a": (300, 700),
        "backbone.b": (11,),
        "heads.emotion.c": (5, 7, 9),
        "heads.emotion.d": (2_000_000,),
    }
    gradients = {n: torch.randn(s, generator=generator) * 10 ** len(n) for n, s in shapes.items()}
    owners = [name.rpartition(".")[0] for name in gradients]
    found = read_norms(["backbone", "heads.emotion"], owners, norms_of(list(gradients.values())))
    for module, norm in found.items():
        parts = [g.double().flatten() for n, g in gradients.items() if n.startswith(module)]
        assert norm == pytest.approx(torch.cat(parts).norm().item(), rel=1e-5)
    half = torch.full((3000,), 300.0, dtype=torch.bfloat16)
    assert norms_of([half])[0].item() == pytest.approx(300 * 3000**0.5, rel=1e-6)


def test_what_is_small_is_not_scaled():
    assert clip_coefficient(0.5, 1.0) == 1.0
    assert clip_coefficient(4.0, 1.0) == pytest.approx(0.25)


def test_deepspeed_steps_as_it_did_when_its_norm_was_replaced():
    assert deepspeed.__version__ == "0.19.8", (
        "read stage_1_and_2.py and stage3.py again: train/engine/one_norm.py follows this version"
    )
    two = inspect.getsource(DeepSpeedZeroOptimizer.step)
    assert two.count("self.scaled_global_norm()") == two.count("self.check_overflow(partition_gradients=") == 1
    assert (
        two.index("self.overflow = False") < two.index("self.check_overflow(") < two.index("self.scaled_global_norm()")
    )
    three = inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    three = three[three.index("def step(self") :]
    assert two.index("self.scaled_global_norm()") < two.index("is_invalid_grad_norm(scaled_global_grad_norm)")
    assert three.index("self._get_norm_groups()") < three.index("is_invalid_grad_norm(scaled_global_grad_norm)")
    for source in (two, three):
        assert "self.unscale_and_clip_grads(" in source
