"""Training for an hour under launch/supervise.sh, killed again and again, two readers beside it: nothing grows, and it ends as if nothing
had been.

    REDHEART_SOAK_MINUTES=60 REDHEART_SOAK_KILLS=20 REDHEART_SOAK_SAVE_S=60 pytest tests/faults/test_soak.py -m soak -s
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.kinds import SETTINGS, write_data
from tests.faults.test_supervise import SUPERVISE
from tests.faults.trials import ROOT, TABLE
from tests.faults.works import parameters, samples
from tests.runs import environment, losses, redheart

pytestmark = pytest.mark.soak
MINUTES = float(os.environ.get("REDHEART_SOAK_MINUTES", "60"))
KILLS = int(os.environ.get("REDHEART_SOAK_KILLS", "20"))
SAVE_S = float(os.environ.get("REDHEART_SOAK_SAVE_S", "60"))
STEP_S = 1.0
STEPS = round(60 * MINUTES / STEP_S)
GIVEN = [
    *(f"--set={s}" for s in SETTINGS if "checkpoint_every" not in s),
    *(f"--set=training.{s}" for s in (f"max_steps={STEPS}", "evaluate_every=50", "checkpoint_every=99999", "log_every=5", "patience=999")),
    *(f"--set=checkpoint.{s}" for s in (f"minutes={SAVE_S / 60}", "background=true")),
]  # fmt: skip
GROWTH_MIB, HANDLES, READ = 8.0, 2, ("evaluate", "TensorBoard")


class Watched:
    """What a training process held, second by second."""

    def __init__(self) -> None:
        self.mib: list[float] = []
        self.handles: list[int] = []

    def look(self, process: psutil.Process) -> None:
        self.mib.append(process.memory_info().rss / 2**20)
        self.handles.append(process.num_fds())

    def growth(self) -> tuple[float, float]:
        """Of MiB and handles, between the third and the last quarter of its life: what is made once is made by then."""
        return tuple(
            median(seen[3 * len(seen) // 4 :]) - median(seen[len(seen) // 2 : 3 * len(seen) // 4])
            for seen in (self.mib, self.handles)
        )


def test_an_hour(tmp_path: Path):
    data, run, pids, chosen = tmp_path / "data", tmp_path / "run", tmp_path / "pids", random.Random(0)
    data.mkdir()
    write_data(data)
    over, ends, lives, most_files = threading.Event(), Counter[str](), list[Watched](), 0

    def evaluate() -> str:
        report = tmp_path / "report.md"
        done = redheart(
            "evaluate", "--checkpoint", run, "--data", data, "--split", "dev", "--report", report, "--brief"
        )
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        return f"evaluate {done.returncode}" + (
            "" if done.returncode == 0 else f": {done.stderr.strip().splitlines()[-1]}"
        )

    def tensorboard() -> str:
        reader = EventAccumulator(str(run / "tensorboard")).Reload()
        assert reader.Tags()["scalars"]
        return "TensorBoard"

    def reading(read: Callable[[], str]) -> None:
        while not over.wait(SAVE_S / 2):
            try:
                ends[read()] += 1
            except Exception as error:
                ends[f"{read.__name__}: {error!r}"] += 1

    line = [
        sys.executable,
        "-m",
        "tests.faults.paced",
        pids,
        str(STEP_S),
        "train",
        "--data",
        data,
        *GIVEN,
        "--out",
        run,
    ]
    with (tmp_path / "said").open("w") as said:
        supervisor = subprocess.Popen(
            [*SUPERVISE, "--", *map(str, line)], cwd=ROOT, stdout=said, stderr=said,
            env=environment() | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    began, readers = time.monotonic(), [threading.Thread(target=reading, args=(r,)) for r in (evaluate, tensorboard)]
    kills = sorted(chosen.uniform(60, 0.95 * 60 * MINUTES) for _ in range(KILLS))
    known, process = 0, None
    while supervisor.poll() is None:
        time.sleep(1)
        started = pids.read_text().split() if pids.exists() else []
        if len(started) > known:
            known, process = len(started), psutil.Process(int(started[-1]))
            lives.append(Watched())
        if process is None or not process.is_running() or not (run / "checkpoints" / "last").exists():
            continue
        if not readers[0].ident:
            for reader in readers:
                reader.start()
        try:
            lives[-1].look(process)
        except psutil.Error:
            continue  # it has just ended
        most_files = max(most_files, len(list((run / "checkpoints").rglob("*"))))
        if kills and time.monotonic() - began > kills[0]:
            kills.pop(0)
            process.send_signal(signal.SIGKILL)
    over.set()
    for reader in readers:
        reader.join()
    told = [(len(one.mib), *(round(x, 1) for x in one.growth())) for one in lives if len(one.mib) > 30]
    print(f"{MINUTES} min, {STEPS} steps, {known} starts; (seconds, MiB, handles) of lives: {told}")
    print(f"most files below checkpoints/: {most_files}; readers: {dict(ends)}")
    assert supervisor.returncode == 0, (tmp_path / "said").read_text()[-3000:]
    assert not kills
    assert known >= KILLS // 2  # some fall into the same start
    assert all(mib < GROWTH_MIB and handles <= HANDLES for _, mib, handles in told), told
    most = [max(one.mib) for one in lives if len(one.mib) > 30]  # a shorter life had not all of its imports
    assert most[-1] < most[0] + 2 * GROWTH_MIB, most
    assert all(any(end.startswith(name) for end in ends) for name in READ)
    assert all(end in ("evaluate 0", "TensorBoard") for end in ends), ends

    whole = tmp_path / "whole"
    done = redheart("train", "--data", data, *GIVEN, "--out", whole, timeout=round(60 * MINUTES + 600))
    assert done.returncode == 0, done.stderr[-3000:]
    assert parameters(run) == parameters(whole)
    assert samples(run) == samples(whole)
    assert losses(run) == losses(whole)
    kept = [{p.name for p in (one / "checkpoints").iterdir() if not p.name.startswith("step-")} for one in (run, whole)]
    assert kept[0] == kept[1]
    beside = [{p.name for p in one.iterdir()} - {"events.jsonl"} for one in (run, whole)]
    assert beside[0] == beside[1]
    assert not [p for p in run.rglob("*") if p.name.endswith((".tmp", ".removed", ".old"))]
    TABLE.add("an hour of training, killed again and again, with two readers", "same parameters, losses and samples")
