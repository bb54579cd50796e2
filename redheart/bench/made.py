"""What a run of a bench was made with, kept beside it in RUN.made.json: nothing is taken for, or gone on with as, what it is not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redheart.config import RunConfig
from redheart.data.shards import content_digest
from redheart.files import read_sealed_json, write_sealed_json
from redheart.memory.activations import code_digest
from redheart.schema import RedHeartError

OPTIM = Path(__file__).parents[1] / "optim"


def training_code() -> str:
    """Digest of every source that decides what a step computes: those of a micro-step, and those of the optimizer."""
    files = sorted(p for kind in ("*.py", "*.cpp", "*.h") for p in OPTIM.rglob(kind))
    return hashlib.sha256(b"\0".join([code_digest().encode(), *(p.read_bytes() for p in files)])).hexdigest()


def made_with(config: RunConfig, index: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The settings, the content of the data, the code of network and optimizer, and what else (plain JSON) decides what becomes of it."""
    return {"data": content_digest(index), "settings": config.model_dump(mode="json"), "code": training_code(), **more}


def check_made(path: Path, kept: Mapping[str, Any] | None, made: Mapping[str, Any], another: str) -> None:
    """Raises RedHeartError, naming `another` place, where what is at `path` was made otherwise, or (None) nobody knows how."""
    if kept is None:
        raise RedHeartError(
            f"{path} was made by an earlier version, which did not say with what: name {another} (or delete it)"
        )
    if any(kept.get(key) != value for key, value in made.items()):
        raise RedHeartError(
            f"{path} was made with other data, settings or code of network or optimizer: name {another} (or delete it)"
        )


def keep_made(run: Path, made: dict[str, Any], another: str) -> None:
    """Before anything is made at `run`: writes down with what. What is there already is compared."""
    path = run.with_name(f"{run.name}.made.json")
    if not os.path.lexists(run):
        write_sealed_json(path, made)
    else:
        check_made(run, read_sealed_json(path, f"delete {run}") if path.is_file() else None, made, another)
