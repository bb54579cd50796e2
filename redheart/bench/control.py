"""What is the network worth beside a plain one? The same shards, order, batches, losses and steps through both, over several seeds.

redheart bench control --data DIR --out DIR --json

Legs: the preset, through `redheart.train`; plain transformers (bench/plain.py) of the asked widths, and one of the preset's size, with
AdamW at a one-cycle rate. A control answers what people labelled in training and dev split; it learns from these labels as the network
does, those that an LLM added to them included. Each leg keeps its checkpoint of the lowest dev loss. Seconds are those of training, looks
at the dev loss included. What people labelled in the judged split too is judged by their labels (evaluation/measures.py), with thresholds
from dev; `test` only where it is asked for.
A leg that is finished with a seed is not trained again, and where it was judged not judged again; one that is not goes on with the same
data, settings and code alone (bench/made.py).
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import nn

from redheart.bench.made import check_made, keep_made, training_code
from redheart.bench.plain import PlainTransformer, num_parameters, train_control, width_of_size
from redheart.config import RunConfig, load_config
from redheart.console import console, table
from redheart.data.fingerprint import with_encoder
from redheart.data.shards import content_digest
from redheart.data.stream import SampleStream
from redheart.device import compute_device, has_gpu
from redheart.evaluation.answers import answers
from redheart.evaluation.curves import dev_losses
from redheart.evaluation.evaluate import Evaluation, evaluate
from redheart.evaluation.measures import Measured, measure, over_seeds, paired
from redheart.evaluation.page import figure
from redheart.files import read_sealed_json, sha256_of, write_json, write_sealed_json
from redheart.losses.combine import factors
from redheart.memory.plan import parameters_of
from redheart.options import Data, Preset, Set
from redheart.owned import make_directory
from redheart.schema import JUDGED_ORIGINS, LABEL_COLUMNS, RedHeartError
from redheart.tasks import constant_losses, task_weights
from redheart.train.checkpoint import committed
from redheart.train.export import load_model, resolve
from redheart.train.length import steps_of
from redheart.train.start import train, with_edges
from redheart.version import VERSION

JUDGING_BATCH = 128
AGAIN = "delete it, and this leg is trained or judged again"
ANOTHER = "another --out, or --name of the leg"
LIBRARIES = ("torch", "transformers", "deepspeed", "scikit-learn")

Load = Callable[[], nn.Module]  # a trained network, on the CPU


def bench_control(
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", help="Directory of the runs and results; what is finished there is kept.")
    ],
    preset: Preset = "local",
    set_: Set = None,
    widths: Annotated[
        list[int] | None, typer.Option("--widths", min=8, help="Of the controls; may be repeated. [default: 96]")
    ] = None,
    equal_size: Annotated[
        bool, typer.Option("--equal-size/--no-equal-size", help="Also a control of the preset's size.")
    ] = True,
    seeds: Annotated[int, typer.Option("--seeds", min=1)] = 3,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Of every leg. [default: what --epochs says]")
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", min=1e-6, help="Passes over the training split.")] = 2.0,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Samples of a step, in one piece. [default: the preset's]")
    ] = None,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", min=1e-9, help="The controls' highest; the preset has its own.")
    ] = 3e-4,
    evaluations: Annotated[int, typer.Option("--evaluations", min=1, help="Looks at the dev loss, per run.")] = 8,
    split: Annotated[str, typer.Option("--split", help="What judges: dev or test.")] = "dev",
    name: Annotated[
        str | None,
        typer.Option("--name", help="Of the preset's leg: another state of the network, beside the same controls."),
    ] = None,
    controls_only: Annotated[bool, typer.Option("--controls-only", help="Leave out the preset.")] = False,
    only_seed: Annotated[
        int | None,
        typer.Option("--only-seed", min=0, help="Train and judge this seed alone, beside others in other processes."),
    ] = None,
) -> dict[str, Any]:
    """What the network is worth beside a plain transformer: same shards, order, batches, losses and steps, several seeds.

    Results go to OUT/control-SPLIT.json, a picture to control-SPLIT.png. Seeds can be trained side by side, by one call with --only-seed
    for each; a call without it then finds them done.
    """
    if split not in ("dev", "test"):
        raise RedHeartError(f"--split {split}: choose dev or test")
    make_directory(out, "--out")
    config = _config(data, preset, set_ or (), steps, epochs, batch, evaluations)
    bench = _Bench(data, out, config, split, learning_rate)
    legs: dict[str, Callable[[int], Load]] = {}  # each trains what is not there yet
    sizes: dict[str, dict[str, int | None]] = {}
    target = parameters_of(config).total
    if not controls_only:
        legs[name or config.preset] = partial(bench.preset, name or config.preset)
        sizes[name or config.preset] = {"parameters": target, "width": config.model.width}
    wanted = (widths or [96]) + [width_of_size(bench.encoder_width, target, bench.labels)] * equal_size
    for width in dict.fromkeys(wanted):
        legs[f"control-{width}"] = partial(bench.control, f"control-{width}", width)
        size = num_parameters(bench.encoder_width, width, bench.labels)
        sizes[f"control-{width}"] = {"parameters": size, "width": width}
    found: dict[str, list[dict[str, Any]]] = {leg: [] for leg in legs}
    numbers = list(range(seeds)) if only_seed is None else [only_seed]
    for seed in numbers:
        for leg, trained in legs.items():
            found[leg].append(bench.judged(leg, seed, trained))
    first, others = next(iter(legs)), [] if controls_only else list(legs)[1:]
    total = config.training.max_steps
    result = {
        "preset": config.preset, "data": Path(data).name, "split": split, "steps": total,
        "batch": config.training.global_batch_size, "learning_rate": learning_rate, "seeds": numbers,
        "legs": {leg: sizes[leg] | _summary(runs) for leg, runs in found.items()},
        "difference": {leg: _difference(found[first], found[leg]) for leg in others},
        "time_to": {leg: _time_to(found[first], found[leg]) for leg in others},
        "machine": machine(), "versions": {"redheart": VERSION, **{n: importlib.metadata.version(n) for n in LIBRARIES}},
    }  # fmt: skip
    place = out / (f"control-{split}" if only_seed is None else f"control-{split}-seed{only_seed}")
    write_json(place.with_suffix(".json"), result)
    _draw(result, place.with_suffix(".png"))
    return result


def _config(
    data: str, preset: str, overrides: Sequence[str], steps: int | None, epochs: float, batch: int | None, evaluations: int
) -> RunConfig:  # fmt: skip
    """The settings that all legs share: the preset's, with steps, batch and evaluations of the bench."""
    sizes = [] if batch is None else [f"training.global_batch_size={batch}", f"training.micro_batch_size={batch}"]
    config = load_config(preset, [*sizes, f"training.epochs={epochs}", "checkpoint.keep_last=1", *overrides])
    stream = SampleStream(data, "train", config.data.remote)
    config = with_encoder(with_edges(config, stream), stream.encoder)
    total = steps or steps_of(config, stream.rows_per_epoch)
    every = math.ceil(total / evaluations)
    changes = {"max_steps": total, "evaluate_every": every, "checkpoint_every": every}
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


class _Bench:
    """The legs of one bench, each run kept below `out`: LEG-seedN.json of its training, LEG-seedN-SPLIT.json of its judgement."""

    def __init__(self, data: str, out: Path, config: RunConfig, split: str, learning_rate: float):
        self.data, self.out, self.config, self.split, self.learning_rate = data, out, config, split, learning_rate
        self.streams = {s: SampleStream(data, s, config.data.remote) for s in ("train", "dev", split)}
        train_stream = self.streams["train"]
        self.content = content_digest(train_stream.index)
        self.encoder_width = int(train_stream.encoder["width"])
        of_people = {s: stream.entries_by(JUDGED_ORIGINS) for s, stream in self.streams.items()}
        taught = of_people["train"] & of_people["dev"]  # the controls' answers are the same whichever split judges them
        self.labels = [label for label, where in LABEL_COLUMNS.items() if taught[where].any()]
        self.entries = taught & of_people[split]
        if not self.entries.any():
            raise RedHeartError(
                f"no label of people is in train, dev and {split} of {data}: prepare a source whose labels are people's"
            )
        scales = constant_losses(*train_stream.label_sample(), config.loss)
        self.factors = factors(task_weights(config.loss), scales, config.loss.constant_floor)

    def control(self, leg: str, width: int, seed: int) -> Load:
        """The plain transformer of this width, trained with this seed where it is not yet."""
        config, path = self._seeded(seed), self.out / f"{leg}-seed{seed}.safetensors"
        settings = config.model_dump(mode="json", include={"loss", "training"}) | {
            "width": width, "learning_rate": self.learning_rate, "labels": self.labels,
            "weight_decay": config.optimizer.weight_decay, "max_grad_norm": config.optimizer.max_grad_norm,
        }  # fmt: skip
        if not self._is_finished(leg, seed, settings):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = PlainTransformer(self.encoder_width, width, self.labels)
                streams = self.streams["train"], self.streams["dev"]
                started = time.perf_counter()
                best = train_control(network, streams, config, self.factors, self.learning_rate, f"{leg}, seed {seed}")
                seconds = time.perf_counter() - started
            save_file(best.weights, path)
            self._finish(leg, seed, settings, seconds, best.step, best.curve, sha256_of(path))

        def load() -> nn.Module:
            facts = path.with_suffix(".json")
            if not path.is_file() or sha256_of(path) != read_sealed_json(facts, AGAIN)["weights"]:
                raise RedHeartError(f"{path} is not what was trained: delete {facts}, and this leg is trained again")
            network = PlainTransformer(self.encoder_width, width, self.labels)
            network.load_state_dict(load_file(path))
            return network.eval()

        return load

    def preset(self, leg: str, seed: int) -> Load:
        """The preset's network, trained with this seed where it is not yet."""
        config, run = self._seeded(seed), self.out / f"{leg}-seed{seed}"
        settings = config.model_dump(mode="json") | {"code": training_code()}  # a change of it is another leg
        if not self._is_finished(leg, seed, settings):
            console.print(f"{leg}, seed {seed}")
            keep_made(run, {"data": self.content, "settings": settings}, ANOTHER)
            resume = "last" if committed(run) else None
            done = train(config, self.data, run, resume, overwrite=resume is None)
            if done.signal:
                raise RedHeartError(f"stopped by a signal in {run}: run the same command again to go on")
            # of a run that was taken up again nobody knows how long it took
            self._finish(leg, seed, settings, None if resume else done.seconds, done.state.best_step, self._curve(run))
        return lambda: load_model(resolve(run)).model

    def judged(self, leg: str, seed: int, trained: Callable[[int], Load]) -> dict[str, Any]:
        """What is known of a leg with a seed: seconds and best step of its training, dev losses, metrics on the judged split."""
        load = trained(seed)
        path = self.out / f"{leg}-seed{seed}-{self.split}.json"
        facts = read_sealed_json(self.out / f"{leg}-seed{seed}.json", AGAIN)
        if path.is_file() and (kept := read_sealed_json(path, AGAIN))["trained"] == facts:
            return facts | kept
        device = compute_device()
        network = load().to(device)
        dev = evaluate(network, self.streams["dev"], self.config.loss, self.factors, device, batch_size=JUDGING_BATCH)
        measured = self._measure(network)
        metrics = {name: {"metric": metric, "value": value} for name, (metric, value) in measured.items()}
        judgement = {"trained": facts, "dev_losses": self._losses(dev), "metrics": metrics}
        write_sealed_json(path, judgement)
        return facts | judgement

    def _measure(self, network: nn.Module) -> Measured:
        dev = answers(network, self.streams["dev"])
        held_out = dev if self.split == "dev" else answers(network, self.streams[self.split])
        return measure(dev, held_out, self.entries, same_rows=self.split == "dev")

    def _losses(self, dev: Evaluation) -> dict[str, float]:
        """By task, of those that a control answers too, and, where the network answers them all, their `total` as training weighs them."""
        losses = {label: dev.losses[label] for label in self.labels if label in dev.losses}
        if len(losses) < len(self.labels):  # modules are left out
            return losses
        return losses | {"total": sum(self.factors[label] * loss for label, loss in losses.items())}

    def _seeded(self, seed: int) -> RunConfig:
        return self.config.model_copy(update={"training": self.config.training.model_copy(update={"seed": seed})})

    def _is_finished(self, leg: str, seed: int, settings: dict[str, Any]) -> bool:
        path = self.out / f"{leg}-seed{seed}.json"
        if not path.is_file():
            return False
        check_made(path, read_sealed_json(path, AGAIN), {"data": self.content, "settings": settings}, ANOTHER)
        return True

    def _curve(self, run: Path) -> dict[int, float]:
        """Dev loss at every look after the first step, of the answers that a control gives too; empty where modules are left out."""
        found = dev_losses(run)
        if any(label not in found for label in self.labels):
            return {}
        steps = [step for step in found[self.labels[0]] if step > 0]
        return {s: sum(self.factors[label] * found[label][s] for label in self.labels) for s in steps}

    def _finish(
        self,
        leg: str,
        seed: int,
        settings: dict[str, Any],
        seconds: float | None,
        best: int | None,
        curve: Mapping[int, float],
        weights: str = "",
    ) -> None:
        training = self.config.training
        assert training.max_steps is not None
        rate = None if seconds is None else training.max_steps * training.global_batch_size / seconds
        facts = {
            "data": self.content, "settings": settings, "weights": weights,
            "seconds": seconds, "samples_per_s": rate, "best_step": best, "dev_curve": [*curve.items()],
        }  # fmt: skip
        write_sealed_json(self.out / f"{leg}-seed{seed}.json", facts)


def machine() -> dict[str, Any]:
    """What the seconds were measured on; threads are torch's."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return {
        "card": torch.cuda.get_device_name() if has_gpu() else "cpu", "processor": next(names, platform.machine()),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0],
    }  # fmt: skip


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a leg over its seeds."""
    summary: dict[str, Any] = {"best_step": [run["best_step"] for run in runs]}
    for key in ("seconds", "samples_per_s"):
        known = [run[key] for run in runs if run[key] is not None]
        summary[key] = over_seeds(known) if known else None
    losses, values = [run["dev_losses"] for run in runs], _values(runs)
    summary["dev_loss"] = {task: over_seeds([of[task] for of in losses]) for task in losses[0]}
    kinds = {name: one["metric"] for name, one in runs[0]["metrics"].items()}
    summary["metrics"] = {n: {"metric": kind, **over_seeds([of[n] for of in values])} for n, kind in kinds.items()}
    return summary


def _difference(preset: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Preset minus control, seed by seed; above 0 the preset is better."""
    return {name: over_seeds(values) for name, values in paired(_values(preset), _values(control))}


def _time_to(preset: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How long the preset trained until its dev loss was at or below the lowest of the control's, in the control's whole training
    time, over the seeds that got there; both were looked at on the same rows at the same steps. `reached`: None where it is not known."""
    shares: list[float] = []
    for ours, plain in zip(preset, control, strict=True):
        curve, aim = ours.get("dev_curve"), plain.get("dev_curve")  # legs trained before there were any have none
        if not curve or not aim or not ours["seconds"] or not plain["seconds"]:
            return {"reached": None}
        lowest = min(value for _, value in aim)
        first = next((step for step, value in curve if value <= lowest), None)
        if first is not None:
            shares.append(ours["seconds"] * first / curve[-1][0] / plain["seconds"])
    return {"reached": len(shares), **(over_seeds(shares) if shares else {})}


def _values(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    return [{name: one["value"] for name, one in run["metrics"].items()} for run in runs]


def show(result: dict[str, Any]) -> None:
    """A row per measure, a column per leg, and what the preset is ahead of each control; behind it dev losses and cost."""
    legs, ahead = result["legs"], result["difference"]
    columns = ("", "metric", *legs, *(f"ahead of {leg}" for leg in ahead))
    rows: list[tuple[str, ...]] = []
    for name, metric in _measures(legs).items():
        cells = [_spread(leg["metrics"].get(name)) for leg in legs.values()]
        rows.append((name, metric, *cells, *(_interval(of.get(name)) for of in ahead.values())))
    for task in dict.fromkeys(task for leg in legs.values() for task in leg["dev_loss"]):
        rows.append(("dev loss", task, *(_spread(leg["dev_loss"].get(task)) for leg in legs.values())))
    rows.append(("parameters", "", *(f"{leg['parameters']:,}" for leg in legs.values())))
    for key in ("seconds", "samples_per_s"):
        rows.append((key, "", *("–" if leg[key] is None else f"{leg[key]['mean']:.4g}" for leg in legs.values())))
    times = [
        "–" if not of["reached"] else f"{_spread(of)} ({of['reached']} seeds)" for of in result["time_to"].values()
    ]
    rows.append(("time to its dev loss", "of its time", *[""] * len(legs), *times))
    title = f"{_what(result)}: mean ± sd; 95 % interval"
    console.print(table(title, columns, [row + ("",) * (len(columns) - len(row)) for row in rows]))


def _what(result: dict[str, Any]) -> str:
    return (
        f"{result['split']}, {result['steps']} steps of {result['batch']}, seeds {', '.join(map(str, result['seeds']))}"
    )


def _measures(legs: Mapping[str, Any]) -> dict[str, str]:
    """What was measured of any leg -> its metric."""
    return {name: of["metric"] for leg in legs.values() for name, of in leg["metrics"].items()}


def _spread(of: dict[str, Any] | None) -> str:
    if of is None:
        return "–"
    return f"{of['mean']:.4f}" + ("" if of["sd"] is None else f" ± {of['sd']:.4f}")


def _interval(of: dict[str, Any] | None) -> str:
    if of is None:
        return "–"
    return f"{of['mean']:+.4f}" + ("" if of["low"] is None else f" [{of['low']:+.4f} {of['high']:+.4f}]")


def _draw(result: dict[str, Any], path: Path) -> None:
    """Bars of every measure, a colour per leg, with the standard deviation over seeds."""
    legs, measures = result["legs"], _measures(result["legs"])
    picture = figure(max(5.0, 1.2 * len(measures) + 1), 4.5)
    axes = picture.subplots()
    width = 0.8 / len(legs)
    for i, (leg, of) in enumerate(legs.items()):
        known = [(k, of["metrics"][name]) for k, name in enumerate(measures) if name in of["metrics"]]
        places = [k + (i - (len(legs) - 1) / 2) * width for k, _ in known]
        spreads = [one["sd"] for _, one in known] if len(result["seeds"]) > 1 else None
        label = f"{leg}, {of['parameters'] / 1e6:.3g}M"
        axes.bar(places, [one["mean"] for _, one in known], width, yerr=spreads, capsize=2, label=label)
    axes.set_xticks(range(len(measures)), [f"{name}\n{metric}" for name, metric in measures.items()], fontsize=7)
    axes.set(title=_what(result), ylabel="mean, and standard deviation over seeds")
    axes.legend(fontsize=8)
    picture.savefig(path, dpi=120)
