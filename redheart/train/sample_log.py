"""RUN/samples-rankN.jsonl: which samples this rank trained on, a line per optimizer step. On with `training.log_samples`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from redheart.files import write_text
from redheart.schema import Batch


class SampleLog:
    """Appends {"step", "world_size", "ids"}; a run that goes on at `step` first forgets what was logged from there on.

    The files of ranks that this run does not have are trimmed too, by rank modulo the world size.
    """

    def __init__(self, run: Path, rank: int, world_size: int, step: int):
        self.world_size = world_size
        for path in run.glob("samples-rank*.jsonl"):
            if int(path.stem.removeprefix("samples-rank")) % world_size == rank:
                whole = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
                write_text(path, "".join(line + "\n" for line in whole if json.loads(line)["step"] < step))
        self._file = (run / f"samples-rank{rank}.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, batches: Sequence[Batch]) -> None:
        ids = [i for batch in batches for i in batch.ids]
        self._file.write(json.dumps({"step": step, "world_size": self.world_size, "ids": ids}) + "\n")
        self._file.flush()
