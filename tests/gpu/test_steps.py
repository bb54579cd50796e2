"""One optimizer step of every strategy on the GPU is the CPU's step.

What is compared is what a step changes in the fp32 weights, as a share of the CPU's change. In fp32 the two differ by rounding;
in bf16 by no more than rounding to bf16 moves the CPU's own step away from fp32's. Adam's eps is as large as the gradients, so
that a step is a smooth function of them.
"""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from redheart.model.select import MODULES
from redheart.sections import Strategy
from tests.gpu.conftest import STAND_IN, begin, finish

CPU = [s for s in get_args(Strategy) if s != "gpu_8bit"]  # 8-bit states on the GPU: held against fp32 ones
GPU = CPU if STAND_IN else [*CPU, "gpu_8bit"]
FP32 = 1e-3
BF16 = 1.5  # of what rounding to bf16 does on the CPU


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both sides at once: {"precision", "gpu", "cpu"}, the latter two what they told, with their `folder`."""
    root = tmp_path_factory.mktemp(request.param)
    told: dict[str, Any] = {"precision": request.param}
    running = {
        side: begin("one_step", side, folder=str(root / side), strategies=names, precision=request.param)
        for side, names in (("gpu", GPU), ("cpu", CPU))
    }
    for side, process in running.items():
        told[side] = {**finish(process), "folder": root / side}
    return told


@pytest.fixture(scope="module")
def rounding(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How far rounding to bf16 moves a step on the CPU, as a share of the step."""
    steps = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path_factory.mktemp(f"cpu-{precision}")
        finish(begin("one_step", "cpu", folder=str(folder), strategies=["zero2"], precision=precision))
        steps[precision] = change(folder, "zero2")
    return apart(steps["bf16"], steps["fp32"])


def change(folder: Path, strategy: str) -> torch.Tensor:
    parts = torch.load(folder / f"{strategy}.pt", weights_only=True)
    return torch.cat([parts[n].flatten().double() for n in sorted(parts)])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("strategy", GPU)
def test_a_step_on_the_gpu_is_the_cpus(
    strategy: str, both: dict[str, Any], rounding: float, device: str, record_property: Any
):
    gpu, cpu = both["gpu"], both["cpu"]
    theirs = strategy if strategy in CPU else "zero2"
    assert gpu[strategy]["device"].startswith(device)
    assert cpu[theirs]["device"] == "cpu"
    distance = apart(change(gpu["folder"], strategy), change(cpu["folder"], theirs))
    record_property("distance", distance)
    record_property("bf16_rounding", rounding)
    assert change(cpu["folder"], theirs).norm() > 0
    assert distance <= (FP32 if both["precision"] == "fp32" else BF16 * rounding)
    near = 1e-4 if both["precision"] == "fp32" else 0.05
    assert gpu[strategy]["loss"] == pytest.approx(cpu[theirs]["loss"], rel=near)
    assert gpu[strategy]["norms"].keys() == set(MODULES)
    assert gpu[strategy]["norms"] == pytest.approx(cpu[theirs]["norms"], rel=10 * near, abs=near)


def test_fp32_products_are_fp32s(both: dict[str, Any]):
    assert both["gpu"]["tf32"] is False
