"""`redheart init` as a command; cli.py has the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redheart.console import emit
from redheart.options import Json, Labels, Text


def init(
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="Your own table of texts.")] = None,
    text: Text = None,
    label: Labels = None,
    gpu_memory: Annotated[str | None, typer.Option("--gpu-memory", help="Such as 8GiB, or none.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.1, help="How long training may take.")] = None,
    language: Annotated[str | None, typer.Option("--language", help="Of the texts: en, ko, de …")] = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("redheart.yaml"),
    json_: Json = False,
) -> None:
    """Ask five questions (your table, its columns, card, time, language), or take the options, and write settings for `train`."""
    from redheart.console import console
    from redheart.train.init import init as run

    run(data, text, label or (), gpu_memory, minutes, language, out)
    console.print(f"wrote {out}; train with: redheart train {out} --out runs/{out.stem}")
    emit({"out": str(out)}, json_)
