"""What ends or skips a step: signals and numbers that are not finite."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redheart.console import console
from redheart.files import write_json
from redheart.owned import own
from redheart.ranks import is_launched, is_main
from redheart.schema import RedHeartError
from redheart.train.aside import Events
from redheart.train.engine import Update
from redheart.train.progress import Progress
from redheart.train.stages import LossSums

GRACE_S, ALONE_S = 5.0, 0.5  # under a launcher, and without one


class StopRequest:
    """Set by SIGINT or SIGTERM; the run then ends at the next step's boundary with a checkpoint, agreed by all ranks.

    Another one, after the time in which launchers and shells pass on what the terminal sent already, ends it at once; what was
    committed stays. SIGUSR1 (of a batch system that warns: Slurm's `--signal=USR1@120`) saves at the next boundary, and the run goes
    on: what ends it comes later, or never. `--signal=TERM@120` ends it with a checkpoint.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since, self._save = 0.0, False
        self._grace = GRACE_S if is_launched() else ALONE_S

    @property
    def wanted(self) -> bool:
        return self.signal is not None

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # signals are the main thread's, and so is what they do
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

        def note(number: int, frame: object) -> None:
            now = time.monotonic()
            if number == signal.SIGUSR1:
                self._save = True
                console.print("SIGUSR1: a checkpoint after this step …")
            elif self.signal is None:
                self.signal, self._since = number, now
                console.print(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint …")
            elif now - self._since > self._grace:  # launchers pass on the signal that the terminal sent already
                for s, handler in before.items():
                    signal.signal(s, handler)
                os.kill(os.getpid(), number)

        for s in before:
            signal.signal(s, note)
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


class NonFiniteGuard:
    """Counts steps that were skipped because a gradient was not finite; `max_bad_steps` in a row end the run with a file."""

    def __init__(self, run_directory: Path, max_bad_steps: int, state: Progress, events: Events):
        self.run_directory, self.max_bad_steps = run_directory, max_bad_steps
        self._state, self._events = state, events
        self.in_a_row = 0

    def check(self, step: int, update: Update, sums: LossSums, sample_ids: list[str]) -> None:
        """Call after every step. `sums` are its losses on this rank, read only where something is wrong.

        Raises RedHeartError at the limit.
        """
        if update.applied:
            self.in_a_row = 0
            return
        self._state.skipped_steps += 1
        self.in_a_row += 1
        norms, losses = update.module_norms, sums.read()
        modules = [m for m, v in norms.items() if not math.isfinite(v)]
        tasks = [t for t, v in losses.items() if not math.isfinite(v)]
        fault = f"modules {', '.join(modules) or 'unknown'}; losses {', '.join(tasks) or 'all finite'}"
        console.print(f"step {step}: gradient not finite, step skipped ({fault})")
        self._events.write(step, "skipped_step", modules=modules, losses=tasks)
        if self.in_a_row < self.max_bad_steps:
            return
        path = self.run_directory / f"non_finite_step_{step:08d}.json"
        if is_main():
            own(self.run_directory, "run", [path.name])
            printable = {t: str(v) for t, v in losses.items()}
            write_json(
                path,
                {
                    "step": step,
                    "modules": modules,
                    "losses": printable,
                    "norms": {m: str(v) for m, v in norms.items()},
                    "samples": sample_ids,
                },
            )
        raise RedHeartError(
            f"{self.in_a_row} steps in a row were not finite ({fault}): see {path}; lower optimizer.learning_rate or look at these samples"
        )
