"""Checkpoints that are whole or absent (DESIGN §8): RUN/checkpoints/step-00000040/ with a manifest, `last` and `best` pointers.

A directory holds the engine's shards, trainer.json (step, dev losses, world size) and config.yaml. All ranks write into
step-….tmp; the main one then writes the manifest, flushes, renames and moves the pointer.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from redheart.config import RunConfig, write_config
from redheart.files import (
    MANIFEST,
    commit_directory,
    read_json,
    read_pointer,
    verify_manifest,
    write_json,
    write_pointer,
)
from redheart.ranks import barrier, is_main
from redheart.schema import RedHeartError
from redheart.train.engine import Engine

STEP = re.compile(r"step-(\d{8})$")


@dataclass
class Progress:
    """Where a run stands; everything else is a function of the configuration and of this."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # when it is read back

    step: int = 0  # optimizer steps done
    world_size: int = 1
    scales: dict[str, float] = field(default_factory=dict)  # constant-predictor losses
    data: str = ""  # the data directory it was trained on
    encoder: dict[str, Any] = field(default_factory=dict)  # fingerprint of the features it was trained on
    sources: dict[str, Any] = field(default_factory=dict)  # where the training data came from, with licences
    initial_dev_loss: float | None = None
    initial_dev_losses: dict[str, float] = field(default_factory=dict)  # per task, before the first step
    dev_losses: dict[str, float] = field(default_factory=dict)  # per task, at the last evaluation
    best_value: float | None = None
    best_step: int | None = None
    last_loss: float | None = None
    last_dev_loss: float | None = None
    skipped_steps: int = 0
    micro_batch_size: int = 0  # what a rank runs at once now; less than the configured one after out_of_memory
    out_of_memory: list[dict[str, Any]] = field(
        default_factory=list
    )  # when the micro-batch had to shrink: train/oom.py
    order: str = ""  # which rows the data has and in which order: train/resume.py
    changes: list[dict[str, Any]] = field(
        default_factory=list
    )  # of the configuration, each at the step of a resume: train/resume.py

    def improves(self, value: float) -> bool:
        """Whether `value` (lower is better) is the best so far; it is kept if so."""
        if self.best_value is not None and value >= self.best_value:
            return False
        self.best_value, self.best_step = value, self.step
        return True

    def note(self) -> str:
        """The last losses, for the progress bar."""
        parts = [f"loss {self.last_loss:.4f}"] if self.last_loss is not None else []
        parts += [f"dev {self.last_dev_loss:.4f}"] if self.last_dev_loss is not None else []
        return "  ".join(parts)


def save(engine: Engine, run: Path, config: RunConfig, state: Progress, is_best: bool, keep: int) -> Path:
    """Commits a checkpoint of the current step and prunes old ones. Collective."""
    final = run / "checkpoints" / f"step-{state.step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    engine.save(temporary)
    barrier()
    if is_main():
        write_json(temporary / "trainer.json", asdict(state))
        write_config(temporary / "config.yaml", config)
        commit_directory(temporary, final)
        write_pointer(run / "checkpoints" / "last", final.name)
        if is_best:
            write_pointer(run / "checkpoints" / "best", final.name)
        _prune(run / "checkpoints", keep)
    barrier()
    return final


def committed(run: Path) -> list[Path]:
    """The checkpoints of a run that were committed, oldest first."""
    directories = (run / "checkpoints").glob("step-*")
    return sorted(d for d in directories if STEP.search(d.name) and (d / MANIFEST).is_file())


def find(wanted: str, run: Path) -> Path:
    """The checkpoint that `--resume` means: `last`, `best`, a checkpoint directory or a run directory. Verified, or an error."""
    return verified(locate(wanted, run))


def locate(wanted: str, run: Path) -> Path:
    """As `find`, but not verified yet."""
    if wanted in ("last", "best"):
        directory = read_pointer(run / "checkpoints" / wanted)
        if directory is None:
            raise RedHeartError(
                f"--resume: {run} has no {wanted} checkpoint: start it without --resume, or name the run with --out"
            )
    else:
        directory = Path(wanted)
        pointed = read_pointer(directory / "checkpoints" / "last")
        directory = pointed or directory
    return directory


def verified(directory: Path, only: Collection[str] | None = None) -> Path:
    """`directory`, if it is a whole checkpoint (of its files those of `only` are looked at); else an error that offers the one
    before it."""
    if not directory.is_dir():
        raise RedHeartError(f"checkpoint {directory} does not exist")
    try:
        verify_manifest(directory, only=only)
    except RedHeartError as error:
        others = [d for d in committed(directory.parent.parent) if d.name < directory.name]
        offer = f"; the one before it is {others[-1]}" if others else ""
        raise RedHeartError(f"{error}{offer}") from None
    return directory


def read_progress(directory: Path) -> Progress:
    path = directory / "trainer.json"
    return parse_progress(read_json(path, "choose another checkpoint"), path)


def parse_progress(values: Any, path: Path) -> Progress:
    """Progress from plain values; a key that is missing, unknown or of another type is an error that names it and `path`."""
    try:
        return TypeAdapter(Progress).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RedHeartError(
            f"{path}: {where}: {first['msg']}; it was written by another version: choose another one"
        ) from None


def _prune(checkpoints: Path, keep: int) -> None:
    """Keeps the newest `keep` and whatever the pointers name."""
    named = {read_pointer(checkpoints / p) for p in ("last", "best")}
    for old in committed(checkpoints.parent)[:-keep]:
        if old not in named:
            shutil.rmtree(old)
