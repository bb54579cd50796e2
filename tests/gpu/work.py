"""What the tests of this folder run in processes of their own, on the GPU where one is visible, else on the CPU.

    python -m tests.gpu.work JOB '{…}'        prints JSON in its last line that begins with a brace

Neither `datasets` nor pyarrow is needed, but for `predict`.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from redheart.bench.gpu_worker import prices
from redheart.config import RunConfig, load_config
from redheart.device import compute_device, has_gpu
from redheart.memory.budget import CONTEXT, limit_gpu
from redheart.memory.swap import GIB, place
from redheart.model.build import build_model
from redheart.model.select import MODULES, ExecutionMode
from redheart.ranks import is_out_of_memory, leave
from redheart.schema import RedHeartError
from redheart.tasks import task_weights
from redheart.train.engine import Engine, consolidated_weights, make_engine
from redheart.train.measure import measure_step
from redheart.train.stages import compute, forward, open_window, update
from tests.train.tiny import SETTINGS, make_batch

SMOOTH = (
    1e-3  # Adam's eps: beside gradients of that size a step is no longer their sign alone, which rounding could turn
)
DROPOUT = 0.1  # drawn by sample and channel: the same on every device


def config_of(strategy: str, precision: str) -> RunConfig:
    changes = [f"memory.strategy={strategy}", f"training.precision={precision}", f"optimizer.eps={SMOOTH}"]
    return load_config("local", [*SETTINGS, *changes, f"model.dropout={DROPOUT}", "training.micro_batch_size=4"])


def engine_of(config: RunConfig) -> Engine:
    torch.manual_seed(0)
    return make_engine(partial(build_model, config, None), config, 2, 4)


def steps(engine: Engine, config: RunConfig, first: int, stop: int) -> tuple[float, dict[str, float]]:
    """Optimizer steps of two micro-batches each, all with the same 8 rows; the last one's loss and gradient norms."""
    factors, loss_of_step, norms = task_weights(config.loss), 0.0, {}
    for _ in range(first, stop):
        window, loss_of_step = open_window([make_batch(range(4)), make_batch(range(4, 8))], False), 0.0
        for i, rows in enumerate(window.batches):
            batch = rows.to(engine.device, engine.dtype)
            loss, _ = compute(forward(engine, batch), batch, window.counts, factors, 2, config.loss)
            engine.backward(loss, i == 1)
            loss_of_step += loss.item() / 2
        done = update(engine, 1e-2)
        assert done.applied
        assert done.module_norms is not None
        norms = done.module_norms
    return loss_of_step, norms


def saved(engine: Engine, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True)
    engine.save(folder)
    return {n: w for n, w in consolidated_weights(folder).items() if w.is_floating_point()}


def one_step(folder: str, strategies: list[str], precision: str) -> dict[str, Any]:
    """A step under every strategy; FOLDER/STRATEGY.pt holds what it changed in the fp32 weights."""
    told: dict[str, Any] = {"device": str(compute_device())}
    for strategy in strategies:
        config = config_of(strategy, precision)
        engine = engine_of(config)
        before = saved(engine, Path(folder) / strategy / "before")
        loss, norms = steps(engine, config, 0, 1)
        after = saved(engine, Path(folder) / strategy / "after")
        torch.save({n: after[n] - before[n] for n in after}, Path(folder) / f"{strategy}.pt")
        told[strategy] = {"loss": loss, "norms": norms, "device": str(engine.device)}
        engine.close()
        del engine
    told["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return told


def resume(folder: str, strategies: list[str]) -> dict[str, Any]:
    """Four steps in a go, twice, and as two and two with a checkpoint between: how far their weights lie apart."""
    told: dict[str, Any] = {}
    for strategy in strategies:
        config, root = config_of(strategy, "bf16"), Path(folder) / strategy
        ends = []
        for name in ("whole", "again", "resumed"):
            engine = engine_of(config)
            if name == "resumed":
                engine.load(root / "whole-2")
                steps(engine, config, 2, 4)
            else:
                steps(engine, config, 0, 2)
                saved(engine, root / f"{name}-2")
                steps(engine, config, 2, 4)
            ends.append(saved(engine, root / f"{name}-4"))
            engine.close()
            del engine
        whole, again, resumed = ends
        told[strategy] = {"again": apart(whole, again), "resumed": apart(whole, resumed)}
    return told


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[n] - b[n]).abs().max().item() for n in a)


def peak(preset: str, settings: list[str], tokens: int) -> dict[str, Any]:
    return measure_step(load_config(preset, settings), tokens)


def promise(gpu_memory_gib: float) -> dict[str, Any]:
    """What happens beyond a promise of so much GPU memory, and beyond all page-locked memory there can be."""
    limit_gpu(load_config("local", [f"memory.gpu_memory_gib={gpu_memory_gib}"]))
    device = compute_device()
    if device.type == "cpu":  # nothing is capped there
        return {"fits": True, "beyond": _failure(lambda: torch.empty(2**60, dtype=torch.uint8)), "pinned": True}
    room = int(gpu_memory_gib * GIB) - CONTEXT
    fits = torch.empty(int(0.9 * room), dtype=torch.uint8, device=device)
    beyond = _failure(lambda: torch.empty(int(0.2 * room), dtype=torch.uint8, device=device))
    pinned = _failure(lambda: torch.empty(2**46, dtype=torch.uint8, pin_memory=True))
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    free, total = torch.cuda.mem_get_info(device)
    return {
        "fits": fits.numel() > 0,
        "beyond": beyond,
        "pinned": pinned,
        "expandable": settings["expandable_segments"],
        "context_gib": (total - free - torch.cuda.memory_reserved(device)) / GIB,
    }


def _failure(allocate: Callable[[], Any]) -> bool | str:
    """True where it runs out of memory and that is understood, else what it said or did."""
    try:
        allocate()
    except RuntimeError as error:
        return True if is_out_of_memory(error) else str(error)
    return "it was allocated"


def swap(width: int, heads: int) -> dict[str, Any]:
    """Answers of a network whose modules visit the device, beside one that lives there."""
    from tests.memory.test_swap import SWAPPED, ask, bytes_of, tensors, twins

    device = compute_device()
    plain, swapped = twins(ExecutionMode.EVALUATION, f"model.width={width}", f"model.heads={heads}", "model.layers=2")
    resident = place(plain, device)
    sizes, rows = bytes_of(plain), (6, 3, 6)
    with torch.inference_mode():
        answers = [tensors(ask(plain, n)) for n in rows]
        base = _allocated()
        ask(plain)
        activations = _most() - base
        before = _allocated()
        moved = place(swapped, device, SWAPPED)
        differing = []
        for n, expected in zip(rows, answers, strict=True):
            found = tensors(ask(swapped, n))
            differing += [name for name in expected if not torch.equal(expected[name], found[name])]
        report = moved.report()
    largest, second = sorted((sizes[m] for m in SWAPPED), reverse=True)[:2]
    return {
        "modules": len(MODULES),
        "fetches": report.fetches,
        "fetches_resident": resident.report().fetches,
        "differing": differing,
        "copy_s": report.copy_s,
        "wait_s": report.wait_s,
        "peak_bytes": _most() - before,
        "allowed_bytes": sizes["backbone"] + largest + second + activations,
        "weights_bytes": [report.peak_gib * GIB, sizes["backbone"] + largest + second],
    }


def _allocated() -> int:
    if not has_gpu():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _most() -> int:
    return torch.cuda.max_memory_allocated() if has_gpu() else 0


def predict(encoder: str, texts: list[str]) -> dict[str, Any]:
    """What a pipeline answers whose encoder and network compute on this device."""
    from redheart.config import EncoderConfig
    from redheart.data.encode import TextEncoder
    from redheart.infer import RedHeartPipeline

    device = compute_device()
    reader = TextEncoder(EncoderConfig(name=encoder, layers=(1, 2), max_tokens=16, device="auto"))
    torch.manual_seed(0)
    config = load_config("local", [*SETTINGS, f"model.encoder_width={reader.width}"])
    pipeline = RedHeartPipeline(build_model(config, reader.fingerprint), reader, device=device)
    return {"device": str(device), "encoder_device": str(reader.device), "answers": pipeline(texts)}


def refuses(strategy: str) -> dict[str, Any]:
    try:
        engine_of(config_of(strategy, "bf16"))
    except RedHeartError as error:
        return {"error": str(error)}
    return {"error": None}


JOBS = {f.__name__: f for f in (one_step, resume, peak, promise, swap, predict, refuses, prices)}

if __name__ == "__main__":
    print("\n" + json.dumps(JOBS[sys.argv[1]](**json.loads(sys.argv[2]))))
    leave()
