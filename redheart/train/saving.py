"""When a run's checkpoints are written, how, and what they cost: the trainer's side of train/checkpoint.py.

A save blocks, or (`checkpoint.background`) copies weights and states on the host and lets a thread of every rank write them while
training goes on. No thread asks other ranks anything: that its part is written, or failed, a rank says at the start of its next step,
in the collective that every step has anyway; when all have, the main process's thread commits. So what is half-written never
looks committed, and one save is under way at a time.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from redheart.config import RunConfig
from redheart.console import console
from redheart.files import no_room, remove
from redheart.ranks import any_rank, is_main, is_out_of_memory, sum_over_ranks, world_size
from redheart.schema import RedHeartError
from redheart.train import checkpoint
from redheart.train.aside import Events
from redheart.train.engine import Engine
from redheart.train.progress import Progress

MIB = 2**20


class _Writing:
    """A save in the background: `write` of this rank's part, then `commit` (the main process's; None elsewhere) once all have written."""

    def __init__(self, write: Callable[[], None], commit: Callable[[], None] | None):
        self.error: Exception | None = None
        self.part = threading.Event()  # of this rank: written, or failed
        self._all, self._abandoned = threading.Event(), False
        self._work = write, commit
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        write, commit = self._work
        del self._work  # with it the copy
        try:
            write()
            del write
            self.part.set()
            if commit and self._all.wait() and not self._abandoned:
                commit()
        except Exception as error:
            self.error = error
        finally:
            self.part.set()

    def go_on(self) -> None:
        """All ranks have written their parts."""
        self._all.set()

    def end(self, abandon: bool) -> None:
        """Waits for the thread, which commits unless it is to `abandon`."""
        self._abandoned = abandon
        self._all.set()
        self._thread.join()


class Saver:
    """Saves a run; `wanted` is False for a dry run, which has nothing to save. All methods but `asks` are collective."""

    def __init__(self, config: RunConfig, run: Path, state: Progress, events: Events, wanted: bool):
        self._config, self._run, self._state, self._events, self._wanted = config, run, state, events, wanted
        self._saved = self._here if checkpoint.holds(run, state.step) else None
        self._since = self._start = time.monotonic()
        self._writing: _Writing | None = None
        self._step = 0  # of the save that is under way, or was the last
        self._lost = False  # a save failed that may have been the best's
        self._spent_s, self._bytes, self._saves, self._failed = 0.0, 0, 0, 0

    @property
    def _here(self) -> tuple[int, int]:
        return self._state.branch, self._state.step

    def asks(self, save: bool) -> tuple[bool, bool, bool]:
        """What this rank has to say at a step's start: a save is due, its part is written, its part failed. `heed` gets how many do."""
        minutes, writing = self._config.checkpoint.minutes, self._writing
        due = is_main() and minutes is not None and time.monotonic() - self._since >= 60 * minutes
        done = writing is not None and writing.part.is_set()
        return self._wanted and (save or due), done, writing is not None and writing.error is not None

    def heed(self, engine: Engine, asked: Sequence[float]) -> bool:
        """What all ranks have said of `asks`; whether training waited for it. Raises RedHeartError where a save in the background failed,
        unless the run shall go on."""
        due, written, failed = asked
        if failed:
            self.finish()
        elif self._writing and written == engine.world_size:
            self._writing.go_on()
        if due:
            self.save(engine)
        if not self._writing:
            self._search_anew()
        return due > 0 or failed > 0

    def save(self, engine: Engine, last: bool = False) -> None:
        """A checkpoint of the present step, unless there is one. The `last` one of a run is whole when this returns."""
        if last:
            self.finish()  # where it fails, the present step has no checkpoint yet
        if self._wanted and self._saved != self._here:
            self.finish()
            self._search_anew(saving=True)
            self._since, self._step = time.monotonic(), self._state.step
            with self._clocked(), self._failing(last):
                self._save(engine, self._config.checkpoint.background and not last)
                self._saved = self._here

    def _save(self, engine: Engine, background: bool) -> None:
        state, config = self._state, self._config
        state.world_size = engine.world_size
        self._check_room(engine)
        if not background:
            checkpoint.save(engine, self._run, config, state, config.checkpoint.keep_last)
            self._count()
            return
        temporary, commit = checkpoint.begin(self._run, config, state, config.checkpoint.keep_last)
        write = engine.stage(temporary)
        self._writing = _Writing(write, commit if is_main() else None)

    def _search_anew(self, saving: bool = False) -> None:
        """Where the best checkpoint was lost. `saving`: the present step is saved now, so that it may be the best."""
        state = self._state
        if self._lost and not (saving and state.best_step == state.step):
            checkpoint.forget_lost_best(state, self._run)
            if saving and state.best_step is None and state.value is not None and state.value_step == state.step:
                state.improves(state.value)
        self._lost = False

    def finish(self) -> None:
        """Waits for the save that is under way."""
        writing = self._writing
        if writing is None:
            return
        with self._clocked(), self._failing():
            writing.part.wait()
            failed = any_rank(writing.error is not None)
            writing.end(abandon=failed)
            self._writing = None
            if any_rank(writing.error is not None):
                raise writing.error or RedHeartError("another rank could not write its part")
            self._count()

    @contextmanager
    def _failing(self, last: bool = False) -> Iterator[None]:
        """What a save that failed on some rank, and raised on all, means by `checkpoint.on_error`; after the `last` one none follows."""
        try:
            yield
        except Exception as error:
            full = no_room(error)
            short = isinstance(error, RuntimeError) and is_out_of_memory(error)
            named = isinstance(error, OSError | RedHeartError) or short
            reason = full or (str(error).splitlines()[0] if named else None)
            goes_on = reason is not None and self._config.checkpoint.on_error == "go_on" and not last
            if is_main() and (goes_on or not full):  # else train/claim.py does, and says which file found no room
                remove(self._run / "checkpoints" / f"step-{self._step:08d}.tmp")
            if short and not goes_on:
                raise RedHeartError(
                    f"out of memory while step {self._step} was saved ({reason}): checkpoint.background=false holds no copy of weights "
                    "and states, checkpoint.on_error=go_on tries again later; --resume goes on from the checkpoint before"
                ) from None
            if not goes_on:
                raise
            self._saved, self._lost, self._failed = None, True, self._failed + 1
            console.print(
                f"step {self._step}: saving failed ({reason}); the run goes on, and tries again at the next checkpoint "
                "(checkpoint.on_error)",
                markup=False,
            )
            self._events.write(self._step, "save_failed", reason=reason)

    def _check_room(self, engine: Engine) -> None:
        """Raises RedHeartError on all ranks where the disk has no room for another checkpoint."""
        newest = checkpoint.last(self._run)
        needed = sum_over_ranks([float(engine.state_bytes())])[0] if newest is None else checkpoint.size_of(newest)
        free = shutil.disk_usage(self._run).free
        if any_rank(free < needed):
            raise RedHeartError(
                f"a checkpoint takes {needed / MIB:,.0f} MiB and {self._run} has {free / MIB:,.0f} MiB free: make room; "
                + (f"--resume goes on from {newest}" if newest else "there is no checkpoint yet")
            )

    def figures(self) -> dict[str, float]:
        """What saving has cost: how many checkpoints, their MiB, the share of the time that training waited, how many failed."""
        share = self._spent_s / (time.monotonic() - self._start)
        return {"checkpoints": self._saves, "mib": self._bytes / MIB, "share": share, "failed": self._failed}

    def _count(self) -> None:
        newest = checkpoint.last(self._run) if is_main() else None
        self._bytes += checkpoint.size_of(newest) if newest else 0
        self._saves += 1

    @contextmanager
    def _clocked(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent_s += time.perf_counter() - start

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """An error of one process's run loses no save that is under way; those of several cannot agree on one any more."""
        if kind and issubclass(kind, Exception) and self._writing and world_size() == 1:
            self._writing.end(abandon=False)
