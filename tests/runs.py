"""Runs the command line as a user does, in processes of its own, and looks at what it left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
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
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "REDHEART_DEBUG": "",
    }


def redheart(
    *arguments: str | Path, launcher: Sequence[str] = (), timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    """`redheart …`, or the same under a launcher."""
    command = (
        [*launcher, *map(str, arguments)] if launcher else [sys.executable, "-m", "redheart", *map(str, arguments)]
    )
    return subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=timeout)


def train(
    data: Path, run: Path, steps: int, *settings: str, launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """A short run that has to succeed."""
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
    result = redheart(*arguments, launcher=launcher)
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
    command = [sys.executable, "-m", "redheart", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 120
    while max(losses(run), default=0) < at_step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def scalars(run: Path, tag: str) -> dict[int, float]:
    if not (run / "tensorboard").is_dir():
        return {}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {e.step: e.value for e in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}


def losses(run: Path) -> dict[int, float]:
    """Training loss by optimizer step."""
    return scalars(run, "loss/total")


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
