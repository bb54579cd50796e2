"""What people see: messages, tables and progress bars on stderr, from the first process only, and results on stdout.

stdout is kept for results, so that `--json` output can be piped. Whatever is printed is shown as it is written: Rich's markup and
`:emoji:` codes are off, and what the terminal would obey or cannot show becomes an escape such as \\x1b or \\uc815.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from redheart.ranks import launched_rank


def literal(text: str, encoding: str = "utf-8") -> str:
    """`text` without anything a terminal obeys: control characters but newline and tab, and what `encoding` lacks, as escapes."""
    safe = (
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
    return "".join(safe).encode(encoding, "backslashreplace").decode(encoding)


class LiteralConsole(Console):
    """A console on which no string is markup, whatever user's text, path or label stands in it. It never raises over an encoding."""

    def __init__(self, quiet: bool = False, stderr: bool = False):
        super().__init__(
            stderr=stderr, quiet=quiet, highlight=False, soft_wrap=stderr, markup=False, emoji=False,
            force_jupyter=False,  # rich's own display needs widgets there, and shows nothing without them
        )  # fmt: skip

    def render_str(self, text: str, **settings: Any) -> Text:  # type: ignore[override]
        return super().render_str(literal(text, self.encoding), **settings)

    def __exit__(self, *error: Any) -> None:  # behind every output, where it is written
        try:
            super().__exit__(*error)
        except OSError:  # a file on a full disk, a terminal that is gone
            if not self.stderr:
                raise
            self._go_unheard()

    def on_broken_pipe(self) -> None:
        """Whoever read has gone: a command whose result is on stdout ends (`| head`), what is told beside the work does not end it."""
        self._go_unheard()
        if not self.stderr:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def _go_unheard(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # what is left is written as Python ends


console = LiteralConsole(stderr=True, quiet=launched_rank() != 0)


def any_encoding() -> None:
    """From here on stdout and stderr write characters that their encoding lacks as escapes, instead of failing over them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def emit(value: Any, wanted: bool) -> None:
    """The result as JSON on stdout, where it is wanted. A number that is not finite is null there, and named on stderr."""
    if not wanted:
        return
    lost: list[str] = []
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    print(strict_json(value, lost, unicode))
    tell_lost(lost)


def tell_lost(lost: Sequence[str]) -> None:
    """Says which numbers `strict_json` has made null."""
    if lost:
        some = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        console.print(f"null in the JSON, because it is not a finite number: {some}")


def strict_json(value: Any, lost: list[str], unicode: bool = True, default: Callable[[Any], Any] | None = None) -> str:
    """JSON on one line that strict parsers take: NaN and infinities become null, their dotted paths are appended to `lost`. `default`
    as in json.dumps."""
    return json.dumps(_finite(value, "", lost), ensure_ascii=not unicode, allow_nan=False, default=default)


def _finite(value: Any, path: str, lost: list[str]) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v, f"{path}.{k}" if path else str(k), lost) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, f"{path}[{i}]", lost) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"{path or 'the result'} ({value})")
        return None
    return value


class _Lines(Progress):
    """What stands in a bar's stead where stderr is no terminal: a line every half minute, and one at the end."""

    EVERY_S = 30.0
    _said = 0.0  # seconds after the start

    def update(self, task_id: TaskID, **settings: Any) -> None:
        super().update(task_id, **settings)
        elapsed = self.tasks[0].elapsed or 0.0
        if elapsed - self._said >= self.EVERY_S and not self.finished:
            self._said = elapsed
            self.say()

    def say(self) -> None:
        task = self.tasks[0]
        line = f"{task.description} {task.completed:.0f}/{task.total:.0f} in {clock(task.elapsed or 0.0)}"
        if task.time_remaining and not task.finished:
            line += f", ETA {clock(task.time_remaining)}"
        console.print(f"{line}  {task.fields['note']}".rstrip())


def clock(seconds: float) -> str:
    """h:mm:ss"""
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def progress(title: str, total: int, done: int = 0, lines: bool = True) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar with elapsed and remaining time; where stderr is no terminal a line now and then, or none without `lines`."""
    title = literal(title, console.encoding)
    if not console.is_terminal:
        told = _Lines(disable=True) if lines else Progress(disable=True)
        yield told, told.add_task(title, total=total, completed=done, note="")
        if isinstance(told, _Lines):
            told.say()
        return
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA", markup=False),
        TimeRemainingColumn(),
    ]
    note = TextColumn("{task.fields[note]}", markup=False)
    with Progress(*columns, note, console=console, refresh_per_second=4) as bar:
        yield bar, bar.add_task(title, total=total, completed=done, note="")


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """A table whose first column is left-aligned and whose others are right-aligned."""
    made = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def is_verbose() -> bool:
    """Whether everything is to be said: tables that also stand in files, and what the libraries say (REDHEART_VERBOSE)."""
    return os.environ.get("REDHEART_VERBOSE", "") not in ("", "0")


@contextmanager
def unheard() -> Iterator[None]:
    """What is found here is told where it is found again, or has been told before."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def quiet_libraries() -> None:
    """Turns off the progress bars of Transformers (ours tell the whole of the work), and what bitsandbytes says of a faster kernel
    that it would fetch from the hub."""
    from transformers.utils import logging as transformers_logging

    if not is_verbose():
        transformers_logging.disable_progress_bar()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_start() -> None:
    """The same of libraries that speak when they are imported: for a process of ours, before anything is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not is_verbose():
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "DS_LOG_LEVEL": "error", "TQDM_DISABLE": "1"}
        os.environ.update({name: os.environ.get(name, value) for name, value in quiet.items()})
        # that a CUDA build of torch, beside a compiler for GPUs, found no GPU
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def show_answers(text: str, answers: dict[str, Any], brief: bool = False, aside: bool = False) -> None:
    """What the network says of a text on stdout (`aside`: on stderr): a table, in which answers that it names under `untrained` are
    marked so, or, in brief, the strongest emotions and the answers that are one number."""
    out = console if aside else LiteralConsole()
    out.print(text, soft_wrap=True)  # whole, whatever the table's width
    if brief:
        strongest = sorted(answers.get("emotion", {}).items(), key=lambda entry: -entry[1])[:3]
        numbers = [(name, v) for name, v in answers.items() if isinstance(v, float)]
        for line in (strongest, numbers):
            out.print("  " + ", ".join(f"{name} {v:.2f}" for name, v in line), soft_wrap=True)
        return
    rows: list[tuple[str, str, str]] = []
    marked = set(answers.get("untrained", ()))
    for name, value in answers.items():
        if name == "untrained":
            continue
        if isinstance(value, list):
            rows.append((name, "", ", ".join(value) or "none"))
            continue
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for entry, v in entries:
            mark = " (not trained)" if marked & {name, f"{name}.{entry}"} else ""
            rows.append((name, entry, f"{v:.3f}{mark}"))
    out.print(table("", ("answer", "entry", "value"), rows))
