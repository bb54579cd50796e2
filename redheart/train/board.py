"""What a run shows while it runs: TensorBoard scalars, from the main process.

loss/TASK, loss/total, dev_loss/…, dev/TASK/ORIGIN/METRIC, learning_rate, grad_norm/MODULE, grad_norm/total, samples_per_s,
memory/host_rss_gib, memory/gpu_allocated_gib, memory/gpu_reserved_gib, skipped_steps, synergy/… (train/synergy.py);
micro_batch_size, with a text under `out_of_memory`, wherever it had to shrink (train/oom.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import Progress, TaskID

from redheart.console import clock, console, progress
from redheart.device import has_gpu
from redheart.evaluation.evaluate import Evaluation
from redheart.ranks import is_main
from redheart.train.engine import Update

GIB = 2**30


class Board:
    """Writes to RUN/tensorboard; on a resume, events of steps after the checkpoint's are hidden."""

    def __init__(self, run: Path, start_step: int, total_steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = (
            SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1 if start_step else None)
            if is_main()
            else None
        )
        self._clock, self._samples = time.perf_counter(), 0
        self._start, self._first, self._total = self._clock, start_step, total_steps

    def progress(self) -> AbstractContextManager[tuple[Progress, TaskID]]:
        """The bar of the run; where stderr is no terminal nothing, since `train` says a line there."""
        return progress("training", self._total, self._first, lines=False)

    def count(self, num_samples: int) -> None:
        """Samples that one more step has seen, over all ranks."""
        self._samples += num_samples

    def train(
        self, step: int, losses: Mapping[str, float], total: float, update: Update, learning_rate: float, skipped: int
    ) -> float:
        """Logs a training step; returns the samples per second since the last call."""
        now = time.perf_counter()
        rate = self._samples / (now - self._clock)
        self._clock, self._samples = now, 0
        values = {f"loss/{name}": value for name, value in losses.items()} | {"loss/total": total}
        values |= {f"grad_norm/{module}": v for module, v in update.module_norms.items()}
        values |= {"grad_norm/total": update.grad_norm, "learning_rate": learning_rate, "samples_per_s": rate}
        values |= memory() | {"skipped_steps": float(skipped)}
        self._write(step, values)
        if not console.is_terminal:  # in the progress bar's stead
            left = (now - self._start) / (step - self._first) * (self._total - step)
            held = ", ".join(
                f"{k.removeprefix('memory/').removesuffix('_gib')} {v:.2f} GiB" for k, v in memory().items()
            )
            console.print(
                f"step {step}/{self._total}  loss {total:.4f}  {rate:.1f} samples/s  ETA {clock(left)}  {held}"
            )
        return rate

    def dev(self, step: int, result: Evaluation) -> None:
        values = {f"dev_loss/{name}": value for name, value in result.losses.items()} | {"dev_loss/total": result.total}
        for (task, origin), metrics in result.metrics.items():
            values |= {f"dev/{task}/{origin}/{metric}": v for metric, v in metrics.items()}
        self._write(step, values)

    def synergy(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, {f"synergy/{name}": value for name, value in values.items()})

    def out_of_memory(self, event: Mapping[str, Any]) -> None:
        """An entry of Progress.out_of_memory."""
        if self._writer:
            text = "\n".join(f"- {key}: {value}" for key, value in event.items())
            self._writer.add_text("out_of_memory", text, event["step"])
            self._write(event["step"], {"micro_batch_size": event["micro_batch_size"]})
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves time spent on evaluation and checkpoints out of samples_per_s."""
        self._clock, self._samples = time.perf_counter(), 0

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()


def memory() -> dict[str, float]:
    """Resident memory of this process and, with a GPU, what torch holds there, in GiB."""
    values = {"memory/host_rss_gib": psutil.Process().memory_info().rss / GIB}
    if has_gpu():
        values["memory/gpu_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        values["memory/gpu_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return values
