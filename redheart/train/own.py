"""One's own table as the data of a run: `redheart train --data texts.csv --text body --label sorry=regret --label happy=emotion.joy`.

The options become `data.file` and `data.columns.own`, so that the run's own config.yaml, or a file of `redheart init`, says the same.
What is prepared of the table stands in RUN/data and is used again as long as the table and the settings are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redheart.config import RunConfig
from redheart.console import console
from redheart.data.encode import wait_for
from redheart.data.own import SOURCE, check_answers, meant
from redheart.data.prepare import prepare
from redheart.data.shards import INDEX, Histograms
from redheart.data.store import Store
from redheart.schema import LABELS
from redheart.train import resume as runs
from redheart.train.resume import OWN_DATA, Call


def settings(
    file: str | None,
    preset: str | None,
    overrides: Sequence[str],
    out: Path | None,
    resume: str | None,
    data: str | None = None,
    text: str | None = None,
    labels: Sequence[str] = (),
) -> Call:
    """What the arguments of `redheart train` mean together; see resume.settings."""
    preset, overrides, data = meant(file, preset, overrides, data, text, labels)
    call = runs.settings(preset, overrides, out, resume, data)
    check_answers(call.config, call.data)
    return call


def prepared(config: RunConfig, run: Path, resuming: bool) -> Path:
    """The directory of what is prepared of `config.data.file`; made where it is not there yet. Every rank calls it."""
    assert config.data.file is not None
    prepare([f"{SOURCE}={config.data.file}"], run / OWN_DATA, config.data, renew=not resuming)
    wait_for([run / OWN_DATA / INDEX])  # ranks but the first are done earlier
    if constant := _constant(Store(run / OWN_DATA).index["splits"]["train"]["histograms"]):
        console.print(f"every training row says the same of {', '.join(constant)}: nothing can be learned from that")
    return run / OWN_DATA


def _constant(histograms: Histograms) -> list[str]:
    """The labelled entries that have one value in every row."""
    entries = ((LABELS[label], label, n, pairs) for label, rows in histograms.items() for n, pairs in enumerate(rows))
    return [
        name if label.scalar else f"{name}.{label.names[n]}" for label, name, n, pairs in entries if len(pairs) == 1
    ]
