"""The command line. No logic here: every command reads its options, calls one function and prints the result."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from redheart import options
from redheart.bench.commands import bench
from redheart.caches import forget_empty_variables
from redheart.console import any_encoding, console, emit, literal, quiet_start, show_answers, table
from redheart.device import settle_allocator
from redheart.early import check
from redheart.ends import UNREAD, code_of, ending
from redheart.files import is_here, no_room
from redheart.ranks import is_main, launched_rank, leaving
from redheart.schema import RedHeartError

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a multi-task network for emotion, ethics, regret and causality inside 8 GB of GPU memory.",
)  # fmt: skip

app.add_typer(bench, name="bench")


@app.callback()
def _root(
    version: options.Version = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar="REDHEART_DEBUG")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by the deepspeed launcher.")] = 0,
) -> None: ...


@app.command()
def init(
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="Your own table of texts.")] = None,
    text: options.Text = None,
    label: options.Labels = None,
    gpu_memory: Annotated[str | None, typer.Option("--gpu-memory", help="Such as 8GiB, or none.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.1, help="How long training may take.")] = None,
    language: Annotated[str | None, typer.Option("--language", help="Of the texts: en, ko, de …")] = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("redheart.yaml"),
    json_: options.Json = False,
) -> None:
    """Ask five questions (your table, its columns, card, time, language), or take the options, and write settings for `train`."""
    from redheart.train.init import init as run

    run(data, text, label or (), gpu_memory, minutes, language, out)
    console.print(
        f"wrote {out}; train with: {shlex.join(['redheart', 'train', str(out), '--out', f'runs/{out.stem}'])}"
    )
    emit({"out": str(out)}, json_)


@app.command()
def prepare(
    source: options.Sources,
    out: Annotated[Path, typer.Option("--out", help="Directory of the shards.")],
    preset: options.Preset = "local",
    set_: options.Set = None,
    samples: options.Samples = None,
    force_preprocess: options.ForcePreprocess = False,
    skip_invalid: options.SkipInvalid = False,
    dedup: options.Dedup = False,
    augment: options.Augment = None,
    features_from: options.FeaturesFrom = None,
    push: options.Push = None,
    json_: options.Json = False,
) -> None:
    """Turn raw records into shards: the LLM scores what is missing, the frozen encoder makes token features. Resumable."""
    from redheart.config import load_config
    from redheart.data.card import push as upload
    from redheart.data.prepare import prepare as run

    settings = [*(["data.dedup=true"] if dedup else []), *([f"data.augment.kind={augment}"] if augment else [])]
    settings += [f"data.features_from={json.dumps(features_from)}"] if features_from else []
    data = load_config(preset, [*(set_ or ()), *settings]).data
    report = run(source, out, data, samples, force_preprocess, skip_invalid)
    if launched_rank() > 0:
        return
    rows = ", ".join(f"{n} {s}" for s, n in report.rows.items())
    console.print(
        f"{'found' if report.reused else 'wrote'} {out}: {rows}; the LLM gave {report.llm_answers} answers, "
        f"{report.llm_refused} were refused; {report.rejected} records rejected"
    )
    if push:
        console.print(f"pushed to {upload(out, push)}")
    emit(asdict(report), json_)


@app.command()
def dedup(
    data: options.Data,
    out: Annotated[Path | None, typer.Option("--out", help="New directory for the data without what leaks.")] = None,
    threshold: options.Threshold = None,
    json_: options.Json = False,
) -> None:
    """Count train rows that nearly repeat a dev or test row, and dev rows that repeat a test row; with --out, drop them."""
    from redheart.data.dedup import dedup as run
    from redheart.data.neighbours import describe

    report = run(data, out, threshold)
    console.print(describe(report.duplicates))
    if out:
        console.print(f"wrote {out}: " + ", ".join(f"{n} {s}" for s, n in report.rows.items()))
    emit(asdict(report), json_)


@app.command()
def params(preset: options.Preset = "330m", set_: options.Set = None, json_: options.Json = False) -> None:
    """Count the parameters of every module, on the meta device."""
    import torch

    from redheart.config import load_config
    from redheart.model.build import build_model
    from redheart.model.redheart import parameter_counts

    config = load_config(preset, set_ or ())
    with torch.device("meta"):
        counts = parameter_counts(build_model(config, None))
    rows = [(m, f"{n:,}") for m, n in counts.items()] + [("total", f"{sum(counts.values()):,}")]
    if not json_:
        console.print(table(f"parameters of {config.preset}", ("module", "parameters"), rows))
    emit({"total": sum(counts.values()), "modules": counts}, json_)


@app.command()
def plan(
    preset: options.Preset = "330m",
    set_: options.Set = None,
    gpu_memory: options.GpuMemory = None,
    host_memory: Annotated[str | None, typer.Option("--host-memory", help="For instance 16GiB, of a node.")] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1)] = 1,
    tokens: options.Tokens = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan a run on this machine's CPU instead of a GPU.")] = False,
    measure: options.Measure = False,
    network_gbit: options.NetworkGbit = None,
    step_seconds: options.StepSeconds = None,
    write_ds_configs: options.WriteDsConfigs = None,
    json_: options.Json = False,
) -> None:
    """Predict the memory and time of every strategy without running it, and choose the fastest that fits."""
    from redheart.config import load_config
    from redheart.memory.budget import budget_of
    from redheart.memory.ds_files import write_ds_configs as write
    from redheart.memory.plan import plan as run
    from redheart.memory.scaling import efficiency, show_efficiency
    from redheart.memory.show import show_plan
    from redheart.train.measure import measure_step, show_measured

    if write_ds_configs is not None:
        emit([str(path) for path in write(write_ds_configs)], json_)
        return
    config = load_config(preset, set_ or ())
    tokens = tokens or config.data.encoder.most_tokens
    if measure:
        measured = measure_step(config, tokens)
        show_measured(measured)
        emit(measured, json_)
        return
    budget = budget_of(config, gpu_memory, host_memory, cpu)
    planned = run(config, budget.gpu.gib if budget.gpu else None, budget.host.gib, nodes, gpus_per_node, tokens)
    scaling = efficiency(config, planned, network_gbit, step_seconds)
    if not json_:
        show_plan(planned, budget, preset, set_ or ())
        if nodes > 1:
            show_efficiency(scaling)
    emit({**planned.to_json(), "budget": budget.to_json(), "efficiency": scaling.to_json() if scaling else None}, json_)


@app.command()
def train(
    file: options.ConfigFile = None,
    data: options.RunData = None,
    text: options.Text = None,
    label: options.Labels = None,
    preset: options.RunPreset = None,
    set_: options.Set = None,
    out: options.RunOut = None,
    resume: options.Resume = None,
    init: options.Init = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an old run in the run directory.")] = False,
    no_param_update: options.DryRun = False,
    help_config: options.HelpConfig = False,
    show_config: options.ShowConfig = False,  # answered by early.check
    json_: options.Json = False,
) -> None:
    """Train; also under `accelerate launch` and `deepspeed`. Ctrl-C and SIGTERM end a run with a checkpoint."""
    from redheart.closing import close
    from redheart.train.own import settings
    from redheart.train.start import train as start

    call = settings(file, preset, set_ or (), out, resume, data, text, label or ())
    result = start(call.config, call.data, call.run, resume, overwrite, not no_param_update, init)
    console.print(result.summary())
    if call.config.data.file and not result.signal and not no_param_update and is_main():
        close(result.run, aside=json_)
    if is_main():
        emit(result.to_json(), json_)
    if result.signal:
        console.print(f"go on with: {result.go_on}", markup=False)
        raise typer.Exit(128 + result.signal)


@app.command()
def evaluate(
    checkpoint: options.Checkpoint,
    data: options.ItsData = None,
    split: Annotated[str, typer.Option("--split", help="dev or test.")] = "test",
    report: options.ReportFile = None,
    device: options.Device = "cpu",
    swap: options.Swap = None,
    all_: options.All = False,
    brief: options.Brief = False,
    json_: options.Json = False,
) -> None:
    """Held-out metrics of every answer beside the constant predictor and linear models on the same features."""
    from redheart.train.validate import validate

    result, path = validate(checkpoint, data, split, report, device, swap, all_)
    for one in [] if brief else [*result.terminal_tables(), result.footnote()]:
        console.print(one)
    console.print("\n".join([*result.verdict.lines(), *([f"report: {path} (.html: a page)"] if path else [])]))
    emit(result.to_json(), json_)


@app.command()
def calibrate(
    checkpoint: options.Checkpoint,
    data: options.ItsData = None,
    device: options.Device = "cpu",
    json_: options.Json = False,
) -> None:
    """Fit probabilities and thresholds on dev, kept beside the weights; `train` does so at its end."""
    from redheart.train.calibrate import calibrate as run

    made = run(checkpoint, data, device)
    console.print(made.summary(), markup=False)
    emit(made.to_json(), json_)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="[default: any that is free]")] = 0,
) -> None:
    """Serve a page of a run while it trains, on this machine alone, until Ctrl-C: losses, answers, speed, memory."""
    from redheart.train.watch import watch as serve

    serve(run, port)


@app.command()
def predict(
    checkpoint: options.Checkpoint,
    text: options.Texts = None,
    input_: options.InputFile = None,
    column: options.InputColumn = None,
    output: options.OutputFile = None,
    device: options.Device = "cpu",
    swap: options.Swap = None,
    all_: options.All = False,
    brief: options.Brief = False,
    json_: options.Json = False,
) -> None:
    """Read texts and answer for each of them."""
    from redheart.infer import RedHeartPipeline, flat
    from redheart.reading import texts_of, write_answers

    texts, rows = texts_of(text or (), input_, column)
    pipeline = RedHeartPipeline.from_pretrained(checkpoint, device=device, swap=swap or (), untrained=all_)
    answers = pipeline(texts)
    if swap:
        console.print(str(pipeline.swap.report()))
    if output:
        write_answers(output, rows, [flat(a) for a in answers])
    elif not json_:
        for one, answer in zip(texts, answers, strict=True):
            show_answers(one, answer, brief)
    emit([{"text": t, **a} for t, a in zip(texts, answers, strict=True)], json_)


@app.command()
def export(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="New directory for the model.")],
    json_: options.Json = False,
) -> None:
    """Write safetensors, config.json and a model card for `RedHeartModel.from_pretrained`."""
    from redheart.train.export import export as run

    counts = run(checkpoint, out)
    console.print(f"exported {sum(counts.values()):,} parameters to {out}")
    emit({"out": str(out), "modules": counts}, json_)


@app.command()
def grow(
    checkpoint: options.Checkpoint,
    to: options.GrowTo,
    out: options.GrowOut,
    set_: options.Set = None,
    data: options.GrowData = None,
    noise_snr_db: options.GrowNoise = 10.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of that noise.")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Write only if all outputs agree on real rows.")] = False,
    moments: options.GrowMoments = False,
    json_: options.Json = False,
) -> None:
    """Make a wider or deeper network with the same function out of a trained one: 330m to 1b3, for instance."""
    from redheart.config import load_config
    from redheart.train.grow import grow as run

    report = run(checkpoint, load_config(to, set_ or ()), out, data, noise_snr_db, seed, verify, moments)
    console.print(f"{report.summary(out)}\ntrain it with: {report.training(out, to, set_ or ())}")
    emit(asdict(report), json_)


@app.command()
def doctor(
    warm_up: options.WarmUp = False,
    json_: options.Json = False,
) -> None:
    """Check this machine: Python, compiler, libraries, models, GPU, memory, disk. Exit code 1 if something is missing."""
    from redheart.doctor import examine
    from redheart.doctor import warm_up as run_warm_up

    findings = examine()
    if not json_:
        rows = [(f.name, "ok" if f.ok else "MISSING", f.detail) for f in findings]
        console.print(table("this machine", ("what", "", "detail"), rows))
    emit([asdict(f) for f in findings], json_)
    if not all(f.ok for f in findings):
        raise typer.Exit(1)
    if warm_up:
        run_warm_up()


def main() -> None:
    """Entry point: an error of the user's is one line; exit codes as in ends.py."""
    with ending():
        any_encoding()
        forget_empty_variables()
        quiet_start()
        settle_allocator()
        arguments, stdout = sys.argv[1:], sys.stdout
        debug = "--debug" in arguments or os.environ.get("REDHEART_DEBUG", "") not in ("", "0")
        try:
            with leaving():
                app(check(typer.main.get_command(app), arguments))
        except BrokenPipeError:  # whoever read stdout has gone, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written as Python ends
            sys.exit(UNREAD)
        except SystemExit:
            if sys.stdout is not stdout:  # so typer ends a command that it met in
                sys.exit(UNREAD)
            raise
        except Exception as error:
            room, path = no_room(error), getattr(error, "filename", None)  # a path the user chose
            gone = isinstance(error, FileNotFoundError) and not is_here()
            if debug or not (isinstance(error, RedHeartError) or room or path or gone):
                raise
            message = (
                f"writing failed ({room}): make room, or raise the limit (quota, ulimit -f)" if room else str(error)
            )
            if gone:
                message = "the directory that this was called in is no longer there: change to another one"
            print("redheart:", literal(" ".join(line.strip() for line in message.splitlines())), file=sys.stderr)
            sys.exit(code_of(error))
