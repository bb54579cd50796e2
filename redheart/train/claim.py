"""Whose a run directory is: one training at a time, and what it writes there, and nothing else, may be replaced or removed.

    with Claim(run) as claim:      an earlier run is held from here on, before anything of it is read
        …; claim.take(…)           a new one from here on, once nothing speaks against training

Of a launch's processes the first holds the directory; where it is refused, its launcher ends the others.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from redheart.files import no_room, remove
from redheart.owned import adopt, exclusive, make_directory, own, owned, remove_owned
from redheart.ranks import launched_rank, launched_world_size
from redheart.schema import RedHeartError
from redheart.train.checkpoint import REBUILD, clear, committed, last
from redheart.train.stalls import stacks_file

KIND = "run"
RESULT = "result.json"  # how the last launch ended
NAMES = ("config.yaml", "ds_config.json", "checkpoints", "tensorboard", "events.jsonl", RESULT, REBUILD)
REPORT = ("report.md", "report.html", "learning_curve.png", "reliability.png", "causes_of_regret.png")  # evaluate's
EARLIER = (*NAMES, *REPORT, "samples-rank*.jsonl", "non_finite_step_*.json", "finished.json")


class Claim:
    """Holds `run` for this process while it trains; RedHeartError where another process does."""

    def __init__(self, run: Path):
        self.run, self._held, self._locked = run, ExitStack(), False

    def __enter__(self) -> Claim:
        if launched_rank() == 0 and is_run(self.run):
            self._lock()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def take(self, resuming: bool, overwrite: bool, log_samples: bool) -> None:
        """Makes the directory that of this run. Raises RedHeartError, and has written nothing, where it is somebody else's."""
        if launched_rank() != 0:
            return
        ranks = range(launched_world_size())
        names = [*NAMES, *map(stacks_file, ranks), *(f"samples-rank{r}.jsonl" for r in ranks if log_samples)]
        for _ in range(1 if self._locked else 2):  # once more when nobody else can change it
            self.refuse(resuming, overwrite)
            if not is_run(self.run):
                own(self.run, KIND, names, dry=True)
            if not self._locked:
                make_directory(self.run, "--out")
                self._lock()
        if overwrite and not resuming:
            clear(self.run)
            remove_owned(self.run, KIND)
        _own(self.run, names)

    def refuse(self, resuming: bool, overwrite: bool) -> None:
        """Raises RedHeartError where a run is there that this one neither goes on with nor replaces."""
        ours, earlier = owned(self.run, KIND), _of_an_earlier_version(self.run)
        if launched_rank() == 0 and (ours or earlier) and not resuming and not (overwrite and ours):
            replace = "replace it with --overwrite" if ours else "remove it yourself (an earlier version wrote it)"
            kept = "already: go on with --resume," if last(self.run) else "already, with no checkpoint yet:"
            raise RedHeartError(f"{self.run} holds a run {kept} {replace}, or name another --out")

    def _lock(self) -> None:
        self._held.enter_context(exclusive(self.run, "training"))
        self._locked = True


def is_run(directory: Path) -> bool:
    """Whether the product has trained here."""
    return bool(owned(directory, KIND)) or _of_an_earlier_version(directory)


def own_report(run: Path) -> None:
    """Says that what `evaluate` is about to write in a run directory is ours."""
    _own(run, REPORT)


def _of_an_earlier_version(directory: Path) -> bool:
    """Before there were markers: there are checkpoints, and their manifests say whose."""
    return not owned(directory, KIND) and bool(committed(directory))


def _own(run: Path, names: tuple[str, ...] | list[str]) -> None:
    if _of_an_earlier_version(run):
        adopt(run, KIND, sorted({p.name for pattern in EARLIER for p in run.glob(pattern)}))
    own(run, KIND, names)


@contextmanager
def naming_no_room(run: Path) -> Iterator[None]:
    """Turns a write that found no room, also in a thread of TensorBoard's, into a RedHeartError; removes what is half-written."""
    hook = threading.excepthook
    # what a thread found no room for is raised again by the writer
    threading.excepthook = lambda a: None if a.exc_value and no_room(a.exc_value) else hook(a)
    try:
        yield
    except Exception as error:
        reason = no_room(error)
        if reason is None:
            raise
        free, newest = shutil.disk_usage(run).free / 2**20, last(run)
        half = sorted((run / "checkpoints").glob("step-*.tmp/**/*.*"), key=lambda p: p.stat().st_mtime_ns)[-1:]
        where = half[0] if half else run
        if launched_rank() == 0:
            for path in [*(run / "checkpoints").glob("step-*.tmp"), run / REBUILD]:
                remove(path)
        go_on = f"--resume goes on from {newest}" if newest else "there is no checkpoint yet"
        raise RedHeartError(
            f"writing {where} failed ({reason}; {free:,.0f} MiB are free): make room, or raise the limit (quota, ulimit -f); {go_on}"
        ) from error
    finally:
        threading.excepthook = hook
