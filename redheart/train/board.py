"""What a run shows while it runs: TensorBoard, from the main process, told as a story from the first screen on.

0_overview/  loss, dev_loss and the constant predictor's, dev_unexplained (training.best_metric), learning_rate, samples_per_s, memory,
             grad_norm, skipped_steps; micro_batch_size, with a text under `out_of_memory`, wherever it had to shrink (train/oom.py)
1_quality/ANSWER/  train_loss, dev_loss, constant, and metrics by who made the labels
2_modules/MODULE/  grad_norm, and train_loss and dev_loss of what it says alone
3_synergy/  train/synergy.py
Charts with the constant predictor's line are under custom scalars; the configuration and a few dev texts with what was said of them
are texts; at the end of a run its settings and last figures are under hparams. evaluation/curves.py names the tags, and reads them.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import Progress as Bar
from rich.progress import TaskID

from redheart.config import RunConfig, config_keys, dump_config, leaves
from redheart.console import clock, console, progress
from redheart.data.stream import SampleStream
from redheart.device import has_gpu
from redheart.evaluation.curves import CONSTANT, DEV, LOSS, MODULES, OVERVIEW, RATE, SYNERGY, tag
from redheart.evaluation.evaluate import METRICS, UNEXPLAINED, Evaluation
from redheart.evaluation.examples import Example, shown
from redheart.ranks import is_main
from redheart.schema import Batch
from redheart.tasks import TASKS, task_weights
from redheart.train.aside import Aside, SampleLog
from redheart.train.engine import Update
from redheart.train.progress import Progress

GIB = 2**30


class Board:
    """Writes to RUN/tensorboard, where `records` are wanted; on a resume, events of steps after the checkpoint's are hidden."""

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        state: Progress,
        factors: Mapping[str, float],
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        records: bool = True,
    ):
        self._run, self._config, self._state, self._factors = run, config, state, factors
        self._total = total_steps
        self._clock, self._samples = time.perf_counter(), 0
        self._ranks, self._logs_samples = (rank, world_size), records and config.training.log_samples
        self._last: dict[str, float] = {}  # of the last look at dev
        self._writer: Any = None
        self._tensorboard, self._sample_log = Aside("TensorBoard's files", records), Aside("the log of samples")
        self.reopen()

    def reopen(self) -> None:
        """From here on what is written are the steps after `state.step`; what is there of later ones is hidden, or forgotten."""
        from torch.utils.tensorboard import SummaryWriter

        state = self._state
        self._start, self._first = time.perf_counter(), state.step
        self._put(lambda writer: writer.close())
        folder = self._run / "tensorboard"
        there = any(folder.glob("events.out.tfevents.*"))  # a resume may be from step 0, too
        purge = state.step + 1 if there else None

        def open_writer() -> None:
            self._writer = SummaryWriter(str(folder), purge_step=purge)
            self._writer.add_text("config", f"```yaml\n{dump_config(self._config)}```", state.step)

        if is_main():
            self._tensorboard(open_writer)
        self._log = SampleLog(self._run, *self._ranks, state.step) if self._logs_samples else None
        self.restart_clock()

    def samples(self, step: int, batches: Sequence[Batch]) -> None:
        """Which samples this rank trains on at `step`, where training.log_samples asks for it."""
        if self._log:
            self._sample_log(partial(self._log.write, step, batches))

    def progress(self) -> AbstractContextManager[tuple[Bar, TaskID]]:
        """The bar of the run; where stderr is no terminal nothing, since `train` says a line there."""
        return progress("training", self._total, self._first, lines=False)

    def count(self, num_samples: int) -> None:
        """Samples that one more step has seen, over all ranks."""
        self._samples += num_samples

    def train(
        self, step: int, losses: Mapping[str, float], total: float, update: Update, learning_rate: float
    ) -> float:
        """Logs a training step; returns the samples per second since the last call."""
        now = time.perf_counter()
        rate = self._samples / (now - self._clock)
        self._clock, self._samples = now, 0
        values = {LOSS: total, f"{OVERVIEW}/learning_rate": learning_rate, RATE: rate}
        values |= {
            f"{OVERVIEW}/grad_norm": update.grad_norm,
            f"{OVERVIEW}/skipped_steps": float(self._state.skipped_steps),
        }
        values |= {f"{OVERVIEW}/{name}": v for name, v in memory().items()}
        values |= {tag(name, "train_loss"): value for name, value in losses.items()}
        values |= {f"{MODULES}/{module}/grad_norm": v for module, v in update.module_norms.items()}
        self._write(step, values)
        if not console.is_terminal:  # in the progress bar's stead
            left = (now - self._start) / (step - self._first) * (self._total - step)
            held = ", ".join(f"{name.removesuffix('_gib')} {gib:.2f} GiB" for name, gib in memory().items())
            console.print(
                f"step {step}/{self._total}  loss {total:.4f}  {rate:.1f} samples/s  ETA {clock(left)}  {held}"
            )
        return rate

    def dev(self, step: int, result: Evaluation, stream: SampleStream) -> None:
        """Logs a look at dev: losses beside the constant predictor's, metrics, and some texts of the split with what was said."""
        constant = sum(self._factors[name] * self._state.scales[name] for name in result.losses)
        values = {DEV: result.total, CONSTANT: constant}
        values[f"{OVERVIEW}/dev_unexplained"] = result.value(UNEXPLAINED, task_weights(self._config.loss))
        for name, value in result.losses.items():
            values |= {tag(name, "dev_loss"): value}
            values |= {tag(name, "constant"): self._state.scales[name]} if TASKS[name].final else {}
        for (task, origin), metrics in result.metrics.items():
            wanted = METRICS[TASKS[task].kind] if TASKS[task].final else ()
            values |= {tag(task, f"{origin}_{name}"): metrics[name] for name in wanted if name in metrics}
        self._write(step, values)
        if not self._last:
            charts = _charts([name for name in result.losses if TASKS[name].final])
            self._put(lambda writer: writer.add_custom_scalars(charts))
        self._last = {name: v for name, v in values.items() if not name.startswith(MODULES)}
        if self._writer and result.said:
            table = _table(shown(result.said, stream))
            self._put(lambda writer: writer.add_text("dev_texts", table, step))
        self.restart_clock()

    def synergy(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, {f"{SYNERGY}/{name}": value for name, value in values.items()})
        self.restart_clock()

    def out_of_memory(self, event: Mapping[str, Any]) -> None:
        """An entry of Progress.out_of_memory."""
        text = "\n".join(f"- {key}: {value}" for key, value in event.items())
        self._put(lambda writer: writer.add_text("out_of_memory", text, event["step"]))
        self._write(event["step"], {f"{OVERVIEW}/micro_batch_size": event["micro_batch_size"]})
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves time spent on evaluation, synergy and checkpoints out of samples_per_s."""
        self._clock, self._samples = time.perf_counter(), 0

    def close(self) -> None:
        """The last thing that is written, for TensorBoard's table of runs, are the settings that are not the defaults, and which figures to
        show beside them."""
        if self._writer:
            from torch.utils.tensorboard.summary import hparams

            settings = {
                key: v if isinstance(v, bool | int | float | str) else str(v)
                for key, v in leaves(self._config).items()
                if (field := config_keys()[key]).is_required() or v != field.get_default(call_default_factory=True)
            }

            def end(writer: Any) -> None:
                for summary in hparams(settings, self._last):
                    writer._get_file_writer().add_summary(summary)
                writer.close()

            self._put(end)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        def write(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        self._put(write)

    def _put(self, write: Callable[[Any], None]) -> None:
        """`write` by TensorBoard's writer, where this process has one."""
        if self._writer:
            self._tensorboard(lambda: write(self._writer))


def _charts(answers: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Custom scalars: what belongs into one picture."""
    lines = lambda *tags: ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]  # noqa: E731
    kinds = ("train_loss", "dev_loss", "constant")
    return {
        "overview": {"loss, dev loss and the constant predictor's": lines(LOSS, DEV, CONSTANT)},
        "answers": {name: lines(*(tag(name, kind) for kind in kinds)) for name in answers},
        "modules": {"gradient norms": ["Multiline", [f"^{MODULES}/.*/grad_norm$"]]},
    }


def _table(examples: list[Example]) -> str:
    """Markdown, in which nothing of a text is markup; a text stands before the first of its answers."""
    lines, before = ["| text | answer | label | said |", "|---|---|---|---|"], None
    for one in examples:
        text = re.sub(r"([\\`*_{}\[\]()#+\-.!|])", r"\\\1", " ".join(one.text.split())) if one.text != before else ""
        lines.append(f"| {html.escape(text, quote=False)} | {one.answer} | {one.label:.2f} | {one.said:.2f} |")
        before = one.text
    return "\n".join(lines)


def memory() -> dict[str, float]:
    """Resident memory of this process and, with a GPU, what torch holds there, in GiB."""
    values = {"host_rss_gib": psutil.Process().memory_info().rss / GIB}
    if has_gpu():
        values["gpu_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        values["gpu_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return values
