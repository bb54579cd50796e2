"""What a training step asks of the machine: operations, parameter tensors, waits for the device; and how fast it is.

    redheart bench step --preset local --json

Operations are counted in one micro-step (forward, losses, backward) of eight texts of 64 tokens, each with a contrast text, as torch
dispatches them; views and bare allocations launch nothing and do not count. A wait is what a GPU would make the host wait for: a number
read from a tensor, a check inside an operation. They are counted on the CPU, where they stand in the same places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from redheart.bench.timing import interleaved
from redheart.config import load_config
from redheart.losses.combine import factors
from redheart.model.build import build_model
from redheart.options import Preset, Repeats, Set
from redheart.tasks import GATES, TASKS, task_weights
from redheart.train import stages
from redheart.train.engine import make_engine
from redheart.train.measure import synthetic_batch

ROWS, TOKENS = 8, 64  # of the counted micro-step
GEMM = 2048  # edge of the matrix product whose speed the step's is compared with
FREE = {
    "detach",
    "alias",
    "lift_fresh",
    "empty",
    "new_empty",
    "empty_like",
    "new_empty_strided",
    "empty_strided",
    "_unsafe_view",
}
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "_linalg_check_errors"}
COPIES = {torch.Tensor.tolist, torch.Tensor.numpy}  # no operation of theirs is dispatched


class _Operations(TorchDispatchMode):
    def __init__(self, operations: Counter[str], waits: Counter[str]):
        super().__init__()
        self.operations, self.waits = operations, waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            self.waits[name] += 1
        elif not func.is_view and name not in FREE:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Counter[str]):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPIES:
            self.waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """(operations, waits) of what runs within it, by name."""
    operations: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    with _Operations(operations, waits), _Functions(waits):
        yield operations, waits


def bench_step(
    preset: Preset = "local",
    set_: Set = None,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Of the timed step.")] = 16,
    repeats: Repeats = 7,
) -> dict[str, Any]:
    """Operations, parameter tensors and waits of a training step, counted; samples per second beside matrix products."""
    settings = ["memory.strategy=plain", "training.precision=fp32", f"training.global_batch_size={micro_batch}"]
    config = load_config(preset, settings + (set_ or []))
    engine = make_engine(lambda place: build_model(config, None, place), config, 1, micro_batch)
    scale = factors(task_weights(config.loss), dict.fromkeys((*TASKS, *GATES), 1.0), config.loss.constant_floor)

    def micro_step(rows: int) -> Callable[[], stages.LossSums]:
        window = stages.open_window([synthetic_batch(rows, TOKENS, config.model.encoder_width)], False)
        return lambda: stages.accumulate(engine, window, scale, config.loss)[0]

    counted, timed = micro_step(ROWS), micro_step(micro_batch)
    update = lambda: stages.update(engine, 0.0)  # noqa: E731
    counted(), update()  # what is made once for a device is made
    with counting() as (operations, waits):
        sums = counted()
    with counting() as (operations_of_step, waits_of_step):
        update(), sums.read()
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    with FlopCounterMode(display=False) as flops:
        timed()
    update()
    seconds = interleaved({"step": lambda: (timed(), update()), "matmul": lambda: a @ b}, repeats)
    step_s, matmul_s = median(seconds["step"]), median(seconds["matmul"])
    rates = {"step": flops.get_total_flops() / step_s / 1e9, "matmul": 2 * GEMM**3 / matmul_s / 1e9}
    return {
        "preset": config.preset,
        "threads": torch.get_num_threads(),
        "ops": operations.total(),
        "ops_per_update": operations_of_step.total(),
        "tensors": sum(1 for _ in engine.model.parameters()),
        "waits_per_micro_step": waits.total(),
        "waits_per_step": waits_of_step.total(),
        "micro_batch_size": micro_batch,
        "samples_per_s": micro_batch / step_s,
        "gflop_per_s": rates,
        "matmul_share": rates["step"] / rates["matmul"],
        "most_frequent": dict(operations.most_common(12)),
    }
