"""redheart bench trainer: what the trainer costs around the step, beside a bare torch loop and beside transformers' Trainer.

Three legs over the same shards with the same network, losses, batch sizes and clipping, in turn, each in a process of its own; samples
per second are medians over the rounds, the first steps of a leg left out.

redheart    `redheart.train` from start to end, logging as the preset does; evaluations and checkpoints are not counted
bare_loop   forward, losses, backward, clip_grad_norm_, torch's fused AdamW at one rate; its batches are ours, made before the clock starts
hf_trainer  transformers' Trainer, its own random batches of the same rows, fused AdamW, and the same DeepSpeed configuration where the
            strategy is one of DeepSpeed's

    python -m redheart.bench.trainer '{"leg": …}'      one leg, as the bench starts them; prints samples per second
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from redheart.caches import cache_directory
from redheart.config import DataConfig, LabelerConfig, RunConfig, load_config
from redheart.console import console
from redheart.data.fingerprint import with_encoder
from redheart.data.prepare import prepare
from redheart.data.stream import SampleStream
from redheart.device import compute_device
from redheart.evaluation.curves import RATE, scalars
from redheart.losses.combine import factors
from redheart.model.build import build_model
from redheart.options import Preset, Rounds, Set
from redheart.schema import Batch, RedHeartError
from redheart.tasks import constant_losses, task_weights
from redheart.train import stages
from redheart.train.engine.base import adamw_arguments, parameter_groups
from redheart.train.engine.machinery import deepspeed_config, import_machinery
from redheart.train.start import train

LEGS = ("redheart", "bare_loop", "hf_trainer")
WARM = 10  # steps of a leg that do not count


def bench_trainer(
    data: Annotated[
        Path | None, typer.Option("--data", help="A prepared directory. [default: the shipped texts, prepared once]")
    ] = None,
    preset: Preset = "local",
    set_: Set = None,
    strategy: Annotated[
        str, typer.Option("--strategy", help="memory.strategy of ours and of Transformers' Trainer.")
    ] = "plain",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of a leg that are timed.")] = 40,
    rounds: Rounds = 3,
) -> dict[str, Any]:
    """Samples per second of `train`, beside a bare torch loop and Transformers' Trainer on the same shards, in turns."""
    directory = data or cache_directory() / "bench-trainer"
    if not data:
        prepare(["everyday"], directory, DataConfig(labeler=LabelerConfig(max_texts=0)))
    never = ("evaluate_every", "checkpoint_every", "synergy_every")
    settings = [*(set_ or ()), f"memory.strategy={strategy}", *(f"training.{name}=1000000" for name in never)]
    window = (config := load_config(preset, settings)).training.log_every
    warm, timed = -(-WARM // window) * window, -(-steps // window) * window  # whole windows of the log
    job = {"data": str(directory), "preset": preset, "set": settings, "warm": warm, "steps": warm + timed}
    rates: dict[str, list[float]] = {leg: [] for leg in LEGS}
    for i in range(rounds):
        for leg in LEGS:
            rates[leg].append(_process({**job, "leg": leg}))
        console.print(f"round {i + 1}: " + ", ".join(f"{leg} {rates[leg][-1]:.1f}" for leg in LEGS) + " samples/s")
    speed = {leg: statistics.median(found) for leg, found in rates.items()}
    return {
        "samples_per_s": speed,
        **{f"ratio_to_{leg}": speed["redheart"] / speed[leg] for leg in LEGS[1:]},
        "rounds": rates, "preset": preset, "strategy": strategy, "steps": timed, "load_average": os.getloadavg()[0],
        "global_batch_size": config.training.global_batch_size, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _process(job: dict[str, Any]) -> float:
    command = [sys.executable, "-m", "redheart.bench.trainer", json.dumps(job)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise RedHeartError(f"bench trainer: {job['leg']} failed: {done.stderr.strip()[-800:]}")
    return float(done.stdout.strip().splitlines()[-1])


def _redheart(job: dict[str, Any], config: RunConfig) -> float:
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        train(config, job["data"], run)
        rates = [rate for step, rate in scalars(run, RATE)[RATE].items() if step > job["warm"]]
    return statistics.harmonic_mean(rates)


class _Clock:
    """Samples per second from the end of step `warm` to the end of step `steps`."""

    def __init__(self, job: dict[str, Any], config: RunConfig):
        self._first, self._last, self._size = job["warm"], job["steps"], config.training.global_batch_size
        self._started = self.rate = 0.0

    def ended(self, step: int) -> None:
        if step in (self._first, self._last):
            if compute_device().type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.rate = (self._last - self._first) * self._size / (now - self._started)
            self._started = now


class _WithLoss(nn.Module):
    """The network and its losses as Transformers' Trainer wants them: tensors by name in, {"loss": …} out."""

    def __init__(self, config: RunConfig, stream: SampleStream):
        super().__init__()
        torch.manual_seed(config.training.seed)
        self.network = build_model(config, stream.encoder)
        self.to(compute_device())
        scales = constant_losses(*stream.label_sample(), config.loss)
        self._factors, self._config = factors(task_weights(config.loss), scales, config.loss.constant_floor), config

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = _batch(tensors)
        counts = stages.open_window([batch], False).counts
        on_device = batch.to(compute_device(), next(self.parameters()).dtype)
        outputs = stages.forward(self.network, on_device)
        return {"loss": stages.compute(outputs, on_device, counts, self._factors, 1, self._config.loss)[0]}


def _flat(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch's tensors by name; those of a dictionary as FIELD.KEY."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    nested = {f"{n}.{k}": x for n, v in values.items() if isinstance(v, dict) for k, x in v.items()}
    return {n: v for n, v in values.items() if isinstance(v, torch.Tensor)} | nested


def _batch(tensors: dict[str, torch.Tensor]) -> Batch:
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        field, _, key = name.partition(".")
        found |= {field: {**found.get(field, {}), key: tensor} if key else tensor}
    return Batch(**found)


def _bare_loop(job: dict[str, Any], config: RunConfig) -> float:
    settings, stream, clock = config.training, SampleStream(job["data"], "train"), _Clock(job, config)
    model = _WithLoss(config, stream)
    groups = parameter_groups(model.network, config.optimizer.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True, **adamw_arguments(config.optimizer))
    micro, _ = stages.split_global_batch(settings.global_batch_size, settings.micro_batch_size, 1)
    sizes = settings.seed, settings.global_batch_size, micro, 0, 1
    batches = [[*stream.micro_batches(step, *sizes)] for step in range(job["steps"])]
    for step, window in enumerate(batches):
        for batch in window:
            with torch.autocast(compute_device().type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = model(**_flat(batch))["loss"]
            (loss / len(window)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.ended(step + 1)
    return clock.rate


def _hf_trainer(job: dict[str, Any], config: RunConfig) -> float:
    settings, stream, clock = config.training, SampleStream(job["data"], "train"), _Clock(job, config)
    micro, accumulation = stages.split_global_batch(settings.global_batch_size, settings.micro_batch_size, 1)
    machinery: dict[str, Any] = {}
    if config.memory.strategy != "plain":
        import_machinery()
        machinery = {"deepspeed": deepspeed_config(config, accumulation, micro, 1), "ddp_backend": "gloo"}
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Ended(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            clock.ended(state.global_step)

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        numbers = np.array(rows)
        return _flat(stream.batch(numbers, numbers))

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, max_steps=job["steps"], per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation,
            optim="adamw_torch_fused", learning_rate=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.max_grad_norm, lr_scheduler_type="cosine", bf16=settings.precision == "bf16",
            logging_steps=settings.log_every, report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            **machinery,
        )  # fmt: skip
        rows: Any = range(stream.num_rows)  # a data set of row numbers
        Trainer(_WithLoss(config, stream), arguments, collate, rows, callbacks=[Ended()]).train()
    return clock.rate


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    leg = {"redheart": _redheart, "bare_loop": _bare_loop, "hf_trainer": _hf_trainer}[job["leg"]]
    config = load_config(job["preset"], [*job["set"], f"training.max_steps={job['steps']}"])
    print(leg(job, with_encoder(config, SampleStream(job["data"], "train").encoder)))
