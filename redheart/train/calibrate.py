"""Fits a checkpoint's calibration on dev and keeps it beside the weights: at the end of `train`, and for `redheart calibrate`.

A checkpoint's directory was committed by its manifest before; the calibration comes later, is sealed by itself and goes where
its checkpoint goes. In an export the manifest lists it.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from redheart.console import console
from redheart.data.stream import SampleStream
from redheart.device import compute_device, device_of
from redheart.evaluation.calibration import (
    CALIBRATION,
    Calibration,
    dev_digest,
    fit,
    score_split,
    weights_digest,
    write,
)
from redheart.evaluation.trained import trained_entries, untrained_names
from redheart.files import MANIFEST, list_in_manifest, remove, unfinished_of
from redheart.memory.swap import place
from redheart.owned import exclusive
from redheart.schema import RedHeartError
from redheart.train import checkpoint
from redheart.train.claim import is_run
from redheart.train.export import AGAIN, Trained, load_weights, resolve
from redheart.train.progress import Progress
from redheart.train.resume import check_judged


class Calibrated(NamedTuple):
    """`path`: where it was written. `untrained`: answers, and entries of answers, that no label trained."""

    path: Path
    calibration: Calibration
    untrained: Collection[str] = ()

    def to_json(self) -> dict[str, Any]:
        made = self.calibration
        return {"path": str(self.path), "as_is": made.left_as_is(), **made.model_dump(mode="json")}

    def summary(self) -> str:
        silent = set(self.untrained)
        left = {n: why for n, why in self.calibration.left_as_is().items() if not {n, n.split(".")[0]} & silent}
        names = {why: ", ".join(n for n, other in left.items() if other == why) for why in left.values()}
        as_is = "; ".join(f"{those} ({why})" for why, those in names.items())
        return f"calibrated {self.path.parent} on {self.calibration.dev_rows} dev rows" + (
            f"; as they are: {as_is}" if left else ""
        )


def calibrate(path: Path, data: str | None = None, device: str = "cpu") -> Calibrated:
    """Calibrates an export, a checkpoint or a run's best checkpoint on the dev split of `data` (what it was trained on, where absent).

    Replaces an earlier calibration. Raises RedHeartError where a run is still training there.
    """
    device_of(device)
    directory = resolve(path)
    with ExitStack() as held:
        if directory.parent.name == "checkpoints" and is_run(run := directory.parent.parent):
            held.enter_context(exclusive(run, "at work"))
        loaded = load_weights(directory)
        progress = loaded.progress
        dev = SampleStream(data or progress.data, "dev", loaded.config.data.remote)
        if not dev.num_rows:
            raise RedHeartError(f"{data or progress.data} has no dev rows to calibrate on: name other data with --data")
        check_judged(progress, dev.index, data)
        return _calibrate(directory, loaded, dev, device, 32)


def calibrate_best(run: Path, dev: SampleStream, state: Progress) -> Path | None:
    """The same of the best checkpoint of a run that has just ended, by the process that holds it; where it was written.

    No collective: the other ranks are gone by then, whatever time it takes. None, and said, where there is nothing to fit it to.
    """
    directory = checkpoint.best(run) if dev.num_rows else None
    if directory is None:
        why = "no checkpoint has a finite dev loss" if dev.num_rows else "the data has no dev rows"
        console.print(f"{why}: answers stay as the network gives them, without thresholds")
        return None
    loaded = load_weights(checkpoint.verified(directory))
    made = _calibrate(directory, loaded, dev, compute_device(), state.micro_batch_size)
    console.print(made.summary(), markup=False)
    return made.path


def _calibrate(
    directory: Path, loaded: Trained, dev: SampleStream, device: torch.device | str, batch_size: int
) -> Calibrated:
    console.print(f"calibrating {directory.name} on {dev.num_rows} dev rows …", markup=False)
    digest = weights_digest(loaded.model)
    place(loaded.model, device, loaded.config.memory.swap)
    answers = fit(score_split(loaded.model, dev, device, batch_size))
    step, rows = loaded.progress.step, dev.num_rows
    made = Calibration(weights=digest, step=step, dev=dev_digest(dev), dev_rows=rows, answers=answers)
    for left in unfinished_of(directory / CALIBRATION):
        remove(left)
    is_export = (directory / "config.json").is_file() and (directory / MANIFEST).is_file()
    if is_export:
        list_in_manifest(directory, CALIBRATION, False, AGAIN)  # so that a kill between the two leaves a whole export
    path = write(made, directory)
    if is_export:
        list_in_manifest(directory, CALIBRATION, True, AGAIN)
    labels = loaded.progress.labels
    untrained = untrained_names(trained_entries(labels, loaded.config.loss)) if labels else []
    return Calibrated(path, made, untrained)
