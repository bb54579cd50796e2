"""Do 8-bit states train as well as fp32 ones? The same runs with both optimizers, several seeds, curves kept.

    redheart bench parity --data DIR --steps 2000 --seeds 3 --out tests/benchmarks/results/parity.json

Every run is a `redheart train` in a process of its own (memory.strategy zero2_offload against zero2_offload_8bit, or with
`--plain` torch alone with both optimizers, which is faster for small networks on the CPU); the curve is the dev loss that
TensorBoard holds. Seeds draw initial weights, order, dropout and rounding, the same ones for both.

Training multiplies small differences, so that two runs of one optimizer part too. A control says how far: fp32 states once more with
an eps that differs in its fifth digit. The final loss of every module's every answer tells where runs part.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from redheart.bench.made import keep_made, made_with
from redheart.config import load_config
from redheart.console import progress
from redheart.data.store import Store
from redheart.evaluation.curves import TOTAL, Line, dev_losses, draw
from redheart.files import write_json
from redheart.options import Preset, Set
from redheart.owned import check_can_make_file, make_directory
from redheart.schema import RedHeartError

STRATEGIES = {"adamw": "zero2_offload", "adamw_8bit": "zero2_offload_8bit"}
CONTROL = "adamw_again"
CONTROL_EPS = 1 + 1e-4  # of optimizer.eps
PLAIN = dict.fromkeys(STRATEGIES, "plain")
STYLES = {"adamw": "C0-", "adamw_8bit": "C1--", CONTROL: "C2:"}


def bench_parity(
    data: Annotated[Path, typer.Option("--data", help="A prepared directory.")],
    work: Annotated[Path, typer.Option("--work", help="Where the runs are kept; finished ones are not repeated.")],
    preset: Preset = "local",
    set_: Set = None,
    steps: Annotated[int, typer.Option("--steps", min=10)] = 2000,
    seeds: Annotated[int, typer.Option("--seeds", min=1)] = 3,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at once.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", help="A .json file for the curves, with a .png beside it.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Both optimizers without DeepSpeed, on the CPU.")] = False,
    control: Annotated[
        list[int] | None,
        typer.Option(
            "--control", min=0, help="A seed that fp32 states run with once more, with another eps in the fifth digit."
        ),
    ] = None,
) -> dict[str, Any]:
    """Dev loss after the same steps with fp32 and with 8-bit optimizer states on the host, over several seeds."""
    make_directory(work, "--work")
    if out:
        check_can_make_file(out, "--out", "parity.json")
    overrides, controls = set_ or [], list(dict.fromkeys(control or []))
    if strange := [seed for seed in controls if seed >= seeds]:
        raise RedHeartError(
            f"--control {strange[0]} has no run to be compared with, seeds are 0 to {seeds - 1}: name one of these, or "
            f"--seeds {max(strange) + 1}"
        )
    every, strategies = max(1, steps // 10), PLAIN if plain else STRATEGIES
    keys = [(name, seed) for seed in range(seeds) for name in STRATEGIES] + [(CONTROL, seed) for seed in controls]
    eps = load_config(preset, overrides).optimizer.eps * CONTROL_EPS
    index = Store(data).index

    def settings_of(name: str, seed: int) -> list[str]:
        base = "adamw" if name == CONTROL else name
        settings = f"""memory.strategy={strategies[base]} optimizer.name={base} training.seed={seed}
            training.max_steps={steps} training.evaluate_every={every} training.checkpoint_every={steps}
            training.evaluate_rows=1000000 training.synergy_every={10 * steps} training.log_every=50""".split()
        return settings + [f"optimizer.eps={eps!r}"] * (name == CONTROL) + [*overrides]

    def run(name: str, seed: int) -> dict[str, dict[int, float]]:
        directory = work / f"{name}-seed{seed}"
        if max(dev_losses(directory).get(TOTAL, {}), default=0) != steps:
            command = [sys.executable, "-m", "redheart", "train", "--preset", preset, "--data", str(data)]
            command += [
                "--out",
                str(directory),
                "--overwrite",
                *(x for s in settings_of(name, seed) for x in ("--set", s)),
            ]
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
            done = subprocess.run(command, env={**os.environ, **threads}, text=True, capture_output=True)
            if done.returncode:
                raise RedHeartError(f"{directory} failed: {done.stderr.strip().splitlines()[-1:]}")
        losses = dev_losses(directory)
        if (last := max(losses.get(TOTAL, {}), default=0)) != steps:
            raise RedHeartError(
                f"{directory} ended at step {last}, not {steps}: say its length with --steps, and no training.patience"
            )
        return losses

    for name, seed in keys:
        made = made_with(load_config(preset, settings_of(name, seed)), index)
        keep_made(work / f"{name}-seed{seed}", made, "another --work")
    curves: dict[tuple[str, int], dict[int, float]] = {}
    answers: dict[str, dict[str, list[float]]] = {}
    with progress("parity", len(keys), 0) as (bar, task), ThreadPoolExecutor(jobs) as pool:
        for key, losses in zip(keys, pool.map(lambda k: run(*k), keys), strict=True):
            curves[key] = curve = losses.pop(TOTAL)
            for answer, of_answer in losses.items():
                answers.setdefault(answer, {}).setdefault(key[0], []).append(of_answer[max(of_answer)])
            bar.update(task, advance=1, note=f"{key[0]} seed {key[1]}: {curve[max(curve)]:.5f}")
    final = {name: [curves[name, s][steps] for s in range(seeds)] for name in STRATEGIES}
    by_seed = [b / a - 1 for a, b in zip(final["adamw"], final["adamw_8bit"], strict=True)]
    result = {
        "preset": preset,
        "strategies": strategies,
        "data": data.name,
        "settings": list(overrides),
        "steps": steps,
        "final_dev_loss": final,
        "relative_difference": statistics.mean(final["adamw_8bit"]) / statistics.mean(final["adamw"]) - 1,
        "relative_difference_by_seed": by_seed,
        "relative_difference_of_controls": {
            s: curves[CONTROL, s][steps] / curves["adamw", s][steps] - 1 for s in controls
        },
        "final_dev_loss_by_answer": answers,
        "curves": {f"{name} seed {seed}": curve for (name, seed), curve in curves.items()},
    }
    if out:
        write_json(out, result)
        lines = [Line(curve, STYLES[name], f"{name}, seed {seed}") for (name, seed), curve in curves.items()]
        title = "fp32 against 8-bit optimizer states"
        draw(lines, out.with_suffix(".png"), ylabel="dev loss", yscale="log", title=title)
    return result
