"""`redheart plan --measure`: real optimizer steps as configured, with predicted beside observed memory.

On a GPU: what torch's allocator had allocated and reserved at most, DeepSpeed's start included. On the CPU: the process's peak
resident memory (VmHWM), which starts at what the interpreter and the libraries hold before a network exists.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from redheart.config import RunConfig
from redheart.console import console, table
from redheart.device import has_gpu
from redheart.losses.combine import factors
from redheart.memory.activations import PAIR_SHARE, measured
from redheart.memory.budget import resident, resident_peak
from redheart.memory.plan import GIB, Request, parameters_of, predict
from redheart.model.build import build_model
from redheart.model.regional import check_compilation, compile_layers, compiler
from redheart.ranks import launched_world_size, sum_over_ranks
from redheart.schema import LABELS, Batch
from redheart.tasks import GATES, TASKS, task_weights
from redheart.train import stages
from redheart.train.engine import Engine, compile_kernels, free_memory, make_engine

NOMINAL_STEPS = 1000  # learning rates are those with which a run of so many steps warms up


def synthetic_batch(rows: int, tokens: int, width: int, seed: int = 0, contrasts: int | None = None) -> Batch:
    """Random features of full length, every label, and a contrast text for every sample (the most a micro-batch can hold) or for the
    first `contrasts`."""
    draw = torch.Generator().manual_seed(seed)
    features, others = (torch.randn(rows, tokens, width, generator=draw).half() for _ in range(2))
    mask, each = torch.ones(rows, tokens, dtype=torch.bool), torch.arange(rows)
    pairs = slice(contrasts)
    labels = {name: torch.rand(rows, label.size, generator=draw) for name, label in LABELS.items()}
    weights = {name: torch.ones_like(value) for name, value in labels.items()}
    origins = torch.zeros(rows, len(LABELS), dtype=torch.int8)
    return Batch(features, mask, others[pairs], mask[pairs], each[pairs], labels, weights, each, origins)


def measure_step(
    config: RunConfig,
    tokens: int,
    num_steps: int = 2,
    before_compiling: Callable[[dict[str, Any]], None] | None = None,
    contrasts: float = PAIR_SHARE,
) -> dict[str, Any]:
    """Runs `num_steps` optimizer steps (the second has everything resident); bytes as GiB, predicted and observed.

    Peaks count from before the engine is made; `start_gib` holds those at the time it was ready. `before_compiling` is given what was
    measured, and then follow as many steps with training.compile=regional on the same engine: `compiled` holds their seconds, the
    first one's with what compiling took.
    """
    micro, accumulation = stages.split_global_batch(
        config.training.global_batch_size, config.training.micro_batch_size, launched_world_size()
    )
    strategy, checkpointing, on_gpu = config.memory.strategy, config.model.activation_checkpointing, has_gpu()
    pairs = round(contrasts * micro)
    step = measured(config, micro, tokens, checkpointing, strategy == "plain", pairs)
    if strategy != "plain":
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's log keeps the stdout it is imported with
            compile_kernels()  # imports the libraries, too: they belong to the base
    if not on_gpu:
        warm_up(config)
    base = resident()
    request = Request(
        config, strategy, micro, accumulation, checkpointing, step, parameters_of(config),
        on_cpu=not on_gpu, gpus_per_node=launched_world_size(), base=base,
    )  # fmt: skip
    planned = predict(request)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(config.training.seed)
    engine = make_engine(partial(build_model, config, None), config, accumulation, micro)
    start = peaks()
    steps = run_steps(engine, config, micro, accumulation, tokens, num_steps, pairs)
    observed, predicted = peaks(), planned.peaks_gib()
    result = {
        "preset": config.preset,
        "tokens": tokens,
        "precision": config.training.precision,
        **planned.details(),
        "predicted": predicted,
        "observed": observed,
        "ratio": {name: predicted[name] / observed[name] for name in predicted},
        "base_gib": sum_over_ranks([float(base)])[0] / GIB,
        "start_gib": start,
        "resident_gib": steps.resident_gib,
        "step_seconds": steps.seconds,
        "losses": steps.losses,
        "pinned": dict(torch.cuda.host_memory_stats()) if on_gpu else {},  # beside `host_pinned_gib`
        "compiled": None,
        "micro_step": asdict(step),
    }
    if before_compiling is not None:
        before_compiling(result)
        result["compiled"] = _compiled(engine, config, micro, accumulation, tokens, num_steps)
    return result


def warm_up(config: RunConfig) -> None:
    """A micro-step of a tiny network: the pages of libraries that it touches belong to the base of a process, and how many of
    them are there before depends on what ran in it, and on what the system has taken back."""
    sizes = {"width": 64, "heads": 2, "layers": 1, "task_width": 64, "task_heads": 2, "activation_checkpointing": False}
    tiny = config.model_copy(update={"model": config.model.model_copy(update=sizes)})
    model, batch = build_model(tiny, None), synthetic_batch(2, 8, config.model.encoder_width)
    factor = dict.fromkeys((*TASKS, *GATES), 1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.training.precision == "bf16"):
        outputs = stages.forward(model, batch.to(torch.device("cpu"), torch.float32))
        counts = stages.open_window([batch], False).counts
        stages.compute(outputs, batch, counts, factor, 1, config.loss)[0].backward()
    del model, outputs
    free_memory()


def _compiled(
    engine: Engine, config: RunConfig, micro: int, accumulation: int, tokens: int, num_steps: int
) -> dict[str, Any]:
    training = config.training.model_copy(update={"compile": "regional"})
    check_compilation(config.model_copy(update={"training": training}))
    compile_layers(engine.model)
    steps = run_steps(engine, config, micro, accumulation, tokens, num_steps)
    return {"step_seconds": steps.seconds, "losses": steps.losses, **compiler().report()}


@dataclass(frozen=True)
class Steps:
    """What optimizer steps took: seconds and mean loss of each, and the process's resident memory as they went on."""

    seconds: list[float]
    losses: list[float]
    resident_gib: dict[str, float]


def run_steps(
    engine: Engine,
    config: RunConfig,
    micro: int,
    accumulation: int,
    tokens: int,
    num_steps: int,
    pairs: int | None = None,
) -> Steps:
    """`num_steps` optimizer steps as the trainer takes them, on synthetic batches of `micro` samples."""
    marks = {"engine": resident() / GIB}
    scale = factors(task_weights(config.loss), dict.fromkeys((*TASKS, *GATES), 1.0), config.loss.constant_floor)
    batches = [synthetic_batch(micro, tokens, config.model.encoder_width, i, pairs) for i in range(accumulation)]
    losses, seconds = [], []
    for number in range(num_steps):
        started = time.perf_counter()
        window = stages.open_window(batches, False)
        total = 0.0
        for i, batch in enumerate(window.batches):
            outputs, loss, _ = stages.loss_of(engine, engine, batch, window, scale, config.loss)
            del outputs
            engine.backward(loss, is_last=i == accumulation - 1)
            total += float(loss.detach()) / accumulation
            del loss
            marks[f"backward {number}.{i}"] = resident() / GIB
        stages.update(engine, stages.learning_rate_at(number, NOMINAL_STEPS, config.optimizer))
        if has_gpu():
            torch.cuda.synchronize()
        marks[f"step {number}"] = resident() / GIB
        losses.append(total)
        seconds.append(time.perf_counter() - started)
    return Steps(seconds, losses, marks)


def peaks() -> dict[str, float]:
    """GiB at most so far: of all ranks in the host's memory, and what torch's allocator had on the GPU."""
    found = {"host_peak_gib": sum_over_ranks([float(resident_peak())])[0] / GIB}
    if has_gpu():
        found["gpu_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["gpu_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return found


def show_measured(result: dict[str, Any]) -> None:
    rows = [
        (
            name.removesuffix("_gib").replace("_", " "),
            f"{predicted:.3f}",
            f"{result['observed'][name]:.3f}",
            f"{result['ratio'][name]:.3f}",
        )
        for name, predicted in result["predicted"].items()
    ]
    load = (
        f"micro-batch {result['micro_batch_size']} × {result['gradient_accumulation_steps']}, {result['tokens']} tokens"
    )
    title = f"{result['preset']}, {result['strategy']}, {result['precision']}, {load}"
    console.print(table(title, ("GiB", "predicted", "observed", "ratio"), rows))
    shown = ", ".join(f"{name} {value:.2f}" for name, value in result["resident_gib"].items())
    console.print(f"resident GiB: {result['base_gib']:.2f} before, {shown}")
