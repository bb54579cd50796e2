"""Checkpoints that are whole or absent (DESIGN §8): RUN/checkpoints/step-00000040/ with a manifest, `last` and `best` pointers.

A directory holds the engine's shards, trainer.json (step, dev losses, world size) and config.yaml. All ranks write into
step-….tmp; the main one then writes the manifest, flushes, renames and settles. Which checkpoint is the last and which the
best is read from the checkpoints themselves, never from the pointers, which are for people and other tools: a kill between
any two operations changes neither answer, and what it left lying is cleared away at the next start.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from redheart.config import RunConfig, write_config
from redheart.console import console
from redheart.files import (
    MANIFEST,
    commit_directory,
    read_json,
    read_pointer,
    read_sealed_json,
    remove,
    verify_manifest,
    write_json,
    write_pointer,
)
from redheart.ranks import any_rank, failing_together, is_main
from redheart.schema import RedHeartError
from redheart.train.engine import Engine
from redheart.train.progress import Progress, parse_progress

STEP = re.compile(r"step-(\d{8})(\.old)?")  # .old: set aside while another took its name
# what is on its way in or out: of this version, and of earlier ones
LEFT = re.compile(
    r"step-\d{8}\.(tmp|removed|universal)|\.step-\d{8}\.redheart-universal|(last|best)\.tmp|\..+\.redheart-[0-9a-f]{8}\.tmp"
)
LEFT_BESIDE = re.compile(
    r"\.redheart-shared-[0-9a-f]{32}\.tmp"
    r"|\.(\.redheart\.json|config\.yaml|ds_config\.json|report\.md|(samples|non_finite|finished).*)\.redheart-[0-9a-f]{8}\.tmp"
)
REBUILD = "rebuild.tmp"  # train/oom.py
TRAINER = "trainer.json"


def save(engine: Engine, run: Path, config: RunConfig, state: Progress, keep: int) -> Path:
    """Commits a checkpoint of the current step, drops what it makes obsolete. Collective; what fails on one rank fails on all."""
    temporary, commit = begin(run, config, state, keep)
    with failing_together():
        engine.save(temporary)
    with failing_together():
        if is_main():
            commit()
    return temporary.with_suffix("")


def begin(run: Path, config: RunConfig, state: Progress, keep: int) -> tuple[Path, Callable[[], None]]:
    """Where all ranks write their parts of a checkpoint of `state` as it is now, and what then commits it: for the main process, and
    for any thread. Collective."""
    final, said = run / "checkpoints" / f"step-{state.step:08d}", asdict(state)
    temporary = final.with_suffix(".tmp")

    def commit() -> None:
        write_json(temporary / TRAINER, said)
        write_config(temporary / "config.yaml", config)
        commit_directory(temporary, final, final.with_name(final.name + ".old"))
        _settle(run, keep, config)

    with failing_together():
        if is_main():
            remove(temporary)
            temporary.mkdir(parents=True)
    return temporary, commit


def size_of(directory: Path) -> int:
    """Bytes of a committed checkpoint, as its manifest says."""
    files = read_sealed_json(directory / MANIFEST, "choose another checkpoint")["files"]
    return sum(entry["bytes"] for entry in files.values())


class _Lineage(NamedTuple):
    """Where a checkpoint stands in its run; tuples are in the order in which checkpoints were made."""

    branch: int
    step: int
    branched_at: int
    value: float | None = None  # its dev value, where that was looked at


def committed(run: Path) -> list[Path]:
    """The checkpoints of a run, in the order in which they were made, without those of a branch that the newest one left."""
    found = _lineages(run)
    if not found:
        return []
    newest = max(found.values())
    kept = [d for d, one in found.items() if one.branch == newest.branch or one.step <= newest.branched_at]
    return sorted(kept, key=lambda d: found[d])


def _lineages(run: Path) -> dict[Path, _Lineage]:
    """Of every checkpoint that was committed; one whose trainer.json is damaged stands where its name says."""
    by_step: dict[int, Path] = {}
    for directory in sorted((run / "checkpoints").glob("step-*")):  # step-….old comes after step-…
        if (name := STEP.fullmatch(directory.name)) and (directory / MANIFEST).is_file():
            by_step.setdefault(int(name[1]), directory)
    found = {}
    for step, directory in by_step.items():
        try:
            verify_manifest(directory, only=[TRAINER])
            said = read_progress(directory)
            value = said.value if said.value_step == step else None
            found[directory] = _Lineage(said.branch, step, said.branched_at, value)
        except RedHeartError:
            found[directory] = _Lineage(0, step, 0)
    return found


def last(run: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return next(reversed(committed(run)), None)


def best(run: Path) -> Path | None:
    """The checkpoint that is best on dev (training.best_metric), as the newest one says; None where no look at dev gave a finite
    value, or it is gone.

    Raises RedHeartError where the newest one is damaged and cannot say.
    """
    newest = last(run)
    if newest is None:
        return None
    said = read_progress(verified(newest, [TRAINER]))
    if said.best_step is None or said.best_value is None or not math.isfinite(said.best_value):
        return None
    return next((d for d in committed(run) if _step(d) == said.best_step), None)


def before(run: Path, state: Progress, step: int) -> Path | None:
    """The newest checkpoint of `step` or earlier on the branch of `state`; where none is so early its oldest, and None without any."""
    own = _own(run, state)
    early = [d for d in own if _step(d) <= step]
    return max(early, key=_step) if early else min(own, key=_step, default=None)


def _own(run: Path, state: Progress) -> list[Path]:
    """The checkpoints on the branch of `state`."""
    return [d for d, one in _lineages(run).items() if one.branch == state.branch or one.step <= state.branched_at]


def forget_lost_best(state: Progress, run: Path, quiet: bool = False) -> None:
    """Where the best checkpoint so far is not in `run`, the search for it starts anew: else nothing worse could be kept in its stead.
    Collective: the first rank looks, and all do the same."""
    if state.best_step is None:
        return
    if not any_rank(is_main() and state.best_step not in map(_step, _own(run, state))):
        return
    if not quiet:
        console.print(
            f"the best checkpoint so far, of step {state.best_step}, is not in {run}: the search for it starts anew"
        )
    state.best_value, state.best_step, state.looks_since_best = None, None, 0


def _step(directory: Path) -> int:
    name = STEP.fullmatch(directory.name)
    assert name is not None
    return int(name[1])


def holds(run: Path, step: int) -> bool:
    """Whether `run` has a checkpoint of this step."""
    return step in map(_step, committed(run))


def find(wanted: str, run: Path) -> Path:
    """The checkpoint that `--resume` means: `last`, `best`, a checkpoint directory or a run directory. Verified, or an error."""
    return verified(locate(wanted, run))


def locate(wanted: str, run: Path) -> Path:
    """As `find`, but not verified yet."""
    if wanted in ("last", "best"):
        directory = last(run) if wanted == "last" else best(run)
        if directory is None:
            raise RedHeartError(
                f"--resume: {run} has no {wanted} checkpoint: begin without --resume (again: --overwrite), or name the run with --out"
            )
    else:
        directory = Path(wanted)
        directory = last(directory) or directory
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


def go_on(state: Progress, source: Path, run: Path, quiet: bool = False) -> None:
    """Makes `state`, read from `source`, that of a run that goes on from there in `run`; `quiet`: one that will save nothing."""
    lineages, newest = _lineages(run), last(run)
    if newest is not None and source.resolve().parent != newest.resolve().parent:
        raise RedHeartError(
            f"{run} has checkpoints of its own and {source} is not among them: name a new --out to go on from it"
        )
    if newest is not None and source.resolve() != newest.resolve():
        state.branch, state.branched_at = max(lineages.values()).branch + 1, state.step
        left = ", ".join(d.name for d in committed(run) if _step(d) > state.step)
        if not quiet:
            console.print(f"going back to step {state.step}: {left} will be removed once a new checkpoint is there")
    if state.best_value is not None and not math.isfinite(state.best_value):  # earlier versions took NaN for the best
        state.best_value = state.best_step = None
    forget_lost_best(state, run, quiet)
    if newest is None:  # in a new directory
        state.looks_since_best, state.branch_of = 0, str(source.resolve())


def clear(run: Path, config: RunConfig | None = None) -> None:
    """Removes what a run that died left half-done, with `config` also what its last save had still to remove, and brings the pointers
    up to date; says so. For the process that holds `run`."""
    found = run / "checkpoints"
    left = [p for p in found.iterdir() if LEFT.fullmatch(p.name)] if found.is_dir() else []
    left += [p for p in run.iterdir() if LEFT_BESIDE.fullmatch(p.name)]
    left += [run / REBUILD] if (run / REBUILD).exists() else []
    for path in left:
        remove(path)
    names = [path.name for path in left]
    for aside in found.glob("step-*.old"):
        if (final := aside.with_suffix("")).exists():
            remove(aside)
            names.append(aside.name)
        else:
            os.rename(aside, final)
            console.print(f"{final} has its name again, which an earlier end had taken from it", markup=False)
    if names:
        console.print(f"removed what an earlier end left unfinished: {', '.join(sorted(names))}", markup=False)
    for line in _settle(run, config.checkpoint.keep_last if config else None, config):
        console.print(line, markup=False)


def _staying(standing: list[Path], keep: int, config: RunConfig) -> set[Path]:
    """Which of the checkpoints, in the order in which they were made, `config` keeps beside `best`: the newest `keep`, others of good
    dev value, those of round steps, and one that a rewind of the next spike can go back to."""
    stays, found = set(standing[-keep:]), _lineages(standing[0].parent.parent)
    wanted, guard = config.checkpoint, config.guard
    values = [(value, d) for d in standing if (value := found[d].value) is not None]
    stays |= {d for _, d in sorted(values)[: wanted.keep_best]}
    stays |= {d for d in standing if wanted.keep_every and _step(d) % wanted.keep_every == 0}
    if guard.on_spike == "rewind":
        far = [d for d in standing if _step(d) <= _step(standing[-1]) - guard.skip_steps + 1]
        stays |= set(far[-1:] or standing[:1])
    return stays


def _settle(run: Path, keep: int | None, config: RunConfig | None = None) -> list[str]:
    """Brings `last` and `best` up to date, then removes the checkpoints of abandoned branches and, with `keep`, those that
    `config` does not keep; what it changed. In this order a pointer never names what is gone."""
    standing, newest = committed(run), last(run)
    if newest is None:
        return []
    changed = []
    try:
        kept = {"last": newest, "best": best(run)}
    except RedHeartError as error:  # the newest is damaged: it is refused when it is read
        return [str(error)]
    for name, directory in kept.items():
        path = run / "checkpoints" / name
        if directory is None and path.exists():
            changed.append(f"{path} named no checkpoint with a finite dev loss: removed")
            path.unlink()
        elif directory is not None and read_pointer(path) != directory:
            changed.append(f"{path} names {directory.name} again")
            write_pointer(path, directory.name)
    obsolete = [d for d in _lineages(run) if d not in standing]
    if keep and config:
        stays = _staying(standing, keep, config) | {d for d in kept.values() if d}
        obsolete += [d for d in standing if d not in stays]
    for directory in obsolete:
        removed = directory.with_name(directory.name + ".removed")
        remove(removed)
        os.rename(directory, removed)  # whole, or out of sight
        remove(removed)
    left = [d.name for d in obsolete if d not in standing]
    return [*changed, *(f"{name} was of a branch that the run has left: removed" for name in left)]


def read_progress(directory: Path) -> Progress:
    path = directory / TRAINER
    return parse_progress(read_json(path, "choose another checkpoint"), path)
