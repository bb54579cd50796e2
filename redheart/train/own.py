"""One's own table as the data of a run: `redheart train --data texts.csv --text body --label sorry=regret --label happy=emotion.joy`.

The options become `data.file` and `data.columns.own`, so that the run's own config.yaml, or a file of `redheart init`, says the same.
What is prepared of the table stands in RUN/data and is used again as long as the table and the settings are the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from redheart.config import RunConfig
from redheart.console import console, unheard
from redheart.data.gather import digest_of, gather
from redheart.data.own import SOURCE, check_answers, meant
from redheart.data.prepare import prepare
from redheart.data.shards import Histograms
from redheart.data.store import Store
from redheart.schema import LABELS, RedHeartError
from redheart.tasks import TASKS
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
    named = preset is not None or any(text.startswith("data.file=") for text in overrides)
    if resume is not None and named and call.config.data.file and call.data is not None:
        _check_unchanged(Path(call.config.data.file), call)
    return call


def _check_unchanged(table: Path, call: Call) -> None:
    """Raises RedHeartError where a table that is named on a resume has other rows than what was prepared of it."""
    read = Store(call.data or "").index.get("read")
    if read is None or not table.is_file():
        return  # prepared by an earlier version, or the run goes on without its table
    with unheard():
        now = digest_of(gather([f"{SOURCE}={table}"], call.config.data, skip_invalid=False).records)
    if now != read:
        raise RedHeartError(
            f"{table} has changed since {call.data} was prepared of it: to go on with the rows of then, leave it out (redheart train --out "
            f"{shlex.quote(str(call.run))} --resume); to train on those of now, start another --out (--init takes the weights along)"
        )


def prepared(config: RunConfig, run: Path, resuming: bool) -> Path:
    """The directory of what is prepared of `config.data.file`; made where it is not there yet. Every rank calls it."""
    assert config.data.file is not None
    prepare([f"{SOURCE}={config.data.file}"], run / OWN_DATA, config.data, renew=not resuming, wait=True)
    if constant := _constant(Store(run / OWN_DATA).index["splits"]["train"]["histograms"]):
        console.print(f"every training row says the same of {', '.join(constant)}: nothing can be learned from that")
    return run / OWN_DATA


def _constant(histograms: Histograms) -> list[str]:
    """The labelled entries that have one value in every row; not of pairs, which are read either way round."""
    found = {label: rows for label, rows in histograms.items() if TASKS[label].kind != "binary"}
    entries = ((LABELS[label], label, n, pairs) for label, rows in found.items() for n, pairs in enumerate(rows))
    return [
        name if label.scalar else f"{name}.{label.names[n]}" for label, name, n, pairs in entries if len(pairs) == 1
    ]
