"""Does growth pay? A small network is trained, grown and trained on; beside it the large one from scratch, for as many FLOPs.

redheart bench transfer --data DIR --out DIR --json

Per seed: `source` (small, from scratch), then with one order of samples, from the source's best checkpoint:
    grown       the same function, symmetric noise, the optimizer starts anew
    moments     the same with the optimizer's moments
    asymmetric  copies with unequal shares; moments for the old channels alone
    padded      shrink and pad, which changes the function (bench/padding.py)
    control     the small network trained on, for as many FLOPs as the grown ones
and `scratch`, the large one, for as many steps more as the source cost. All steps are told in steps of the large network: a small one
counts as its share of the FLOPs. Every run warms its learning rate up and lets it fall along a cosine to its end; the source's stays up
with --source-keeps-rate, so that what is grown had not come to the end of its schedule.

Equal tuning: with the first seed every arm runs at every learning rate, and goes on with the one that gave it the lowest dev loss. All
other settings are the large preset's. A run that is finished is not repeated: an interrupted bench goes on where it was. What was made
with other data or settings, or of another source, is neither used again nor gone on with (bench/made.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from redheart.bench.made import keep_made, made_with
from redheart.bench.padding import shrink_and_pad
from redheart.config import RunConfig, load_config
from redheart.console import console, table
from redheart.data.fingerprint import with_encoder
from redheart.data.stream import SampleStream
from redheart.evaluation.calibration import CALIBRATION
from redheart.evaluation.curves import TOTAL, Line, dev_losses, draw
from redheart.files import MANIFEST, read_sealed_json, write_json, write_sealed_json
from redheart.memory.activations import measure
from redheart.model.growth import Split
from redheart.options import Data, Set
from redheart.owned import make_directory, own
from redheart.schema import RedHeartError
from redheart.train import checkpoint
from redheart.train.grow import grow
from redheart.train.start import train

AFTER_SOURCE = ("grown", "moments", "asymmetric", "padded")  # what the source's cost is counted for
ARMS = (*AFTER_SOURCE, "scratch", "control")
GROWN_DATA_SEED = 1000  # what follows the source sees the samples in another order than the source did
FLOPS_ROWS = 8  # texts of the micro-step in which FLOPs are counted
Curve = list[list[float]]  # [[step, dev loss], …] in order


def bench_transfer(
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", help="Directory of the runs and of transfer.json; a finished run is kept.")
    ],
    small: Annotated[str, typer.Option("--small", help="Preset that is trained first.")] = "local",
    large: Annotated[
        str, typer.Option("--large", help="Preset it grows to; its settings are those of all runs.")
    ] = "base",
    source_steps: Annotated[int, typer.Option("--source-steps", min=1)] = 400,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of every grown run.")] = 400,
    evaluate_every: Annotated[int, typer.Option("--evaluate-every", min=1)] = 20,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="May be repeated. [default: 0, 1, 2]")] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option("--learning-rate", help="May be repeated. [default: 1e-4, 3e-4, 1e-3]")
    ] = None,
    source_keeps_rate: Annotated[
        bool, typer.Option("--source-keeps-rate", help="After its warm-up the source's learning rate does not fall.")
    ] = False,
    set_: Set = None,
) -> dict[str, Any]:
    """Does growth pay? Dev loss over FLOPs: grown in several ways, from scratch, and the small network trained on."""
    make_directory(out, "--out")
    bench = _Bench(data, out, small, large, source_steps, steps, evaluate_every, source_keeps_rate, set_ or ())
    seeds, learning_rates = seed or (0, 1, 2), learning_rate or (1e-4, 3e-4, 1e-3)
    rate = {"source": bench.tune("source", seeds[0], learning_rates, None)}
    origin = bench.path("source", seeds[0], rate["source"])
    rate |= {arm: bench.tune(arm, seeds[0], learning_rates, origin) for arm in ARMS}
    lines = []
    for number in seeds:
        curves = {"source": bench.curve("source", number, rate["source"], None)}
        origin = bench.path("source", number, rate["source"])
        curves |= {arm: bench.curve(arm, number, rate[arm], origin) for arm in ARMS}
        lines.append({"seed": number, "curves": curves, **compare(curves, bench.share, source_steps)})
    result = {
        "small": small, "large": large, "source_steps": source_steps, "source_keeps_rate": source_keeps_rate,
        "steps": steps, "scratch_steps": bench.scratch_steps, "control_steps": bench.control_steps,
        "flops_per_sample": bench.flops, "cost_of_a_small_step": bench.share,
        "learning_rates": rate, "tuning": bench.tuning, "seeds": lines,
    }  # fmt: skip
    write_json(out / "transfer.json", result)
    _draw(result, out / "transfer.png")
    return result


def compare(curves: dict[str, Curve], share: float, source_steps: int) -> dict[str, Any]:
    """Of one seed, in steps of the large network, a small one counted as `share` of one and the source with all its steps.

    best: lowest dev loss of every arm. compute: when each arm first has the best of `scratch`, None: never. saved: the part of
    scratch's compute to its best that an arm did without; negative where it took more, None where it never got there.
    """
    cost = share * source_steps
    best = {arm: min(loss for _, loss in curve) for arm, curve in curves.items()}
    target, compute = best["scratch"], {}
    for arm in ARMS:
        reached = steps_to(curves[arm], target)
        if reached is not None and arm != "scratch":
            reached = cost + reached * (share if arm == "control" else 1.0)
        compute[arm] = reached
    whole = compute["scratch"]
    saved = {
        arm: 1 - at / whole if whole and at is not None else None for arm, at in compute.items() if arm != "scratch"
    }
    return {"best": best, "scratch_best": target, "compute": compute, "saved": saved}


def steps_to(curve: Curve, loss: float) -> float | None:
    """The first step with at most this dev loss."""
    return next((step for step, value in curve if value <= loss), None)


def show(result: dict[str, Any]) -> None:
    seeds = result["seeds"]
    columns = ("", *(f"seed {line['seed']}" for line in seeds))
    for title, key in (
        ("lowest dev loss", "best"),
        (f"compute to the best of scratch, in steps of {result['large']}", "compute"),
        ("of scratch's compute saved", "saved"),
    ):
        rows = [(arm, *(_number(line[key][arm]) for line in seeds)) for arm in seeds[0][key]]
        console.print(table(title, columns, rows))


def _draw(result: dict[str, Any], path: Path) -> None:
    """Every arm in a colour of its own, a line per seed, the source before what came of it."""
    seeds, share = result["seeds"], result["cost_of_a_small_step"]
    cost = share * result["source_steps"]
    lines = []
    for line in seeds:
        for colour, arm in enumerate(("source", *ARMS)):
            begins = cost if arm in (*AFTER_SOURCE, "control") else 0.0
            scale = share if arm in ("source", "control") else 1.0
            points = {begins + scale * step: loss for step, loss in line["curves"][arm]}
            lines.append(Line(points, f"C{colour}", arm if line is seeds[0] else None))
    draw(
        lines,
        path,
        xlabel=f"compute, in steps of {result['large']}",
        ylabel="dev loss",
        yscale="log",
        title=f"{result['small']} grown to {result['large']}",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _weights(source: Path) -> dict[str, str]:
    """The sha256 of the files of the checkpoint that others start from, without those that tell of times, or may change."""
    found = checkpoint.best(source) or checkpoint.last(source)
    if found is None:
        raise RedHeartError(f"{source} has no checkpoint to start from: delete it, and it is trained again")
    files = read_sealed_json(found / MANIFEST, f"delete {source}, and it is trained again")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name not in (CALIBRATION, checkpoint.TRAINER)}


class _Bench:
    """The runs of one bench, each in a directory of its own below `out`."""

    def __init__(
        self, data: str, out: Path, small: str, large: str, source_steps: int, steps: int, evaluate_every: int,
        source_keeps_rate: bool, overrides: Sequence[str],
    ):  # fmt: skip
        settings = [*overrides, f"training.evaluate_every={evaluate_every}", "checkpoint.keep_last=1"]
        self.data, self.out, self.small, self.steps, self.source_steps = data, out, small, steps, source_steps
        self.source_keeps_rate = source_keeps_rate
        stream = SampleStream(data, "train")
        self.index = stream.index
        self.large = with_encoder(load_config(large, settings), stream.encoder)
        self.model_of_small = with_encoder(load_config(small), stream.encoder).model
        self.tuning: list[dict[str, Any]] = []
        self.scratch_steps = self.control_steps = steps
        self.flops = {small: self._flops("source"), large: self._flops("scratch")}
        self.share = self.flops[small] / self.flops[large]
        self.scratch_steps = steps + round(self.share * source_steps)
        self.control_steps = max(1, round(steps / self.share))

    def _flops(self, arm: str) -> int:
        """Forward and backward of a text of mean length, counted."""
        split = self.index["splits"]["train"]
        tokens = max(1, round(split["tokens"] / split["rows"]))
        step = measure(self._config(arm, 0, 1e-4), FLOPS_ROWS, tokens, False, torch.float32, contrasts=0)
        return step.flops // FLOPS_ROWS

    def path(self, arm: str, seed: int, learning_rate: float) -> Path:
        return self.out / f"{arm}-seed{seed}-lr{learning_rate:g}"

    def tune(self, arm: str, seed: int, learning_rates: Sequence[float], origin: Path | None) -> float:
        """The learning rate that gives the arm its lowest dev loss."""
        best = {}
        for learning_rate in learning_rates:
            best[learning_rate] = min(loss for _, loss in self.curve(arm, seed, learning_rate, origin))
            self.tuning.append({"arm": arm, "learning_rate": learning_rate, "best_dev_loss": best[learning_rate]})
        return min(best, key=lambda learning_rate: best[learning_rate])

    def curve(self, arm: str, seed: int, learning_rate: float, origin: Path | None) -> Curve:
        """Dev losses of one run, from before the first step on; runs it unless it is finished."""
        run, config = self.path(arm, seed, learning_rate), self._config(arm, seed, learning_rate)
        source = None if arm in ("source", "scratch") or origin is None else _weights(origin)
        keep_made(run, made_with(config, self.index, source=source), "another --out")
        if not (run / "finished.json").is_file():
            self._run(arm, seed, config, run, origin)
        return read_sealed_json(run / "finished.json", "delete the run's directory")["dev_loss"]

    def _run(self, arm: str, seed: int, config: RunConfig, run: Path, origin: Path | None) -> None:
        console.print(f"{arm}, seed {seed}, learning rate {config.optimizer.learning_rate:g}")
        init = origin if arm == "control" else None
        if arm in AFTER_SOURCE:
            assert origin is not None
            init = self.out / f"{arm}-seed{seed}"
            keep_made(init, made_with(self.large, self.index, source=_weights(origin)), "another --out")
            if not init.exists() and arm == "padded":
                shrink_and_pad(origin, self.large, init, seed)
            elif not init.exists():
                split: Split = "asymmetric" if arm == "asymmetric" else "symmetric"
                grow(origin, self.large, init, seed=seed, moments=arm != "grown", split=split)
        resume = "last" if checkpoint.committed(run) else None
        done = train(config, self.data, run, resume, overwrite=resume is None, init=None if resume else init)
        if done.signal:
            raise RedHeartError(f"stopped by a signal in {run}: run the same command again to go on")
        own(run, "run", ["finished.json"])
        write_sealed_json(
            run / "finished.json", {"dev_loss": sorted(dev_losses(run)[TOTAL].items()), "seconds": done.seconds}
        )

    def _config(self, arm: str, seed: int, learning_rate: float) -> RunConfig:
        large = self.large
        lengths = {"source": self.source_steps, "scratch": self.scratch_steps, "control": self.control_steps}
        steps = lengths.get(arm, self.steps)
        order = seed if arm == "source" else seed + GROWN_DATA_SEED
        rates = {"learning_rate": learning_rate}
        if arm == "source" and self.source_keeps_rate:
            rates["final_learning_rate"] = learning_rate
        changes: dict[str, Any] = {
            "training": large.training.model_copy(update={"max_steps": steps, "seed": order}),
            "optimizer": large.optimizer.model_copy(update=rates),
        }
        if arm in ("source", "control"):
            changes |= {"model": self.model_of_small, "preset": self.small}
        return large.model_copy(update=changes)
