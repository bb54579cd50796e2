"""Does the memory plan hold? Configurations drawn by a seed, each planned and then run for two steps on this machine.

redheart bench memory --configurations 112 --out FILE.json --json

Width, depth, tokens, contrasts, micro-batch, accumulation, precision, recomputation, strategy and the number of ranks are drawn. Each
configuration runs in processes of its own, so that a peak is its own.

On the CPU they are forked from one that has imported all there is. Compared is the peak of resident memory, all ranks together, with
what `redheart plan --measure` predicts; `beyond` leaves out of both what the processes held before a network. On a GPU configurations
are larger, of one rank, and compared is what torch's allocator had reserved at most; what it had allocated, and the host's peak, stand
beside it.

`--again` predicts the cases of an earlier file anew, and runs nothing; so are those that are in `--out` already.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from redheart.bench.processes import alone, on_ranks
from redheart.config import load_config
from redheart.console import console
from redheart.device import has_gpu
from redheart.evaluation.page import figure
from redheart.files import read_json, write_json
from redheart.memory.activations import MicroStep, measured
from redheart.memory.plan import GIB, Request, parameters_of, predict

STRATEGIES = ("plain", "zero1", "zero2", "zero2_offload", "zero2_offload_8bit", "zero3", "zero3_offload_8bit")
# width and task width of networks from 25M parameters on, where freed memory goes back at once (memory/malloc.py)
SIZES = ((128, 256), (192, 192), (192, 256), (256, 128), (256, 192), (256, 256), (320, 128), (320, 192), (384, 128))
SIZES_GPU = ((384, 256), (512, 256), (512, 384), (768, 256), (768, 512))  # up to 330m's
TIMEOUT_S = 900
JUDGED = "gpu_reserved_gib"  # on a GPU


def draw(count: int, seed: int, on_gpu: bool = False) -> list[dict[str, Any]]:
    """`count` jobs: {set, tokens, contrasts (share of the samples that have one), ranks}. The same for the same seed."""
    rng = random.Random(seed)
    jobs = []
    for _ in range(count):
        strategy = rng.choice((*STRATEGIES, "gpu_8bit") if on_gpu else STRATEGIES)
        ranks = 1 if on_gpu or strategy == "plain" else rng.choice((1, 1, 2))
        width, task = rng.choice(SIZES_GPU if on_gpu else SIZES)
        micro = rng.choice((4, 8, 16, 24, 32, 64) if on_gpu else (1, 2, 3, 4, 6, 8))
        accumulation = rng.choice((1, 1, 2))
        settings = {
            "model.width": width, "model.heads": width // 64, "model.layers": rng.randint(1, 8), "model.task_width": task,
            "model.task_heads": task // 32, "model.num_experts": rng.choice((1, 4, 8)), "model.dropout": rng.choice((0.0, 0.1)),
            "model.activation_checkpointing": rng.random() < 0.4, "memory.strategy": strategy,
            "training.precision": rng.choice(("bf16",) if strategy == "gpu_8bit" else ("fp32", "bf16")),
            "training.micro_batch_size": micro,
            "training.global_batch_size": micro * accumulation * ranks,
            "optimizer.name": rng.choice(("adamw", "adamw_8bit")) if strategy == "plain" else None,
        }  # fmt: skip
        listed = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        tokens = rng.choice((16, 32, 64, 96, 128) if on_gpu else (8, 16, 24, 32, 48, 64))
        contrasts = rng.choice((0.0, 0.5, 1.0))
        jobs.append({"set": listed, "tokens": tokens, "contrasts": contrasts, "ranks": ranks})
    return jobs


def bench_memory(
    configurations: Annotated[int, typer.Option("--configurations", min=1, help="How many are drawn.")] = 112,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Write every case here, and a picture beside it. Cases that it has are not run again, only predicted.",
        ),
    ] = None,
    again: Annotated[Path | None, typer.Option("--again", help="Predict the cases of this file, and run none.")] = None,
    at_once: Annotated[
        int, typer.Option("--at-once", min=1, help="Configurations that run side by side, where the machine has room.")
    ] = 1,
    seconds: Annotated[
        int | None,
        typer.Option("--seconds", min=1, help="For all of it: none starts after that; the rest is left out."),
    ] = None,
) -> dict[str, Any]:
    """Predicted beside observed peaks of drawn configurations: resident memory on the CPU; on a GPU what its allocator reserved."""
    known = again or (out if out and out.is_file() else None)
    seen = read_json(known, "name a file of --out, or delete it")["cases"] if known else []
    jobs = seen if again else draw(configurations, seed, has_gpu())
    end = math.inf if seconds is None else time.monotonic() + seconds

    def found(job: dict[str, Any]) -> tuple[dict[str, Any], MicroStep | None] | None:
        """A case without its prediction, and what a micro-step takes where that was measured along with it; or why it failed. None:
        no time was left for it."""
        given = {name: job[name] for name in ("set", "tokens", "contrasts", "ranks")}
        before = job if again else next((c for c in seen if {name: c[name] for name in given} == given), None)
        if before is None and time.monotonic() > end:
            return None
        told = before or (_on_gpu(job) if has_gpu() else on_ranks(_observed, job, job["ranks"], TIMEOUT_S))
        if "failed" in told:
            return {**given, **told}, None
        case = given | {name: told[name] for name in ("observed_gib", "base_gib", "others") if name in told}
        return case, None if before else MicroStep(**told["micro_step"])

    cases: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    left_out = 0

    def result() -> dict[str, Any]:
        told = {"seed": seed, "configurations": len(cases), "left_out": left_out, "ok": not failed, "failed": failed}
        return {**told, **(summary(cases) if cases else {}), "cases": cases}

    with ThreadPoolExecutor(at_once) as pool:
        for one in map(found, jobs) if at_once == 1 else pool.map(found, jobs):
            if one is None:
                left_out += 1
                continue
            case, step = one
            if "failed" in case:
                failed.append(case)
                console.print(f"failed: {case['failed']}", highlight=False)
                continue
            case = compared(case, planned(case, case["base_gib"], step))
            cases.append(case)
            told = f"{case['predicted_gib']:.3f} GiB of {case['observed_gib']:.3f} ({case['error']:+.1%})"
            console.print(f"{len(cases) + len(failed)} of {len(jobs)}: {told}", highlight=False)
            if out:
                write_json(out, result())
    if left_out:
        console.print(f"{left_out} of {len(jobs)} configurations were left out: {seconds} s were over (--seconds)")
    if out:
        write_json(out, result())
    if out and cases:
        picture(cases, out.with_suffix(".png"))
    return result()


def compared(case: dict[str, Any], predicted: dict[str, float]) -> dict[str, Any]:
    """The case with its predictions and their relative errors: of what it is judged by, of that beyond the base, of `others`."""
    observed, base = case["observed_gib"], case["base_gib"]
    main = predicted[JUDGED if "others" in case else "host_peak_gib"]
    of_others = {
        name: {
            "observed": one["observed"],
            "predicted": predicted[name],
            "error": predicted[name] / one["observed"] - 1,
        }
        for name, one in case.get("others", {}).items()
    }
    return {
        **case,
        "predicted_gib": main,
        "error": main / observed - 1,
        "error_beyond": (main - base) / (observed - base) - 1,
        **({"others": of_others} if of_others else {}),
    }


def summary(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the relative errors: the median of their sizes, the largest size, the deepest under-prediction; the same beyond the base,
    and of what else was compared."""
    found = {name: [case[name] for case in cases] for name in ("error", "error_beyond")}
    for name in cases[0].get("others", {}):
        found[f"error_of_{name}"] = [case["others"][name]["error"] for case in cases]
    told: dict[str, Any] = {}
    for name, errors in found.items():
        sizes = [abs(e) for e in errors]
        told[name] = {"median": statistics.median(sizes), "worst": max(sizes), "lowest": min(errors)}
    return told


def picture(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Observed peaks and the relative error of what was predicted, by strategy."""
    drawn = figure(7, 4.5)
    axes = drawn.subplots()
    for i, strategy in enumerate((*STRATEGIES, "gpu_8bit")):
        of_it = [c for c in cases if f'memory.strategy="{strategy}"' in c["set"]]
        if of_it:
            axes.scatter(
                [c["observed_gib"] for c in of_it], [100 * c["error"] for c in of_it], s=14, c=f"C{i}", label=strategy
            )
    axes.axhline(0, color="grey", lw=0.8)
    axes.set(xlabel="peak observed, GiB", ylabel="predicted beyond it, %")
    axes.legend(fontsize=7)
    drawn.savefig(path, dpi=120)


def planned(job: dict[str, Any], base_gib: float, step: MicroStep | None = None) -> dict[str, float]:
    """GiB at most, predicted, by name; on the host of all ranks, which held `base_gib` together before a network. `step`: where it is
    known. Of a case that has `others` on a GPU."""
    config, ranks, on_cpu = load_config("local", job["set"]), job["ranks"], "others" not in job
    strategy, micro = config.memory.strategy, config.training.micro_batch_size
    checkpointing, pairs = config.model.activation_checkpointing, round(job["contrasts"] * micro)
    step = step or measured(config, micro, job["tokens"], checkpointing, strategy == "plain", pairs)
    accumulation = config.training.global_batch_size // (micro * ranks)
    request = Request(
        config, strategy, micro, accumulation, checkpointing, step, parameters_of(config), on_cpu=on_cpu, gpus_per_node=ranks,
        base=int(base_gib / ranks * GIB),
    )  # fmt: skip
    return predict(request).peaks_gib()


def _observed(job: dict[str, Any]) -> dict[str, Any]:
    """{observed_gib, base_gib, micro_step} of two steps."""
    from redheart.train.measure import measure_step

    found = measure_step(load_config("local", job["set"]), job["tokens"], contrasts=job["contrasts"])
    return {
        "observed_gib": found["observed"]["host_peak_gib"],
        "base_gib": found["base_gib"],
        "micro_step": found["micro_step"],
    }


def _on_gpu(job: dict[str, Any]) -> dict[str, Any]:
    """{observed_gib, base_gib, others, micro_step} of two steps in a process that has imported everything itself: a forked one could
    not use the GPU. Where it failed: {failed, output}."""
    found = alone({"what": "memory", **job}, TIMEOUT_S)
    if not found["ended"]:
        return {"failed": found["error"], "output": found.get("output", "")}
    observed = dict(found["observed"])
    main = observed.pop(JUDGED)
    others = {name: {"observed": value} for name, value in observed.items()}
    return {"observed_gib": main, "base_gib": 0.0, "others": others, "micro_step": found["micro_step"]}
