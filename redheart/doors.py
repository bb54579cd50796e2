"""What the commands do, from Python and from notebooks: `prepare`, `train`, `evaluate`.

    import redheart
    run = redheart.train("texts.csv", "runs/mine", text="body", labels={"sorry": "regret"}, optimizer__learning_rate=3e-4)
    run.evaluate()
    run.pipeline().predict_frame(["I promised to call and forgot."])

Each may be called as often as one likes in one process, and leaves the process as it was (`leaving_no_trace`). Settings are the
configuration's keys (`redheart train --help-config`), with two underscores for every dot, or a dictionary of the dotted ones:
`settings={"optimizer.learning_rate": 3e-4}`. Messages and progress go to stderr, which notebooks show below the cell.
"""

from __future__ import annotations

import html
import json
import logging
import math
import os
import random
import re
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from redheart.config import config_keys, load_config
from redheart.console import quiet_start
from redheart.data.prepare import PrepareReport
from redheart.data.prepare import prepare as _prepare
from redheart.device import has_gpu, settle_allocator, variables_kept
from redheart.evaluation.curves import scalars
from redheart.evaluation.report import COLUMNS, Report, cells
from redheart.files import telling_no_room
from redheart.infer import RedHeartPipeline
from redheart.memory.budget import forget_peaks
from redheart.plain_yaml import setting
from redheart.schema import RedHeartError
from redheart.train.engine import free_memory
from redheart.train.engine.machinery import forget_machinery
from redheart.train.export import export
from redheart.train.own import settings as _settings
from redheart.train.start import TrainResult
from redheart.train.start import train as _train
from redheart.train.validate import validate

if TYPE_CHECKING:
    import pandas as pd

Path_ = str | os.PathLike[str]


class _Shown(ABC):
    """A table to look at: `_facts` name it, `_rows` fill it."""

    @abstractmethod
    def _facts(self) -> str: ...

    @abstractmethod
    def _rows(self) -> tuple[Sequence[str], list[Sequence[object]]]: ...

    def __repr__(self) -> str:
        columns, rows = self._rows()
        table = [tuple(columns), *(tuple(map(str, row)) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([self._facts(), *(lines if rows else ())])

    def _repr_html_(self) -> str:
        columns, rows = self._rows()
        line = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row) + "</tr>"  # noqa: E731
        table = f"<table>{line('th', columns)}{''.join(line('td', row) for row in rows)}</table>" if rows else ""
        return f"<p>{html.escape(self._facts()).replace(chr(10), '<br>')}</p>{table}"


@dataclass(frozen=True, repr=False)
class Prepared(_Shown):
    """A data directory, and what went into it. `train` takes it as it is."""

    path: Path
    report: PrepareReport

    def __fspath__(self) -> str:
        return str(self.path)

    def _facts(self) -> str:
        rows = ", ".join(f"{n} {split}" for split, n in self.report.rows.items())
        return f"Prepared({str(self.path)!r}): {rows}; {self.report.llm_answers} answers by the LLM"

    def _rows(self) -> tuple[Sequence[str], list[Sequence[object]]]:
        origins = list(dict.fromkeys(o for counts in self.report.labels.values() for o in counts))
        rows: list[Sequence[object]] = [
            [name, *(counts.get(o, 0) for o in origins)] for name, counts in self.report.labels.items()
        ]
        return ("label", *origins), rows


@dataclass(frozen=True, repr=False)
class Evaluated(_Shown):
    """Held-out metrics beside the baselines: one line for each answer and metric. `path`: where report.md was written."""

    report: Report
    path: Path | None

    def frame(self) -> pd.DataFrame:
        """The lines as a data frame: answer, labels by, texts, metric, Red Heart, linear, look-up, constant."""
        import pandas as pd

        lines = self.report.lines
        numbers = ((x.task, x.origin, x.count, x.metric, x.model, x.linear, x.look_up, x.constant) for x in lines)
        return pd.DataFrame(numbers, columns=list(COLUMNS))

    def _facts(self) -> str:
        where = f", report in {self.path}" if self.path else ""
        head = f"Evaluated: {self.report.split} split, {self.report.evaluation.rows} samples{where}"
        return "\n".join([head, *self.report.verdict.lines()])

    def _rows(self) -> tuple[Sequence[str], list[Sequence[object]]]:
        return COLUMNS, [cells(line) for line in self.report.lines]


@dataclass(frozen=True, repr=False)
class Run:
    """A run that has ended: `path` is its directory, `result` how it ended. Whatever takes a run directory takes it as it is."""

    path: Path
    result: TrainResult

    def __fspath__(self) -> str:
        return str(self.path)

    def dev_losses(self) -> dict[str, dict[int, float]]:
        """By answer, and of all under `total`, the dev loss by optimizer step; everything else that was logged is in TensorBoard."""
        found = {}
        for tag, values in scalars(self.path).items():
            parts = tag.split("/")
            if "dev_loss" in parts:  # of the groups of TensorBoard, which begin with a digit, none is an answer
                name = "/".join(part for part in parts if part != "dev_loss" and not part[0].isdigit())
                found[name or "total"] = values
        return found

    def pipeline(self, **options: Any) -> RedHeartPipeline:
        """The trained network behind its encoder; `options` as of RedHeartPipeline.from_pretrained."""
        return RedHeartPipeline.from_pretrained(self.path, **options)

    def evaluate(self, data: Path_ | None = None, **options: Any) -> Evaluated:
        return evaluate(self, data, **options)

    def resume(self, data: Path_ | None = None, **settings: Any) -> Run:
        """Goes on from the last checkpoint with the run's own settings, but for those named here."""
        return train(data, self, preset=None, resume="last", **settings)

    def export(self, out: Path_) -> Path:
        """Writes safetensors, config.json and a model card."""
        with naming_arguments(), telling_no_room("the export"):
            export(self.path, Path(out))
        return Path(out)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self.result.summary()}"


Records = Iterable[Mapping[str, Any]]


def prepare(
    source: str | Sequence[str] | Mapping[str, Path_ | pd.DataFrame | Records],
    out: Path_,
    *,
    preset: str = "local",
    samples: int | None = None,
    force_preprocess: bool = False,
    skip_invalid: bool = False,
    **settings: Any,
) -> Prepared:
    """Raw records -> shards, as `redheart prepare`; resumable, and done at once where the same was done before.

    `source`: `NAME=PATH` as on the command line, a list of them, or a dictionary whose values are files, directories of known
    corpora, data frames, lists of records or a `datasets.Dataset`. RedHeartError names the record that breaks the schema.

    >>> data = redheart.prepare("everyday", "data/first", samples=24, data__labeler__max_texts=0)
    >>> data.report.rows["train"] + data.report.rows["dev"] + data.report.rows["test"]
    24
    """
    with naming_arguments(), leaving_no_trace(), telling_no_room("preparing"), tempfile.TemporaryDirectory() as folder:
        config = load_config(preset, overrides(settings)).data
        names = [source] if isinstance(source, str) else list(_files(source, Path(folder)))
        return Prepared(Path(out), _prepare(names, Path(out), config, samples, force_preprocess, skip_invalid))


def train(
    data: Path_ | None,
    out: Path_,
    preset: str | None = None,
    *,
    text: str | None = None,
    labels: Mapping[str, str] | None = None,
    resume: str | None = None,
    init: Path_ | None = None,
    overwrite: bool = False,
    update_parameters: bool = True,
    **settings: Any,
) -> Run:
    """Trains and leaves everything under `out`, as `redheart train`; also in a script under `accelerate launch` or `deepspeed`, where
    every process calls it. Interrupting it ends the run with a checkpoint.

    `data`: a prepared directory, its URL, or a table of one's own, of which `text` names the column of texts and `labels` says which
    column is which answer: {"sorry": "regret", "happy": "emotion.joy"}. `preset`: a name or a YAML file [default: local].

    >>> run = redheart.train(data, "runs/first", memory__strategy="plain", training__max_steps=2)
    >>> run.result.state.step, run.pipeline()("I promised to call and forgot.").keys() >= {"regret"}
    (2, True)
    """
    with naming_arguments(), leaving_no_trace():
        given, answers = _place(data), [f"{c}={a}" for c, a in (labels or {}).items()]
        call = _settings(None, preset, overrides(settings), Path(out), resume, given, text, answers)
        start = Path(init) if init is not None else None
        result = _train(call.config, call.data, call.run, resume, overwrite, update_parameters, start)
        return Run(call.run, result)


def evaluate(
    checkpoint: Path_,
    data: Path_ | None = None,
    *,
    split: str = "test",
    report: Path_ | None = None,
    device: str = "cpu",
    swap: Collection[str] | None = None,
    untrained: bool = False,
) -> Evaluated:
    """Held-out metrics of an export, a checkpoint or a run beside a constant and linear models, as `redheart evaluate`.

    >>> redheart.evaluate("runs/first").frame().columns[0]
    'answer'
    """
    with naming_arguments(), leaving_no_trace(), telling_no_room("the report"):
        where = Path(report) if report is not None else None
        return Evaluated(*validate(Path(checkpoint), _place(data), split, where, device, swap, untrained))


def _place(data: Path_ | None) -> str | None:
    """`data` as on the command line."""
    if data is None or isinstance(data, str | os.PathLike):
        return None if data is None else os.fspath(data)
    raise RedHeartError(
        f"data is a {type(data).__name__}, and what is wanted is a path, or what `redheart.prepare` gives: "
        'redheart.prepare({"own": data}, "data/own")'
    )


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """`a.b=c` for every setting: of keys with `__` for `.`, of sections as dictionaries, and of the dictionary `settings`."""
    return [f"{key}={setting(value)}" for key, value in _dotted(settings, "")]


def _dotted(settings: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    leaves = config_keys()
    for name, value in settings.items():
        if not path and name == "settings":
            yield from _dotted(value, "")
            continue
        key = path + name.replace("__", ".")
        if isinstance(value, Mapping) and key not in leaves:
            yield from _dotted(value, f"{key}.")
        else:
            yield key, value


def _files(source: Any, folder: Path) -> Iterator[str]:
    """NAME=PATH of each source; what is no path is written to a file in `folder`."""
    if not isinstance(source, Mapping):
        names = list(source) if isinstance(source, list | tuple) else [source]
        if not all(isinstance(name, str) for name in names):
            raise RedHeartError(f'source is a {type(source).__name__}: give it a name, such as {{"own": source}}')
        yield from names
        return
    for number, (name, value) in enumerate(source.items()):
        if not isinstance(name, str) or not name or {"=", "\0"} & set(name):
            raise RedHeartError(f"source {name!r}: the name of a source is a text that is not empty, without '='")
        if isinstance(value, str | os.PathLike):
            yield f"{name}={os.fspath(value)}"
            continue
        try:
            lines = [json.dumps(row, ensure_ascii=False) for row in map(_plain, _records(name, value))]
        except (TypeError, ValueError) as error:  # what JSON has no word for, or no number
            raise RedHeartError(
                f"source {name}: {error}: give a data frame, or records of numbers, strings, lists and dictionaries"
            ) from None
        # a folder for each: a/x and b/x are two sources; the file is named in messages
        path = folder / str(number) / f"{Path(name).name[:60]}.jsonl"
        path.parent.mkdir()
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogatepass")
        yield f"{name}={path}"


def _records(name: str, rows: Any) -> Iterable[Any]:
    """The rows of a data frame, of a `datasets.Dataset`, or of a list of records; of a frame, what JSON has no word for as text."""
    import pandas as pd

    if isinstance(rows, Mapping):
        some = ", ".join(map(str, rows))[:80]
        raise RedHeartError(
            f"source {name} is a {type(rows).__name__} of {some}: give one of them, or a list of records"
        )
    if not isinstance(rows, pd.DataFrame):
        return list(rows)
    if not rows.columns.is_unique:
        twice = rows.columns[rows.columns.duplicated()][0]
        raise RedHeartError(f"source {name}: two columns have the name {twice!r}: rename one")
    known = rows.astype(object).where(rows.notna(), None).to_dict("records")
    return json.loads(json.dumps(_plain(known), default=str))


def _plain(value: Any) -> Any:
    """`value` for JSON: NaN, which is how frames write that nothing is there, as null. An infinity stays, and is refused as in a file."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Decimal):
        return _plain(float(value))
    return None if isinstance(value, float) and math.isnan(value) else value


ARGUMENTS = {  # what options of the command line, which errors name, are here
    **{f"--{name}": f"{name}=" for name in ("data", "out", "preset", "text", "init", "samples", "split", "report")},
    **{"--resume": 'resume="last"', "--overwrite": "overwrite=True", "--force-preprocess": "force_preprocess=True"},
    **{"--skip-invalid": "skip_invalid=True", "--label": "labels={COLUMN: ANSWER}", "--set": "A__B=C for A.B=C"},
}


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Errors that name options, but for those of a command to be pasted, say what they are in Python too."""
    try:
        yield
    except RedHeartError as error:
        options = dict.fromkeys(re.findall(r"(?<!\S)--[a-z-]+", re.sub(r"`[^`]*`|\(redheart [^)]*\)", "", str(error))))
        if told := ", ".join(f"{option} is {ARGUMENTS[option]}" for option in options if option in ARGUMENTS):
            error.args = (f"{error} (in Python {told})",)
        raise


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Gives back to the process what a run changes in it: variables, generators' states, root logger, warnings' filters, the
    progress bars of Transformers, the GPU allocator's bound; ends its process group, unless the caller had one.

    What glibc was told of freed memory stays (memory/malloc.py), and so do loaded libraries and kernels.
    """
    had_group = dist.is_available() and dist.is_initialized()
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (the global generator)
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    root, bars = logging.getLogger(), transformers_logging.is_progress_bar_enabled()
    handlers, level = list(root.handlers), root.level
    libraries = logging.getLogger("bitsandbytes")
    said = libraries.level
    forget_peaks()
    try:
        with variables_kept(), warnings.catch_warnings():
            quiet_start()
            settle_allocator()
            yield
    finally:
        if not had_group:
            forget_machinery()
        free_memory()
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        torch.set_rng_state(drawn[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)
        if has_gpu() and torch.cuda.is_initialized():
            torch.cuda.set_per_process_memory_fraction(1.0)
        root.handlers[:] = handlers
        root.setLevel(level)
        libraries.setLevel(said)
        if bars:
            transformers_logging.enable_progress_bar()
