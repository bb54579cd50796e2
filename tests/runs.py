"""Runs the command line as a user does, in processes of its own, and looks at what it left behind.

Importing torch, transformers and deepspeed takes a process ten seconds or more, so those without a launcher are forked from
one that has imported them (multiprocessing's fork server, whose threads and state are those of a fresh interpreter).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
QUICK = [
    "--set",
    "training.log_every=1",
    "--set",
    "training.evaluate_every=1000",
    "--set",
    "training.checkpoint_every=1000",
    "--set",
    "training.global_batch_size=8",
]
# of half the width of `local` and a third of its layers: what a whole run is about does not depend on its size
SMALL = [
    *("--set", "model.width=48", "--set", "model.heads=3", "--set", "model.layers=2"),
    *("--set", "model.task_width=32", "--set", "model.task_heads=2"),
]


def environment() -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return {
        **kept,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "COLUMNS": "200",
        "REDHEART_DEBUG": "",
    }


FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.train.warm"])


def redheart(
    *arguments: str | Path, launcher: Sequence[str] = (), timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    """`redheart …`, or the same under a launcher."""
    if launcher:
        command = [*launcher, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=timeout)
    return forked("redheart", *arguments, timeout=timeout)


def forked(module: str, *arguments: str | Path, ranks: int = 0, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE …`; with `ranks` as many processes that find each other, as a launcher starts them.

    The exit code is the first that is not 0; output is rank 0's, errors are everyone's.
    """
    worlds: list[dict[str, str]] = [{}]
    if ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
        worlds = [
            {**meeting, "RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(ranks)} for r in range(ranks)
        ]
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"out-{r}", Path(folder) / f"err-{r}") for r in range(len(worlds))]
        processes = [_fork(module, arguments, world, *file) for world, file in zip(worlds, files, strict=True)]
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        errors = "".join(err.read_text(errors="replace") for _, err in files)
        assert not late, f"{module} was not done after {timeout} s: {errors[-3000:]}"
        code = next((p.exitcode for p in processes if p.exitcode), 0)
        output = files[0][0].read_text()
    return subprocess.CompletedProcess([module, *map(str, arguments)], code, output, errors)


def _fork(
    module: str, arguments: Sequence[str | Path], world: dict[str, str], out: Path, err: Path
) -> ForkServerProcess:
    """Starts `python -m MODULE …` from the server, its output in files."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the server reads it once, when it starts
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    forkserver.ensure_running()
    given = (module, [*map(str, arguments)], environment() | world, str(out), str(err))
    process = FORKED.Process(target=_become, args=given)
    process.start()
    return process


def _become(module: str, arguments: list[str], variables: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    for number, path in ((1, out), (2, err)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def train(
    data: Path,
    run: Path,
    steps: int,
    *settings: str,
    launcher: Sequence[str] = (),
    ranks: int = 0,
    through: Sequence[str] = ("redheart",),
) -> subprocess.CompletedProcess[str]:
    """A short run that has to succeed; `through`: another module than redheart, and its own arguments, that runs it."""
    arguments = [
        "train",
        "--preset",
        "local",
        "--data",
        data,
        "--out",
        run,
        *QUICK,
        "--set",
        f"training.max_steps={steps}",
        *settings,
    ]
    result = redheart(*arguments, launcher=launcher) if launcher else forked(*through, *arguments, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def start_and_signal(
    data: Path, run: Path, steps: int, at_step: int, number: signal.Signals, *settings: str
) -> tuple[int, str]:
    """Starts a run, sends it a signal once TensorBoard has seen `at_step`; (exit code, output)."""
    arguments = [
        "train",
        "--preset",
        "local",
        "--data",
        data,
        "--out",
        run,
        *QUICK,
        "--set",
        f"training.max_steps={steps}",
        *settings,
    ]
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        process = _fork("redheart", arguments, {}, out, err)
        told = lambda: "".join(file.read_text(errors="replace") for file in (out, err) if file.exists())  # noqa: E731
        deadline = time.monotonic() + 120
        while max(losses(run), default=0) < at_step:
            assert process.is_alive(), told()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(120)
        assert process.exitcode is not None, told()
        return process.exitcode, told()


def scalars(run: Path, tag: str) -> dict[int, float]:
    if not (run / "tensorboard").is_dir():
        return {}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {e.step: e.value for e in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}


def losses(run: Path) -> dict[int, float]:
    """Training loss by optimizer step."""
    return scalars(run, "0_overview/loss")


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of a run's last checkpoint."""
    from redheart.files import read_pointer
    from redheart.train.engine import consolidated_weights

    checkpoint = read_pointer(run / "checkpoints" / "last")
    assert checkpoint is not None
    return consolidated_weights(checkpoint)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of a - b over all tensors together."""
    assert a.keys() == b.keys()
    return torch.cat([(a[k].double() - b[k].double()).flatten() for k in a]).norm().item()
