"""What a run writes beside its checkpoints and can do without: RUN/events.jsonl, TensorBoard, the log of samples."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redheart.console import console
from redheart.ranks import is_main


class Aside:
    """Writes that never end a run: the first that the system refuses is told, and nothing more is written."""

    def __init__(self, what: str):
        self._what, self.lost = what, False

    def __call__(self, write: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            write()
        except OSError as error:
            self.lost = True
            console.print(f"{self._what} cannot be written any more ({error}): the run goes on without", markup=False)


class Events:
    """RUN/events.jsonl: a line for whatever did not go as usual, {"time" (s since 1970), "step", "event", …}; from the main process.

    A step that is taken again, after a rewind or a resume, may stand there again.
    """

    def __init__(self, run: Path):
        self._path, self._write = run / "events.jsonl", Aside("events.jsonl")

    def write(self, step: int, event: str, **facts: Any) -> None:
        if is_main():
            line = json.dumps({"time": round(time.time(), 3), "step": step, "event": event, **facts}, default=str)
            self._write(lambda: self._append(line))

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
