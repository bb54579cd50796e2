"""Tensors without memory: torch's FakeTensorMode is the oracle of what operations run, what they keep and what they compute."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from redheart.memory import activations as room
from redheart.memory.activations import measure
from redheart.memory.shapes import Shape, Shapes
from tests.memory.test_activations import tiny


@pytest.mark.parametrize(
    ("checkpointing", "dtype", "autocast"),
    [(False, torch.float32, False), (True, torch.float32, False), (True, torch.bfloat16, False), (False, torch.float32, True)],
)  # fmt: skip
def test_a_micro_step_is_that_of_fake_tensors(monkeypatch, checkpointing: bool, dtype: torch.dtype, autocast: bool):
    mine = measure(tiny(), 3, 12, checkpointing, dtype, autocast, contrasts=2)
    monkeypatch.setattr(room, "Shapes", FakeTensorMode)
    theirs = measure(tiny(), 3, 12, checkpointing, dtype, autocast, contrasts=2)
    assert (mine.flops, mine.kernels, mine.gradients) == (theirs.flops, theirs.kernels, theirs.gradients)
    if dtype == torch.float32 and not autocast:
        assert asdict(mine) == asdict(theirs)
    else:  # norms of 16-bit numbers: their statistics are fp32 here, as on CUDA
        assert theirs.peak <= mine.peak <= 1.02 * theirs.peak
        assert theirs.peak_rounded <= mine.peak_rounded <= 1.02 * theirs.peak_rounded


def test_a_shape_is_a_tensor_of_the_cpu_without_data():
    with Shapes():
        q = torch.empty(2, 3, 64, 16, requires_grad=True)
        k = torch.zeros(2, 3, 64, 16, device="cpu")
        constant = torch.tensor([1.0, 2.0])
        with torch.autocast("cpu", torch.bfloat16):
            product = q @ k.mT
        attended = F.scaled_dot_product_attention(q, k, k)
        attended.square().sum().backward()
        in_place = k.add_(1)
    for tensor in (q, k, constant, product, attended, q.grad):
        assert isinstance(tensor, Shape)
        assert tensor.device.type == "cpu"
    assert in_place is k
    assert product.dtype == torch.bfloat16
    assert (q.grad.shape, q.grad.dtype) == (q.shape, torch.float32)
    assert "FlashAttentionForCpu" in type(attended.grad_fn).__name__


def test_views_share_one_storage():
    with Shapes():
        whole = torch.empty(4, 8)
        assert whole[1:].untyped_storage() is whole.mT.untyped_storage()
        assert whole.clone().untyped_storage() is not whole.untyped_storage()


def test_data_that_is_not_there_is_not_read():
    with Shapes():
        x = torch.ones(3)
        with pytest.raises((RuntimeError, NotImplementedError)):
            x.sum().item()
    with pytest.raises(RuntimeError, match="outside of Shapes"):
        x + 1
