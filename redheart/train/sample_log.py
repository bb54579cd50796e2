"""RUN/samples-rankN.jsonl: which samples this rank trained on, a line per optimizer step. On with `training.log_samples`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redheart.files import read_sealed_lines, sealed_line, write_text
from redheart.schema import Batch


class SampleLog:
    """Appends {"step", "world_size", "ids", "sha256"}; a run that goes on at `step` first forgets what was logged from there on.

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
