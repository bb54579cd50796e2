"""`redheart bench …`: every command reads its options, calls one function and prints what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from redheart.console import emit
from redheart.options import Checkpoint, Data, Json, Preset, Set

bench = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure speed, side by side with what others offer."
)


@bench.command("loader")
def bench_loader(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="A prepared directory. [default: GoEmotions and ETHICS, prepared once]"),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1024, help="Samples prepared without --data.")] = 8192,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    json_: Json = False,
) -> None:
    """Samples per second into padded batches, beside `datasets` streaming with a shuffle buffer."""
    from redheart.bench import loader as room

    _print(_figures("loader"), room.bench_loader(data, rows, batch_size), json_)


@bench.command("trainer")
def bench_trainer(
    data: Annotated[
        Path | None, typer.Option("--data", help="A prepared directory. [default: the shipped texts, prepared once]")
    ] = None,
    preset: Preset = "local",
    set_: Set = None,
    strategy: Annotated[
        str, typer.Option("--strategy", help="memory.strategy of ours and of Transformers' Trainer.")
    ] = "plain",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of a leg that are timed.")] = 40,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds whose median is taken.")] = 3,
    json_: Json = False,
) -> None:
    """Samples per second of `train`, beside a bare torch loop and Transformers' Trainer on the same shards, in turns."""
    from redheart.bench import trainer as room

    _print(_figures("trainer"), room.bench_trainer(data, preset, set_ or (), strategy, steps, rounds), json_)


@bench.command("encoder")
def bench_encoder(
    train_texts: Annotated[int, typer.Option("--train-texts", min=100, help="Most training texts of a task.")] = 4000,
    dev_texts: Annotated[int, typer.Option("--dev-texts", min=100, help="Most dev texts of a task.")] = 1500,
    json_: Json = False,
) -> None:
    """The packaged encoders that are installed under linear probes on the dev splits of GoEmotions, EmoBank and ETHICS."""
    from redheart.bench import encoder as room

    _print(_figures("encoder"), room.bench_encoder(train_texts, dev_texts), json_)


@bench.command("label")
def bench_label(
    texts: Annotated[int, typer.Option("--texts", min=8, help="Texts that both sides read.")] = 32,
    json_: Json = False,
) -> None:
    """Texts per second that the LLM scores, beside generating JSON with the same model and parsing it."""
    from redheart.bench import label as room

    _print(_figures("label"), room.bench_label(num_texts=texts), json_)


@bench.command("model")
def bench_model(
    preset: Preset = "330m",
    set_: Set = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=512)] = 64,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1)] = 16,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds whose median is taken.")] = 5,
    json_: Json = False,
) -> None:
    """Seconds and FLOPs of a training step, module by module; the backbone beside torch's TransformerEncoder."""
    from redheart.bench import model as room

    _print(room.show, room.bench_model(preset, set_ or (), tokens, micro_batch, repeats), json_)


@bench.command("step")
def bench_step(
    preset: Preset = "local",
    set_: Set = None,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Of the timed step.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds whose median is taken.")] = 7,
    json_: Json = False,
) -> None:
    """Operations, parameter tensors and waits of a training step, counted; samples per second beside matrix products."""
    from redheart.bench import step as room

    _print(_figures("step"), room.bench_step(preset, set_ or (), micro_batch, repeats), json_)


@bench.command("gpu")
def bench_gpu(
    presets: Annotated[
        list[str] | None,
        typer.Option("--presets", help="A preset or a .yaml file; may be repeated. [default: 330m, 1b3]"),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, max=512, help="May be repeated. [default: 64, 128]")
    ] = None,
    caps: Annotated[
        list[str] | None,
        typer.Option("--caps", help="GPU memory in all, for instance 8GiB; may be repeated. [default: 8GiB, 4GiB]"),
    ] = None,
    strategies: Annotated[
        list[str] | None, typer.Option("--strategies", help="Run only these; may be repeated. [default: all that fit]")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of a case, after 2 others.")] = 5,
    timeout: Annotated[int, typer.Option("--timeout", min=10, help="Seconds that a case may take.")] = 900,
    out: Annotated[Path, typer.Option("--out", help="Where gpu-CARD-CAP.json is written.")] = Path(
        "tests/benchmarks/results"
    ),
    chosen_only: Annotated[bool, typer.Option("--chosen-only", help="Of each plan only its own choice.")] = False,
    seconds: Annotated[
        int | None, typer.Option("--seconds", min=1, help="For all of it: cases for which no time is left are named.")
    ] = None,
    json_: Json = False,
) -> None:
    """Real steps of every strategy that fits a memory cap: peaks beside the plan's, samples and FLOPs per second.

    Exit code 1 where a plan's own choice failed. Without a GPU it runs on the CPU, uncapped.
    """
    from redheart.bench import gpu as room

    result = room.bench_gpu(
        presets or ("330m", "1b3"), tokens or (64, 128), caps or ("8GiB", "4GiB"), strategies or (), steps, timeout, out,
        chosen_only, seconds,
    )  # fmt: skip
    _print(room.show, result, json_)
    if not result["ok"]:
        raise typer.Exit(1)


@bench.command("optimizer")
def bench_optimizer(
    params: Annotated[
        int, typer.Option("--params", min=1024, help="fp32 parameters that every step updates.")
    ] = 64_000_000,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 2,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds whose median is taken.")] = 9,
    json_: Json = False,
) -> None:
    """A step of the 8-bit Adam on the CPU, beside DeepSpeed's, torch's and bitsandbytes', in turns."""
    from redheart.bench import optimizer as room

    _print(room.show, room.bench_optimizer(params, threads, rounds), json_)


@bench.command("ablation")
def bench_ablation(
    checkpoint: Checkpoint,
    retrained: Annotated[
        list[Path] | None,
        typer.Option("--retrained", metavar="RUN", help="A run trained with model.ablate; may be repeated."),
    ] = None,
    single_expert: Annotated[
        Path | None, typer.Option("--single-expert", metavar="RUN", help="A run trained with model.num_experts=1.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="[default: the data it was trained on]")] = None,
    split: Annotated[str, typer.Option("--split", help="dev or test.")] = "test",
    rows: Annotated[int | None, typer.Option("--rows", min=100, help="Only N rows, evenly spread.")] = None,
    json_: Json = False,
) -> None:
    """What each module is worth: held-out metrics without it, with bootstrap intervals."""
    from redheart.bench import ablation as room

    _print(room.show, room.bench_ablation(checkpoint, retrained or (), data, split, rows, single_expert), json_)


@bench.command("parity")
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
    json_: Json = False,
) -> None:
    """Dev loss after the same steps with fp32 and with 8-bit optimizer states on the host, over several seeds."""
    from redheart.bench import parity as room

    _print(
        room.show,
        room.bench_parity(data, work, preset, set_ or (), steps, seeds, jobs, out, plain, control or ()),
        json_,
    )


@bench.command("control")
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
    json_: Json = False,
) -> None:
    """What the network is worth beside a plain transformer: same shards, order, batches, losses and steps, several seeds."""
    from redheart.bench import control as room

    result = room.bench_control(
        data, out, preset, set_ or (), widths or (96,), equal_size, range(seeds), steps, epochs, batch, learning_rate,
        evaluations, split, name, not controls_only,
    )  # fmt: skip
    _print(room.show, result, json_)


@bench.command("transfer")
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
    json_: Json = False,
) -> None:
    """Does growth pay? Steps to a dev loss: grown, from scratch, and the small network trained on."""
    from redheart.bench import transfer as room

    seeds, rates = seed or (0, 1, 2), learning_rate or (1e-4, 3e-4, 1e-3)
    _print(
        room.show,
        room.bench_transfer(data, out, small, large, source_steps, steps, evaluate_every, seeds, rates, set_ or ()),
        json_,
    )


@bench.command("scaling")
def bench_scaling(
    preset: Preset = "local",
    set_: Set = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=512)] = 32,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Samples of a process and step.")] = 16,
    steps: Annotated[int, typer.Option("--steps", min=4, help="Steps of each run; the first two do not count.")] = 12,
    timeout_s: Annotated[int, typer.Option("--timeout-s", min=1, help="Of each run.")] = 900,
    json_: Json = False,
) -> None:
    """A step of two processes over gloo, beside what the scaling model of `plan` predicts from a step of one."""
    from redheart.bench import scaling as room

    _print(room.show, room.bench_scaling(preset, set_ or (), tokens, micro_batch, steps, timeout_s), json_)


def _print(show: Callable[[dict[str, Any]], None], result: dict[str, Any], json_: bool) -> None:
    """What was measured: for people on stderr, and as JSON on stdout where that is asked for."""
    show(result)
    emit(result, json_)


def _figures(what: str) -> Callable[[dict[str, Any]], None]:
    """Shows a result as a table of its keys."""

    def show(result: dict[str, Any]) -> None:
        from redheart.console import console, table

        rows = [(k, json.dumps(v) if isinstance(v, dict | list) else str(v)) for k, v in result.items()]
        console.print(table(f"bench {what}", ("figure", "measured"), rows))

    return show
