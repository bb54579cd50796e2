"""The legs of a comparison over seeds: each is kept in a file of its own, with what it was made with, and run once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from redheart.bench.made import keep_made, made_with
from redheart.config import RunConfig, load_config
from redheart.files import write_json


def options(doc: str | None, seeds: int, steps: int, batch: int) -> argparse.ArgumentParser:
    """What all such scripts are asked, with their own defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--out", type=Path)
    for name, usual in (("--seeds", seeds), ("--steps", steps), ("--batch", batch)):
        parser.add_argument(name, type=int, default=usual)
    parser.add_argument("--only", action="append", metavar="LEG-SEED", help="this leg alone; may be repeated")
    return parser


def configured(preset: str, seed: int, steps: int, batch: int, *more: str) -> RunConfig:
    """A preset under `plain` with so many steps of one micro-batch."""
    sizes = (f"training.{name}_batch_size={batch}" for name in ("global", "micro"))
    return load_config(
        preset, [f"training.seed={seed}", f"training.max_steps={steps}", "memory.strategy=plain", *sizes, *more]
    )


def kept(
    done: Path, config: RunConfig, index: Mapping[str, Any], run: Callable[[], dict[str, Any]], **made: Any
) -> dict[str, Any]:
    """What `run` finds, or found; RedHeartError where the leg at `done` is of other data, settings or code."""
    keep_made(done, made_with(config, index, **made), "another --work")
    if not done.is_file():
        write_json(done, run())
    found: dict[str, Any] = json.loads(done.read_text())
    return found
