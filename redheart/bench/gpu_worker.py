"""One job of `redheart bench gpu`, in a process of its own, so that nothing of another case lies in its memory.

    python -m redheart.bench.gpu_worker JOB.json RESULT.json

JOB is {"what": "machine"} (compiles the kernels, looks at the device, times a matrix product) or {"what": "case", "config",
"tokens", "steps", "cap_gib", "compiled_too"}: `steps` optimizer steps after WARM_UP others. The engine keeps to the config's
memory.gpu_memory_gib, which `cap_gib` has become (null: no cap). Or a drawn configuration of `redheart bench memory`: {"what":
"memory", "set", "tokens", "contrasts"}.
RESULT is what was measured; where a case fails it holds the error and the peaks until then, and the exit code is not 0.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from redheart.bench.timing import interleaved
from redheart.config import load_config, parse_config
from redheart.device import bf16_is_fast, compute_device, has_gpu
from redheart.files import read_json, write_json
from redheart.memory.activations import measured
from redheart.memory.budget import free_host_gib
from redheart.memory.plan import GIB
from redheart.model.build import build_model
from redheart.ranks import leave
from redheart.schema import RedHeartError
from redheart.tasks import GATES, TASKS
from redheart.train import stages
from redheart.train.engine import compile_kernels
from redheart.train.measure import measure_step, peaks, synthetic_batch
from redheart.version import VERSION

WARM_UP = 2  # steps before the timed ones: the first makes the optimizer's states
EDGE_GPU, EDGE_CPU = 8192, 512  # of the matrix product
FIGURES = (
    "predicted", "observed", "ratio", "base_gib", "start_gib", "resident_gib", "losses", "step_seconds", "compiled",
)  # fmt: skip
LIBRARIES = ("torch", "deepspeed", "accelerate", "transformers")


def main() -> None:
    job, result = read_json(Path(sys.argv[1]), "run `redheart bench gpu`"), Path(sys.argv[2])
    if job["what"] == "machine":
        write_json(result, machine())
        return

    def report(figures: dict[str, Any]) -> None:
        write_json(result, {"ended": True, **figures})

    try:
        if job["what"] == "memory":
            found = measure_step(load_config("local", job["set"]), job["tokens"], contrasts=job["contrasts"])
            report({name: found[name] for name in ("observed", "micro_step")})
        else:
            case(job, report)
        leave()
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if result.is_file():  # steps were measured: what failed are the compiled ones
            write_json(result, {**read_json(result, "run the bench again"), "compiled": {"error": text}})
            return
        write_json(result, {"ended": False, "error": text, "observed": peaks()})
        raise


def machine() -> dict[str, Any]:
    """The device and its host, and what a large matrix product reaches there."""
    compile_kernels()
    on_gpu = has_gpu()
    return {
        "card": torch.cuda.get_device_name() if on_gpu else "cpu",
        "gpu_total_gib": torch.cuda.get_device_properties(0).total_memory / GIB if on_gpu else None,
        "host_free_gib": free_host_gib(),
        "threads": torch.get_num_threads(),
        "matmul": matmul(EDGE_GPU if on_gpu else EDGE_CPU),
        **(prices() if on_gpu else {"launch_s": None, "wait_s": None, "operation_s": None}),
        "versions": {"redheart": VERSION, **{name: importlib.metadata.version(name) for name in LIBRARIES}},
    }


def matmul(edge: int, repeats: int = 20) -> dict[str, Any]:
    """The median speed of a square matrix product: in bf16, or in fp32 where the device has no bf16 arithmetic."""
    device = compute_device()
    dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    precision = str(dtype).removeprefix("torch.")
    return {"edge": edge, "precision": precision, "tflop_per_s": 2 * edge**3 / median(seconds[3:]) / 1e12}


def prices(launches: int = 2000, waits: int = 200) -> dict[str, float]:
    """Seconds of the host to launch a small kernel, and those that reading one number of the device costs beyond the launch of
    what made it (what `plan` assumes as wait_s); and those of one operation of the network (operation_s)."""
    x = torch.zeros(16, device=compute_device())

    def seconds(count: int, wait: bool) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            x.add_(1)
            if wait:
                float(x[0])
        return (time.perf_counter() - started) / count

    seconds(100, True)  # kernels loaded, memory reserved
    launch = median(seconds(launches, False) for _ in range(5))
    wait = median(seconds(waits, True) for _ in range(5)) - launch
    return {"launch_s": launch, "wait_s": wait, "operation_s": operation()}


def operation(repeats: int = 5) -> float:
    """Seconds per operation of a micro-step of preset `local` with two short texts, where arithmetic is next to nothing: what the
    host does for each of them, views, autograd and Python included."""
    config, device, rows, tokens = load_config("local", ["memory.strategy=plain"]), compute_device(), 2, 8
    operations = measured(config, rows, tokens, False, True).kernels
    model = build_model(config, None)
    nn.Module.to(model, device)
    batch = synthetic_batch(rows, tokens, config.model.encoder_width)
    window = stages.open_window([batch], False)
    scale = dict.fromkeys((*TASKS, *GATES), 1.0)

    def micro_step() -> None:
        on_device = batch.to(device, torch.float32)
        loss, _ = stages.compute(stages.forward(model, on_device), on_device, window.counts, scale, 1, config.loss)
        loss.backward()

    micro_step()
    return median(interleaved({"micro-step": micro_step}, repeats)["micro-step"]) / operations


def case(job: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Reports the figures of measure_step and the speed of the steps after the warm-up; once more when compiled steps followed."""
    if job["cap_gib"] is not None and not has_gpu():
        raise RedHeartError("without a GPU no memory can be capped: leave --caps out")
    config = parse_config(job["config"])
    samples = config.training.global_batch_size

    def figures(told: dict[str, Any]) -> dict[str, Any]:
        found = {name: told[name] for name in FIGURES}
        step = median(told["step_seconds"][WARM_UP:])
        found |= {"median_step_s": step, "samples_per_s": samples / step}
        if has_gpu():  # of a card that nobody else uses: the context, and what nccl and cuBLAS take themselves
            free, total = torch.cuda.mem_get_info()
            found["gpu_outside_allocator_gib"] = (total - free - torch.cuda.memory_reserved()) / GIB
        if (compiled := told["compiled"]) is not None:
            speed = samples / median(compiled["step_seconds"][WARM_UP:])
            found["compiled"] = {**compiled, "samples_per_s": speed, "ratio": speed / found["samples_per_s"]}
        return found

    def first(told: dict[str, Any]) -> None:
        report(figures(told))

    report(figures(measure_step(config, job["tokens"], WARM_UP + job["steps"], first if job["compiled_too"] else None)))


if __name__ == "__main__":
    main()
