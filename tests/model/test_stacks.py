"""Stacks taken apart: the gradients are those of `unbind`, whatever of the stack a loss reaches, and recomputing changes none."""

import pytest
import torch

from redheart.config import load_config
from redheart.memory.activations import measure
from redheart.model.build import build_model
from redheart.model.stacks import Recomputed
from redheart.train.measure import synthetic_batch


def taken_apart(stack: torch.Tensor, recomputing: bool) -> tuple[torch.Tensor, ...]:
    owner = Recomputed()
    owner.gradient_checkpointing = recomputing
    return owner.apart(stack)


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), ()])
def test_gradients_are_those_of_unbind(used: tuple[int, ...]):
    """Also where a loss reaches some of the layers, and where two passes through the stack are one loss."""
    value, x = torch.randn(3, 4, 4), torch.randn(2, 4)
    found = []
    for recomputing in (False, True):
        stack = value.clone().requires_grad_()
        loss = (stack * 0).sum()
        for turn in (1.0, 2.0):
            pieces, y = taken_apart(stack, recomputing), turn * x
            for i in used:
                y = torch.tanh(y @ pieces[i])
            loss = loss + y.square().sum()
        loss.backward()
        found.append(stack.grad)
    assert torch.equal(*found)
    assert bool(found[0].any()) == bool(used)


def test_whoever_recomputes_learns_the_same():
    config = load_config("local")
    torch.manual_seed(0)
    model = build_model(config, None)
    batch = synthetic_batch(2, 6, config.model.encoder_width).to("cpu", torch.float32)
    found = []
    for recomputing in (False, True):
        model.checkpoint_activations(recomputing)
        outputs = model(batch.features, batch.mask, sample_keys=batch.keys)
        loss = sum(x.float().square().mean() for x in outputs.values() if isinstance(x, torch.Tensor))
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.slow  # two micro-steps
def test_whoever_recomputes_holds_less():
    config = load_config("local")
    kept, recomputed = (measure(config, 8, 32, wanted, torch.float32) for wanted in (False, True))
    assert recomputed.peak < 0.5 * kept.peak
    assert recomputed.flops < 1.3 * kept.flops
