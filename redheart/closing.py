"""How `redheart train` on one's own table ends: the report of what was held out, and what the network says of one of its texts."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from redheart.console import console, show_answers
from redheart.data.stream import SampleStream
from redheart.infer import RedHeartPipeline
from redheart.ranks import launched_world_size
from redheart.schema import SPLITS
from redheart.train.export import load_model, resolve
from redheart.train.validate import validate


def close(run: Path, aside: bool = False) -> None:
    """Writes the report of a run that has come to its end, and shows its verdict and one text's answers (`aside`: on stderr)."""
    named = shlex.quote(str(run))
    if launched_world_size() > 1:
        console.print(f"judge it with: redheart evaluate --checkpoint {named}")  # the other processes are gone
        return
    data = load_model(resolve(run)).progress.data
    streams = {split: SampleStream(data, split) for split in SPLITS}
    held_out = next((split for split in ("test", "dev") if streams[split].num_rows), None)
    if held_out is None:
        console.print(
            "no row was held out, so that nothing is known of how well it reads other texts: label more of them"
        )
    else:
        report, path = validate(run, None, held_out, None)
        console.print("\n".join([*report.verdict.lines(), f"report: {path}"]))
    text = streams[held_out or "train"].rows(np.arange(1))[0]["text"]
    show_answers(text, RedHeartPipeline.from_pretrained(run)(text), aside=aside)
    console.print(f'ask it with: redheart predict --checkpoint {named} "…"')
