"""`redheart bench NAME`: the parameters of bench_NAME in bench/NAME.py are its options, what it returns is its JSON.

A bench's file is imported when the bench runs: most of them import torch, which its options and its help do not wait for.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from redheart import options
from redheart.console import console, emit, table

BENCHES = {
    "loader": "Samples per second into padded batches, beside `datasets` streaming.",
    "trainer": "Samples per second of `train`, beside a bare torch loop and Transformers' Trainer.",
    "encoder": "Encoders and their layers under linear probes on dev splits.",
    "label": "Texts per second that the LLM scores, beside generating JSON and parsing it.",
    "model": "Seconds and FLOPs of a training step, module by module.",
    "step": "Operations, parameter tensors and waits of a training step, counted.",
    "gpu": "Real steps of every strategy that fits a memory cap, beside the plan.",
    "memory": "Peak memory of drawn configurations on the CPU, beside the plan.",
    "optimizer": "A step of the 8-bit Adam on the CPU, beside DeepSpeed's, torch's and bitsandbytes'.",
    "ablation": "What each module is worth: held-out metrics without it.",
    "parity": "Dev loss after the same steps with fp32 and with 8-bit optimizer states.",
    "control": "What the network is worth beside a plain transformer.",
    "transfer": "Does growth pay? Dev loss over FLOPs: grown, and from scratch.",
    "scaling": "A step of two processes over gloo, beside what `plan` predicts.",
}
MOST_COLUMNS = 8  # of a table that a terminal shows
OWN_TABLES = {"gpu", "ablation", "control", "transfer"}  # their files have a `show`


class _Benches(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None
        return name, _command(name), rest


bench = typer.Typer(
    cls=_Benches,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure speed, side by side with what others offer.",
)
for _name, _help in BENCHES.items():
    bench.command(_name, help=_help)(lambda: None)  # _Benches exchanges it


def _command(name: str) -> Any:
    """bench_NAME with --json: shows what it returns, and ends with exit code 1 where that says that it is not `ok`."""
    signature, doc = signature_of(name)

    def command(json_: bool, **given: Any) -> None:
        room = importlib.import_module(f"redheart.bench.{name}")
        result = getattr(room, f"bench_{name}")(**given)
        if name in OWN_TABLES:
            room.show(result)
        else:
            show(f"bench {name}", result)
        emit(result, json_)
        if not result.get("ok", True):
            raise typer.Exit(1)

    json_option = inspect.Parameter("json_", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=options.Json)
    command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), json_option])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}  # type: ignore[attr-defined]
    single = typer.Typer(rich_markup_mode=None, add_completion=False)
    single.command(name, help=doc)(command)
    return get_command(single)


def signature_of(name: str) -> tuple[inspect.Signature, str]:
    """Parameters and docstring of bench_NAME, from its source alone. They may name what typing and options.py have, and literals."""
    body = ast.parse(Path(__file__).with_name(f"{name}.py").read_text("utf-8")).body
    function = next(f for f in body if isinstance(f, ast.FunctionDef) and f.name == f"bench_{name}")
    known = {**vars(options), "Annotated": Annotated, "Any": Any, "Path": Path, "typer": typer}
    value = lambda node: eval(compile(ast.Expression(node), name, "eval"), known)  # noqa: E731
    given = function.args
    missing = [inspect.Parameter.empty] * (len(given.args) - len(given.defaults))
    parameters = [
        inspect.Parameter(
            a.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=value(a.annotation)
        )
        for a, default in zip(given.args, [*missing, *map(value, given.defaults)], strict=True)
    ]
    return inspect.Signature(parameters, return_annotation=value(function.returns)), ast.get_docstring(function) or ""


def show(title: str, result: Mapping[str, Any]) -> None:
    """The single figures in a table, groups of the same names side by side in another, and one of each group of groups.

    What lies deeper, or is too wide (curves, for instance), only the JSON has.
    """
    single = {name: value for name, value in result.items() if not isinstance(value, dict)}
    console.print(table(title, ("figure", "measured"), [(k, _cell(v)) for k, v in single.items()]))
    tables: dict[tuple[str, Any], dict[str, dict[str, Any]]] = {}
    for name, group in result.items():
        for row, value in group.items() if isinstance(group, dict) else ():
            if isinstance(value, dict):
                tables.setdefault((name, None), {})[row] = value
            else:
                tables.setdefault(("", next(iter(group))), {}).setdefault(row, {})[name] = value
    for (name, _), rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        if len(columns) <= MOST_COLUMNS:
            lines = [(k, *(_cell(row.get(column, "")) for column in columns)) for k, row in rows.items()]
            console.print(table("", (name, *columns), lines))


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "–" if value is None else str(value)
