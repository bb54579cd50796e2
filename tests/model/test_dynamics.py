"""DSP simulator and Kalman fusion cost a fixed number of operations, and wait for nothing, however long the texts are."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from redheart.model.axes import Width
from redheart.model.dynamics import NUM, DspSimulator, KalmanFusion
from redheart.signals.native import torch_form

WAITS = {"aten::_local_scalar_dense", "aten::_linalg_check_errors", "aten::_linalg_svd", "aten::nonzero", "aten::equal"}
UNCOUNTED = {"aten::detach", "aten::alias", "aten::lift_fresh"}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name not in UNCOUNTED:
            self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def operations(kind: type, steps: int) -> collections.Counter:
    """Of one forward and backward, without dropout."""
    torch.manual_seed(0)
    module = kind(Width(12), Width(8), 0.0).train()
    leaf = lambda *shape: torch.randn(shape).requires_grad_()  # noqa: E731
    tokens, pooled, feature, trajectory = leaf(3, steps, 12), leaf(3, 12), leaf(3, 8), leaf(3, steps, NUM)
    mask = torch.arange(steps)[None] < torch.tensor([[steps], [steps // 2], [1]])
    readings = (trajectory,) if kind is DspSimulator else (leaf(3, NUM), trajectory, leaf(3, steps, NUM))
    with Operations() as seen:
        out = list(module(tokens, mask, pooled, feature, *readings, None))
    weights = [torch.ones_like(x) for x in out]
    with seen:
        torch.autograd.backward(out, weights)
    assert all(p.grad is not None for p in module.parameters())
    return seen.names


# a few more than are counted in a fresh process: where ZeRO-3 was used before, DeepSpeed has exchanged torch's linear function
@pytest.mark.parametrize(("kind", "most"), [(DspSimulator, 80), (KalmanFusion, 115)])
def test_the_number_of_operations_does_not_depend_on_the_texts_length(kind: type, most: int):
    short, long = operations(kind, 16), operations(kind, 64)
    assert short == long
    assert sum(long.values()) <= most
    assert not WAITS & set(long)


@pytest.mark.parametrize("kind", [DspSimulator, KalmanFusion])
def test_nothing_waits_in_the_torch_form_either(kind: type):
    with torch_form():
        assert not WAITS & set(operations(kind, 5))


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_a_reading_that_is_missing_says_nothing(missing: tuple[int, ...]):
    torch.manual_seed(0)
    module = KalmanFusion(Width(12), Width(8), 0.0).double()
    tokens, mask = torch.randn(2, 5, 12).double(), torch.ones(2, 5).bool()
    whole = torch.randn(2, 12).double(), torch.randn(2, 8).double()
    readings = [torch.randn(2, *shape).double() for shape in ((7,), (5, 7), (5, 7))]
    left = tuple(None if i in missing else z for i, z in enumerate(readings))
    got = module(tokens, mask, *whole, *left, None)
    with torch.no_grad():  # as if it said nothing of the state
        module.observation_weight[list(missing)] = 0.0
    for a, b in zip(got, module(tokens, mask, *whole, *readings, None), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
