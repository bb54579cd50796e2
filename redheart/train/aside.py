"""What a run writes beside its checkpoints and can do without: RUN/events.jsonl, TensorBoard, the log of samples."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from redheart.console import console
from redheart.files import read_sealed_lines, sealed_line, write_text
from redheart.ranks import is_main
from redheart.schema import Batch


class Aside:
    """Writes that never end a run: the first that the system refuses is told, and nothing more is written. Nothing is unless `wanted`."""

    def __init__(self, what: str, wanted: bool = True):
        self._what, self.lost = what, not wanted

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

    def __init__(self, run: Path, wanted: bool = True):
        self._path, self._write = run / "events.jsonl", Aside("events.jsonl", wanted)

    def write(self, step: int, event: str, **facts: Any) -> None:
        if is_main():
            line = json.dumps({"time": round(time.time(), 3), "step": step, "event": event, **facts}, default=str)
            self._write(lambda: self._append(line))

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class SampleLog:
    """RUN/samples-rankN.jsonl: which samples this rank trained on, a line per optimizer step; with `training.log_samples`.

    Appends {"step", "world_size", "ids", "sha256"}; a run that goes on at `step` first forgets what was logged from there on.

    The files of ranks that this run does not have are trimmed too, by rank modulo the world size.
    """

    def __init__(self, run: Path, rank: int, world_size: int, step: int):
        self.world_size = world_size
        for path in run.glob("samples-rank*.jsonl"):
            if int(path.stem.removeprefix("samples-rank")) % world_size == rank:
                lines = read_sealed_lines(path, "move it away to go on without what it logged")
                write_text(path, "".join(sealed_line(line) for line in lines if line["step"] < step))
        self._file = (run / f"samples-rank{rank}.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, batches: Sequence[Batch]) -> None:
        ids = [i for batch in batches for i in batch.ids]
        self._file.write(sealed_line({"step": step, "world_size": self.world_size, "ids": ids}))
        self._file.flush()
