"""Does growth pay? A small network is trained, grown and trained on; beside it the large one from scratch and the small one trained on.

redheart bench transfer --data DIR --out DIR --json

Per seed: `source` (small, from scratch), then with one order of samples and one number of steps `grown` (large, from the source's best
checkpoint), `moments` (the same with the optimizer's moments), `scratch` (large) and `control` (small, from that checkpoint). Equal
tuning: with the first seed every arm runs at every learning rate, and goes on with the one that gave it the lowest dev loss. All other
settings are the large preset's. A run that is finished is not repeated, so that an interrupted bench goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from redheart.config import RunConfig, load_config
from redheart.console import console, table
from redheart.evaluation.curves import TOTAL, Line, dev_losses, draw
from redheart.files import read_sealed_json, write_json, write_sealed_json
from redheart.memory.plan import parameters_of
from redheart.options import Data, Set
from redheart.owned import make_directory, own
from redheart.schema import RedHeartError
from redheart.train.checkpoint import committed
from redheart.train.grow import grow
from redheart.train.start import train

ARMS = ("grown", "moments", "scratch", "control")
GROWN_DATA_SEED = 1000  # what follows the source sees the samples in another order than the source did
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
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of every run after the source.")] = 400,
    evaluate_every: Annotated[int, typer.Option("--evaluate-every", min=1)] = 20,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="May be repeated. [default: 0, 1, 2]")] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option("--learning-rate", help="May be repeated. [default: 1e-4, 3e-4, 1e-3]")
    ] = None,
    set_: Set = None,
) -> dict[str, Any]:
    """Does growth pay? Steps to a dev loss: grown, from scratch, and the small network trained on."""
    make_directory(out, "--out")
    bench = _Bench(data, out, small, large, source_steps, steps, evaluate_every, set_ or ())
    seeds, learning_rates = seed or (0, 1, 2), learning_rate or (1e-4, 3e-4, 1e-3)
    rate = {"source": bench.tune("source", seeds[0], learning_rates, None)}
    origin = bench.path("source", seeds[0], rate["source"])
    rate |= {arm: bench.tune(arm, seeds[0], learning_rates, origin) for arm in ARMS}
    lines = []
    for number in seeds:
        curves = {"source": bench.curve("source", number, rate["source"], None)}
        origin = bench.path("source", number, rate["source"])
        curves |= {arm: bench.curve(arm, number, rate[arm], origin) for arm in ARMS}
        lines.append({"seed": number, "curves": curves, **compare(curves, bench.share)})
    result = {
        "small": small, "large": large, "source_steps": source_steps, "steps": steps, "cost_of_a_small_step": bench.share,
        "learning_rates": rate, "tuning": bench.tuning, "seeds": lines,
    }  # fmt: skip
    write_json(out / "transfer.json", result)
    _draw(result, out / "transfer.png")
    return result


def compare(curves: dict[str, Curve], share: float) -> dict[str, Any]:
    """Steps at which each arm first reaches (a) the source's best dev loss and (b) the best of `scratch`; None: never.

    `grown_with_source`: the grown arm's steps and the source's, up to its best, each small step counted as `share` of a large one.
    A ratio is scratch's steps over grown's, above 1 where growth is faster; None where one of them is 0 or was not reached.
    """
    source = min(curves["source"], key=lambda point: point[1])
    targets = {"source_best": source[1], "scratch_best": min(loss for _, loss in curves["scratch"])}
    compared: dict[str, Any] = {}
    for name, target in targets.items():
        reached: dict[str, float | None] = {arm: steps_to(curves[arm], target) for arm in ARMS}
        grown = reached["grown"]
        reached["grown_with_source"] = None if grown is None else grown + share * source[0]
        ratios = {
            f"ratio_{arm}": _ratio(reached["scratch"], reached[arm])
            for arm in ("grown", "moments", "grown_with_source")
        }
        compared[name] = {"dev_loss": target, "steps": reached, **ratios}
    return compared | {"best": {arm: min(loss for _, loss in curve) for arm, curve in curves.items()}}


def _ratio(scratch: float | None, grown: float | None) -> float | None:
    return scratch / grown if scratch and grown else None


def steps_to(curve: Curve, loss: float) -> float | None:
    """The first step with at most this dev loss."""
    return next((step for step, value in curve if value <= loss), None)


def show(result: dict[str, Any]) -> None:
    for name in ("source_best", "scratch_best"):
        seeds = result["seeds"]
        rows: list[tuple[str, ...]] = [("dev loss", *(f"{line[name]['dev_loss']:.4f}" for line in seeds))]
        for arm in ("scratch", "grown", "moments", "grown_with_source", "control"):
            rows.append((f"steps: {arm}", *(_number(line[name]["steps"][arm]) for line in seeds)))
        for arm in ("grown", "moments", "grown_with_source"):
            rows.append((f"scratch / {arm}", *(_number(line[name][f"ratio_{arm}"]) for line in seeds)))
        columns = ("", *(f"seed {line['seed']}" for line in seeds))
        console.print(table(f"steps to the dev loss of {name}", columns, rows))


def _draw(result: dict[str, Any], path: Path) -> None:
    """Every arm in a colour of its own, a line per seed; dotted: what the sources reached."""
    seeds = result["seeds"]
    lines = [
        Line(dict(line["curves"][arm]), f"C{colour}", arm if line is seeds[0] else None)
        for line in seeds
        for colour, arm in enumerate(ARMS)
    ]
    marks = [line["source_best"]["dev_loss"] for line in seeds]
    title = f"{result['small']} grown to {result['large']}"
    draw(lines, path, marks, ylabel="dev loss", yscale="log", title=title)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


class _Bench:
    """The runs of one bench, each in a directory of its own below `out`."""

    def __init__(
        self, data: str, out: Path, small: str, large: str, source_steps: int, steps: int, evaluate_every: int, overrides: Sequence[str]
    ):  # fmt: skip
        settings = [*overrides, f"training.evaluate_every={evaluate_every}", "checkpoint.keep_last=1"]
        self.data, self.out, self.small, self.steps, self.source_steps = data, out, small, steps, source_steps
        self.large = load_config(large, settings)
        self.model_of_small = load_config(small).model
        self.tuning: list[dict[str, Any]] = []
        self.share = parameters_of(self._config("source", 0, 1e-4)).total / parameters_of(self.large).total

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
        run = self.path(arm, seed, learning_rate)
        if not (run / "finished.json").is_file():
            self._run(arm, seed, learning_rate, run, origin)
        return read_sealed_json(run / "finished.json", "delete the run's directory")["dev_loss"]

    def _run(self, arm: str, seed: int, learning_rate: float, run: Path, origin: Path | None) -> None:
        console.print(f"{arm}, seed {seed}, learning rate {learning_rate:g}")
        config = self._config(arm, seed, learning_rate)
        init = origin if arm == "control" else None
        if arm in ("grown", "moments"):
            assert origin is not None
            init = self.out / f"{arm}-seed{seed}"
            if not init.exists():
                grow(origin, self.large, init, seed=seed, moments=arm == "moments")
        resume = "last" if committed(run) else None
        done = train(config, self.data, run, resume, overwrite=resume is None, init=None if resume else init)
        if done.signal:
            raise RedHeartError(f"stopped by a signal in {run}: run the same command again to go on")
        own(run, "run", ["finished.json"])
        write_sealed_json(
            run / "finished.json", {"dev_loss": sorted(dev_losses(run)[TOTAL].items()), "seconds": done.seconds}
        )

    def _config(self, arm: str, seed: int, learning_rate: float) -> RunConfig:
        large = self.large
        steps = self.source_steps if arm == "source" else self.steps
        order = seed if arm == "source" else seed + GROWN_DATA_SEED
        changes: dict[str, Any] = {
            "training": large.training.model_copy(update={"max_steps": steps, "seed": order}),
            "optimizer": large.optimizer.model_copy(update={"learning_rate": learning_rate}),
        }
        if arm in ("source", "control"):
            changes |= {"model": self.model_of_small, "preset": self.small}
        return large.model_copy(update=changes)
