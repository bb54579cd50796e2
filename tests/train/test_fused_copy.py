"""DeepSpeed's own cast of the master weights is gone, and the weights are what it would have made of them."""

import inspect

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.utils._python_dispatch import TorchDispatchMode

from redheart.config import load_config
from redheart.model.build import build_model
from redheart.train.engine import make_engine
from tests.train.tiny import SETTINGS


class Casts(TorchDispatchMode):
    """Counts copies of fp32 into bf16 tensors of at least `least` elements."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.seen = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            to, source = args[:2]
            self.seen += to.dtype == torch.bfloat16 and source.dtype == torch.float32 and to.numel() >= self.least
        return func(*args, **(kwargs or {}))


def casts_of_a_step(strategy: str) -> tuple[int, int]:
    """(casts of whole partitions in a step, partitions); the model's weights must be the masters' rounded."""
    config = load_config("local", [*SETTINGS, f"memory.strategy={strategy}", "training.precision=bf16"])
    engine = make_engine(lambda place: build_model(config, None, place), config, 1, 8)
    zero = engine._zero
    for _ in range(2):
        for master in zero.single_partition_of_fp32_groups:
            master.grad = torch.randn_like(master)
        zero._global_grad_norm = 0.0
        before = [flat.clone() for flat in zero.bit16_groups_flat]
        with Casts(min(m.numel() for m in zero.single_partition_of_fp32_groups)) as casts:
            zero.scaled_global_norm = lambda norm_type=2: torch.tensor(1.0)
            zero.step()
    for flat, master, old in zip(zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, before, strict=True):
        assert torch.equal(flat, master.detach().bfloat16())
        assert not torch.equal(flat, old)
    groups = len(zero.single_partition_of_fp32_groups)
    engine.close()
    return casts.seen, groups


def test_the_16_bit_weights_are_written_once():
    assert deepspeed.__version__ == "0.19.8", (
        "read stage_1_and_2.py again: train/engine/fused_copy.py follows this version"
    )
    source = inspect.getsource(DeepSpeedZeroOptimizer.step)
    for line in (
        "bit16_partition_buffer.data.copy_(fp32_partition.data)",
        "bit16_partitions[partition_id].data.copy_(bit16_partition_buffer.data, non_blocking=True)",
    ):
        assert source.count(line) == 1
    assert source.count("self._optimizer_step(i)") == 2  # with and without offload
    seen, groups = casts_of_a_step("zero2_offload")
    assert seen == groups  # DeepSpeedCPUAdam: DeepSpeed casts, so the counter can count
    assert casts_of_a_step("zero2_offload_8bit")[0] == 0
