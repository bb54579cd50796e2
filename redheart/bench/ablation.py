"""Does every module earn its place? The table of evaluation/ablation.py for a run, and for runs trained without a module.

redheart bench ablation --checkpoint RUN [--retrained RUN_WITHOUT …] --json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from redheart.console import console, progress, table
from redheart.data.stream import SampleStream
from redheart.evaluation.ablation import Effect, effects
from redheart.evaluation.answers import answers
from redheart.evaluation.evaluate import forward
from redheart.model.moe import usage
from redheart.schema import RedHeartError
from redheart.tasks import TASKS
from redheart.train.export import Trained, load_model, resolve


def bench_ablation(
    checkpoint: Path,
    retrained: Sequence[Path] = (),
    data: str | None = None,
    split: str = "test",
    max_rows: int | None = None,
    single_expert: Path | None = None,
) -> dict[str, Any]:
    """Removes every head, analyzer and auxiliary module in turn, and compares with runs that were trained without one.

    `single_expert`: a run of num_experts = 1, compared as the mixture of experts' absence. Answers without a label in the
    training split are left out: nobody taught them, and what moves them is chance.
    """
    whole = load_model(resolve(checkpoint))
    train, *streams = [
        SampleStream(data or whole.progress.data, s, whole.config.data.remote) for s in ("train", "dev", split)
    ]
    taught = {name for name, weight in train.label_sample()[1].items() if weight.sum() > 0}
    modules = [m for m in whole.model.built if m != "backbone"]
    others = [_checked(path, whole) for path in retrained]
    lines: list[Effect] = []
    with progress("ablation", 1 + len(modules) + len(others) + bool(single_expert), 0) as (bar, task):
        mine = tuple(
            {n: a for n, a in answers(whole.model, s, (), max_rows).items() if TASKS[n].label in taught}
            for s in streams
        )
        bar.update(task, advance=1)
        for module in modules:
            lines += effects(
                module, "removed", mine, tuple(answers(whole.model, s, (module,), max_rows) for s in streams)
            )
            bar.update(task, advance=1, note=module)
        for name, other in others:
            lines += effects(name, "retrained", mine, tuple(answers(other.model, s, (), max_rows) for s in streams))
            bar.update(task, advance=1, note=name)
        if single_expert:
            single = load_model(resolve(single_expert))
            if single.model.config.num_experts != 1:
                raise RedHeartError(f"{single_expert} has {single.model.config.num_experts} experts, not one")
            lines += effects(
                "mixture of experts", "retrained", mine, tuple(answers(single.model, s, (), max_rows) for s in streams)
            )
            bar.update(task, advance=1)
    share, entropy = usage(_gates(whole, streams[1], max_rows))
    return {
        "checkpoint": str(checkpoint),
        "split": split,
        "step": whole.progress.step,
        "expert_share": [round(v, 4) for v in share.tolist()],
        "expert_usage_entropy": entropy,
        "effects": [asdict(line) | {"verdict": line.verdict} for line in lines],
    }


def show(result: dict[str, Any]) -> None:
    """A row per module, a column per answer: what is lost without the module, its 95 % interval, and where it is not chance."""
    answers_ = list(dict.fromkeys(line["task"] for line in result["effects"]))
    lines = {(line["module"], line["how"], line["task"]): line for line in result["effects"]}
    whole = {name: next(v for k, v in lines.items() if k[2] == name) for name in answers_}
    columns = ("without", "how", *(f"{name} {whole[name]['metric']} {whole[name]['whole']:.3f}" for name in answers_))
    rows = [
        (module, how, *(_cell(lines.get((module, how, name))) for name in answers_))
        for module, how in dict.fromkeys(k[:2] for k in lines)
    ]
    console.print(table(f"what each module is worth on {result['split']}: metric with it minus without", columns, rows))
    console.print(
        f"+ helps, - hurts, both beyond the 95 % interval; experts' shares {result['expert_share']}, entropy of use "
        f"{result['expert_usage_entropy']:.3f} (1: even use)"
    )


def _cell(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    mark = {"helps": "+", "hurts": "-"}.get(line["verdict"], " ")
    return f"{line['difference']:+.3f} [{line['low']:+.3f} {line['high']:+.3f}] {mark}"


def _checked(path: Path, whole: Trained) -> tuple[str, Trained]:
    """A run trained without modules, and their names."""
    other = load_model(resolve(path))
    if not other.model.config.ablate:
        raise RedHeartError(f"{path} was trained with every module: train it with --set model.ablate=[MODULE]")
    if other.progress.step != whole.progress.step or other.progress.encoder != whole.progress.encoder:
        raise RedHeartError(
            f"{path} stands at step {other.progress.step} and the whole network at {whole.progress.step}, or they read "
            "other features: train both alike"
        )
    return " + ".join(other.model.config.ablate), other


def _gates(trained: Trained, stream: SampleStream, max_rows: int | None) -> torch.Tensor:
    """The emotion head's gates [rows, experts]."""
    found = []
    with torch.no_grad():
        for batch in stream.in_order(128, max_rows=max_rows or 4096):
            logits = forward(trained.model, batch.to("cpu", torch.float32)).expert_gate_logits
            if logits is None:
                raise RedHeartError("this network has no mixture of experts: give a run with every module")
            found.append(logits)
    return torch.cat(found)
