"""What a report tells of a run beside its answers: time, speed and memory, the data with their licences, the commands that repeat it."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redheart.data.card import rows_written
from redheart.evaluation.curves import OVERVIEW, RATE, scalars
from redheart.evaluation.page import Section
from redheart.files import read_json
from redheart.train.claim import RESULT
from redheart.train.progress import Progress


def how_it_ran(run: Path | None) -> list[Section]:
    """Time, speed and memory of a run's last launch; nothing where an earlier version made it, or where it never came to its end."""
    if run is None or not (run / RESULT).is_file():
        return []
    told = read_json(run / RESULT, "remove it to go without what it says")
    steps, seconds = told["steps"] - told["from_step"], told["seconds"]
    rows = [
        ("time", f"{seconds:.0f} s for {steps} optimizer steps of the last launch, with looks at dev and checkpoints")
    ]
    found = scalars(run, OVERVIEW)
    if rates := found.get(RATE):
        rows.append(("speed", f"{statistics.median(rates.values()):.1f} samples/s (median, training alone)"))
    if held := found.get(f"{OVERVIEW}/host_rss_gib"):
        rows.append(("memory of the host", f"{max(held.values()):.2f} GiB resident at most, of this process"))
    for where, gib in told["memory"].items():
        planned = f"{gib['observed_gib']:.2f} GiB taken at the peak, {gib['predicted_gib']:.2f} planned"
        rows.append((f"planned, {where}", planned))
    if told["skipped_steps"]:
        rows.append(("skipped", f"{told['skipped_steps']} steps, for gradients that were not finite"))
    return [Section("How it ran", columns=("", ""), rows=rows)]


def data_and_commands(
    run: Path | None, checkpoint: Path, data: str | Path, split: str, index: Mapping[str, Any], progress: Progress
) -> list[Section]:
    """The sources with their licences, and what to type to get the same again."""
    rows = [
        (name, f"{rows_written(facts):,}", facts["licence"], "no" if facts["non_commercial"] else "yes")
        for name, facts in index["sources"].items()
    ]
    commands = []
    if run is not None:
        settings = ["--preset", str(run / "config.yaml"), "--data", progress.data, "--out", f"{run}-again"]
        began = {"--resume": progress.branch_of} if progress.branch_of else {"--init": progress.init}
        settings += [word for option, path in began.items() if path for word in (option, path)]
        commands.append(["redheart", "train", *settings])
    commands.append(["redheart", "evaluate", "--checkpoint", str(checkpoint), "--data", str(data), "--split", split])
    commands.append(["redheart", "predict", "--checkpoint", str(checkpoint), "A text of yours."])
    return [
        Section("Data", columns=("source", "rows", "licence", "commercial use"), rows=rows),
        Section("The same again", commands=[shlex.join(words) for words in commands]),
    ]
