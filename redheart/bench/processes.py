"""Work in fresh processes: `on_ranks` forks them from one that has imported all that training needs, `alone` starts one from nothing."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from redheart.files import read_json, write_json
from redheart.schema import RedHeartError

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TAIL = 2000  # characters of a failed process's last words that are kept


def on_ranks(work: Callable[[Any], Any], job: Any, ranks: int, timeout_s: int) -> Any:
    """What `work(job)` gives on the first of so many ranks of this machine; RedHeartError where none comes in time."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the server reads it once, when it starts
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["redheart.bench.memory_server"])
    forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours, theirs = forked.Pipe(duplex=False)
    values = [(rank, rank, ranks, ranks, "127.0.0.1", port) if ranks > 1 else () for rank in range(ranks)]
    processes = [forked.Process(target=_rank, args=(work, job, own, theirs)) for own in values]
    for process in processes:
        process.start()
    theirs.close()
    try:
        told = ours.recv() if ours.poll(timeout_s) else None
    except EOFError:
        told = None
    for process in processes:
        process.join(60 if told else 0)
        process.kill()
    if told is None:
        raise RedHeartError(
            f"{ranks} processes gave no answer within {timeout_s} s, or one of them failed (see above): {job}"
        )
    return told


def _rank(work: Callable[[Any], Any], job: Any, launched: tuple[Any, ...], pipe: Any) -> None:
    for name in LAUNCHED:
        os.environ.pop(name, None)
    os.environ.update(zip(LAUNCHED, map(str, launched), strict=False))
    told = work(job)
    if not launched or launched[0] == 0:
        pipe.send(told)


def alone(job: dict[str, Any], timeout_s: int | None) -> dict[str, Any]:
    """The result of a job of gpu_worker.py; where its process failed, `ended` False, an `error` and the end of its output."""
    with tempfile.TemporaryDirectory(prefix="redheart-bench-") as folder:
        request, answer = Path(folder) / "job.json", Path(folder) / "result.json"
        write_json(request, job)
        command = [sys.executable, "-m", "redheart.bench.gpu_worker", str(request), str(answer)]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            late = {"error": f"not at its end after {timeout_s} s (--timeout)"}
            if answer.is_file():  # steps were measured: compiled ones were not
                return {**read_json(answer, "run the bench again"), "compiled": late}
            return {"ended": False, "observed": None, **late}
        result = read_json(answer, "run the bench again") if answer.is_file() else {"ended": False, "observed": None}
        if done.returncode == 0:
            return result
        ended = f"the process ended with exit code {done.returncode}"
        return {"error": ended, **result, "ended": False, "output": done.stdout[-TAIL:]}
