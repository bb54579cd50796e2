"""What people see while something runs: messages, tables and progress bars, on stderr, from the first process only.

stdout is kept for results, so that `--json` output can be piped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

from redheart.ranks import launched_rank

console = Console(stderr=True, quiet=launched_rank() != 0, highlight=False, soft_wrap=True)


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar with elapsed and remaining time; a few plain lines where stderr is no terminal."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, refresh_per_second=4) as bar:
        yield bar, bar.add_task(title, total=total, completed=done, note="")


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """A table whose first column is left-aligned and whose others are right-aligned."""
    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def quiet_libraries() -> None:
    """Turns off the progress bars of Transformers; ours tell the whole of the work."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def show_answers(text: str, answers: dict[str, Any]) -> None:
    """What the network says of a text, as a table on stdout."""
    rows: list[tuple[str, str, str]] = []
    for name, value in answers.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(name, entry, f"{v:.3f}") for entry, v in entries]
    Console().print(table(text, ("answer", "entry", "value"), rows))
