"""The rows that a report, and training's looks at dev, are made of: with labels of trained entries alone; and a run's own where the data
to be judged have none.

An entry that nothing taught is no answer (trained.py), and a figure over it would judge none. So its labels count as missing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from redheart.config import RemoteConfig
from redheart.data.stream import SampleStream
from redheart.evaluation.calibration import dev_digest
from redheart.evaluation.trained import Entries, label_weights
from redheart.schema import Batch, RedHeartError


class Rows(SampleStream):
    """A split whose labels are those of `trained` entries alone; all of them where that is None."""

    def __init__(
        self,
        location: str | Path,
        split: str,
        remote: RemoteConfig | None,
        trained: Entries | None,
        few_shapes: bool = False,
    ):
        super().__init__(location, split, remote, few_shapes)
        self._trained = trained or {}

    def batch(self, numbers: np.ndarray, keys: np.ndarray) -> Batch:
        made = super().batch(numbers, keys)
        kept = {name: made.weights[name] * torch.tensor(entries) for name, entries in self._trained.items()}
        return replace(made, weights=made.weights | kept)

    def rows(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        made = super().rows(numbers)
        for row in made:
            for name, entries in self._trained.items():
                if isinstance(values := row[name], list):
                    row[name] = [v if yes else None for v, yes in zip(values, entries, strict=True)]
                elif not all(entries):
                    row[name] = None
        return made

    def has_others(self, label: str) -> bool:
        """Whether the split has labels of an entry that is not among them."""
        weights = label_weights(self.index["splits"][self.split]["histograms"])[label]
        trained = self._trained.get(label, (True,) * len(weights))
        return any(w > 0 and not yes for w, yes in zip(weights, trained, strict=True))


class Beside(NamedTuple):
    """What a split is judged beside: rows that baselines are fitted on, None where there are none; dev rows, which choose thresholds;
    whether these are the run's own; and, a line each, what stands in or is missing."""

    train: Rows | None
    dev: Rows
    own_dev: bool
    notes: list[str]


def beside(held_out: Rows, data: str | Path, own: str, remote: RemoteConfig | None, trained: Entries | None) -> Beside:
    """The train and dev rows of `data`, where `held_out` lies; where it has none those of the run's `own` data, of the same encoder."""
    train, dev = (Rows(data, split, remote, trained) for split in ("train", "dev"))
    if str(data) == own:
        return Beside(train if train.num_rows else None, dev, True, [])
    own_train, own_dev = (_own(own, split, held_out, remote, trained) for split in ("train", "dev"))
    notes = []
    for rows, theirs, with_, without in (
        (train, own_train, "baselines are fitted on", "there are no baselines"),
        (dev, own_dev, "thresholds are chosen on", "no threshold is chosen"),
    ):
        if not rows.num_rows:
            what = f"{with_} the run's own, {own}" if theirs else f"{without}, for the run's own, {own}, does not fit"
            notes.append(f"{data} has no rows in split {rows.split}: {what}.")
    chosen = dev if dev.num_rows or own_dev is None else own_dev
    same = own_dev is not None and dev_digest(chosen) == dev_digest(own_dev)
    return Beside(train if train.num_rows else own_train, chosen, same, notes)


def _own(own: str, split: str, held_out: Rows, remote: RemoteConfig | None, trained: Entries | None) -> Rows | None:
    """The run's own rows, where they are still there."""
    try:
        found = Rows(own, split, remote, trained)
    except RedHeartError:
        return None
    return found if found.num_rows and found.encoder == held_out.encoder else None
