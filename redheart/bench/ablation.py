"""Does every module earn its place? The table of evaluation/ablation.py for a run, and for runs trained without a module.

redheart bench ablation --checkpoint RUN [--checkpoint ANOTHER_SEED …] [--retrained RUN_WITHOUT …] --json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from redheart.console import console, progress, table
from redheart.evaluation.ablation import Effect, effects, over_seeds
from redheart.evaluation.answers import Answers, answers
from redheart.evaluation.rows import Rows
from redheart.evaluation.trained import trained_entries
from redheart.model.moe import inert
from redheart.model.redheart import RedHeartModel
from redheart.options import ItsData
from redheart.schema import RedHeartError
from redheart.tasks import TASKS
from redheart.train.export import Trained, load_model, resolve
from redheart.train.resume import check_judged


def bench_ablation(
    checkpoint: Annotated[
        list[Path],
        typer.Option(
            "--checkpoint",
            help="An export, a checkpoint, or a run directory (its best one). May be repeated: networks of several seeds, judged together.",
        ),
    ],
    retrained: Annotated[
        list[Path] | None,
        typer.Option("--retrained", metavar="RUN", help="A run trained with model.ablate; may be repeated."),
    ] = None,
    single_expert: Annotated[
        list[Path] | None,
        typer.Option("--single-expert", metavar="RUN", help="A run trained with model.num_experts=1; may be repeated."),
    ] = None,
    data: ItsData = None,
    split: Annotated[str, typer.Option("--split", help="dev or test.")] = "test",
    rows: Annotated[int | None, typer.Option("--rows", min=100, help="Only N rows, evenly spread.")] = None,
) -> dict[str, Any]:
    """What each module is worth: held-out metrics without it, with bootstrap intervals, or over several seeds with Student's.

    Removes every head, analyzer and auxiliary module in turn, makes the gates even, and compares with runs trained without a module
    (of several networks: with those of the same training.seed). Answers, and entries, that no label trained are left out: what moves
    them is chance.
    """
    wholes = [load_model(resolve(path)) for path in checkpoint]
    others = {path: _without(path) for path in retrained or ()} | {path: _single(path) for path in single_expert or ()}
    seeds = [whole.config.training.seed for whole in wholes]
    if len(set(seeds)) < len(seeds):
        raise RedHeartError(f"two of --checkpoint were trained with the same training.seed {seeds}: name one of each")
    for path, (_, other) in others.items():
        _check_seed(path, other, seeds)
    _check_complete(others, seeds)
    each = [_of_one(whole, others, data, split, rows, len(wholes) > 1) for whole in wholes]
    lines = over_seeds(each) if len(each) > 1 else each[0]
    return {
        "checkpoint": str(checkpoint[0]) if len(checkpoint) == 1 else [str(path) for path in checkpoint],
        "split": split,
        "step": wholes[0].progress.step if len(wholes) == 1 else [whole.progress.step for whole in wholes],
        "seeds": seeds,
        "effects": [asdict(line) | {"verdict": line.verdict} for line in lines],
        **({"each": [[asdict(line) for line in one] for one in each]} if len(each) > 1 else {}),
    }


def _of_one(
    whole: Trained,
    others: dict[Path, tuple[str, Trained]],
    data: str | None,
    split: str,
    rows: int | None,
    by_seed: bool,
) -> list[Effect]:
    """The effects of one network, beside those of `others` that it is compared with."""
    state, where = whole.progress, data or whole.progress.data
    trained = trained_entries(state.labels, whole.config.loss) if state.labels else None
    train, *streams = [Rows(where, s, whole.config.data.remote, trained) for s in ("train", "dev", split)]
    check_judged(state, train.index, data)
    taught = {name for name, weight in train.label_sample()[1].items() if weight.sum() > 0}
    if trained is not None:  # None: an earlier version made it, and the data alone say
        taught = {name for name, entries in trained.items() if any(entries)}
    modules = [m for m in whole.model.built if m != "backbone"]
    seed = whole.config.training.seed
    others = {path: other for path, other in others.items() if not by_seed or other[1].config.training.seed == seed}
    for path, (_, other) in others.items():
        _check_alike(path, other, whole)
    lines: list[Effect] = []
    gates = _gate_modules(whole.model)
    with progress(f"ablation, seed {seed}", 1 + len(modules) + len(gates) + len(others), 0) as (bar, task):

        def answered(by: Trained, without: tuple[str, ...] = ()) -> tuple[dict[str, Answers], ...]:
            return tuple(answers(by.model, s, without, rows) for s in streams)

        present = tuple({n: a for n, a in side.items() if TASKS[n].label in taught} for side in answered(whole))

        def compared(name: str, how: str, other: tuple[dict[str, Answers], ...]) -> list[Effect]:
            bar.update(task, advance=1, note=name)
            return effects(name, how, present, other, same_rows=split == "dev")

        bar.update(task, advance=1)
        for module in modules:
            lines += compared(module, "removed", answered(whole, (module,)))
        for name, gate in gates.items():
            with inert(gate):
                lines += compared(name, "made even", answered(whole))
        for name, other in others.values():
            lines += compared(name, "retrained", answered(other))
    return lines


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
    over = f" over {len(result['seeds'])} seeds" if len(result["seeds"]) > 1 else ""
    console.print(
        f"+ helps, - hurts, both beyond the 95 % interval{over}; a gate made even weighs all its experts alike"
    )


def _cell(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    mark = {"helps": "+", "hurts": "-"}.get(line["verdict"], " ")
    return f"{line['difference']:+.3f} [{line['low']:+.3f} {line['high']:+.3f}] {mark}"


def _without(path: Path) -> tuple[str, Trained]:
    """A run trained without modules, and their names."""
    other = load_model(resolve(path))
    if not other.model.config.ablate:
        raise RedHeartError(f"{path} was trained with every module: train it with --set model.ablate=[MODULE]")
    return " + ".join(other.model.config.ablate), other


def _single(path: Path) -> tuple[str, Trained]:
    single = load_model(resolve(path))
    if single.model.config.num_experts != 1:
        raise RedHeartError(f"{path} has {single.model.config.num_experts} experts, not one")
    return "mixture of experts", single


def _check_seed(path: Path, other: Trained, seeds: list[int]) -> None:
    seed = other.config.training.seed
    if len(seeds) > 1 and seed not in seeds:
        raise RedHeartError(f"{path} was trained with training.seed={seed}, and no --checkpoint was ({seeds})")


def _check_complete(others: Mapping[Path, tuple[str, Trained]], seeds: list[int]) -> None:
    """Raises RedHeartError where several seeds are judged together and a comparison lacks one of them: it would not be told."""
    of: dict[str, list[int]] = {}
    for name, other in others.values():
        of.setdefault(name, []).append(other.config.training.seed)
    for name, there in of.items():
        if len(seeds) > 1 and sorted(there) != sorted(seeds):
            raise RedHeartError(
                f"{name}: the networks to compare with were trained with training.seed {sorted(there)}, those of --checkpoint with "
                f"{sorted(seeds)}: name one of each seed"
            )


def _check_alike(path: Path, other: Trained, whole: Trained) -> None:
    if other.progress.step != whole.progress.step or other.progress.encoder != whole.progress.encoder:
        raise RedHeartError(
            f"{path} stands at step {other.progress.step} and the whole network at {whole.progress.step}, or they read "
            "other features: train both alike"
        )


def _gate_modules(model: RedHeartModel) -> dict[str, nn.Linear]:
    """The gates of the experts and of the ethical theories, where the network has them."""
    places = {"gate of the experts": "heads.emotion.experts.gate", "gate of the theories": "heads.bentham.gate"}
    modules = dict(model.named_modules())
    return {name: gate for name, place in places.items() if isinstance(gate := modules.get(place), nn.Linear)}
