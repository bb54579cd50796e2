"""What a training step asks of the machine is counted, so that it does not grow unseen."""

import json

import torch

from redheart.bench.step import counting
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
