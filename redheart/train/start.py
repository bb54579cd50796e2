"""From a configuration, a data directory and a run directory to a trained run: checks, engine, trainer, export."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from redheart.config import THIRDS, RunConfig, write_config
from redheart.console import console, unheard
from redheart.data.fingerprint import check_encoder, with_encoder
from redheart.data.shards import LABEL_REMEDY
from redheart.data.stream import SampleStream
from redheart.device import bf16_is_fast, compute_device
from redheart.evaluation.rows import Rows
from redheart.evaluation.trained import joined, label_counts, label_weights, labelled_entries
from redheart.files import write_json
from redheart.memory.refuse import check_memory, planned_and_taken, show_taken
from redheart.model.build import model_config
from redheart.model.regional import compiler, few_shapes
from redheart.ranks import barrier, check_launch, launched_rank, launched_world_size, naming_lost_ranks
from redheart.schema import RedHeartError
from redheart.tasks import constant_losses, what_is_known
from redheart.train import checkpoint
from redheart.train.agree import agree
from redheart.train.calibrate import calibrate_best
from redheart.train.claim import RESULT, Claim, naming_no_room
from redheart.train.engine import PlainEngine, check_engine
from redheart.train.engine.machinery import START_S
from redheart.train.length import steps_of
from redheart.train.named import check_names, check_settings
from redheart.train.oom import build_engine, wanted_micro_batch_size
from redheart.train.own import prepared
from redheart.train.progress import Progress
from redheart.train.resume import accept, command, order_of_rows
from redheart.train.stages import looking_ten_times, split_global_batch
from redheart.train.stalls import stacks
from redheart.train.stored import fitting, open_stored
from redheart.train.trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `signal` is the number of the signal that stopped it, or None."""

    run: Path
    state: Progress
    total_steps: int
    seconds: float
    signal: int | None
    memory: dict[str, dict[str, float]]  # planned beside taken: memory/refuse.py
    go_on: str  # how to go on with it
    calibration: Path | None = None  # of its best checkpoint, where it came to its end
    from_step: int = 0  # where this launch began
    saving: dict[str, float] = field(default_factory=dict)  # train/saving.py; of this launch
    resume_s: float | None = None  # from the command to the first step, where it went on with a run
    recorded: bool = True
    best_metric: str = "loss"

    @property
    def end(self) -> str:
        """In words, how it ended."""
        if self.signal or self.state.step >= self.total_steps:
            return "stopped" if self.signal else "finished"
        looks = self.state.looks_since_best
        at_once = (
            f"; --set training.patience={looks + 1} or more, or null, goes on"
            if self.from_step == self.state.step
            else ""
        )
        return f"nothing better on dev in {looks} looks (training.patience{at_once}): finished"

    def summary(self) -> str:
        """How it ended, in a sentence."""
        state = self.state
        said = f"{self.end} at step {state.step} of {self.total_steps} after {self.seconds:.0f} s"
        if state.initial_dev_loss is not None and state.last_dev_loss is not None:
            said += f"; dev loss {state.initial_dev_loss:.4f} → {state.last_dev_loss:.4f}"
        if state.best_value is not None:
            what = "" if self.best_metric == "loss" else f"{self.best_metric} "
            said += f", best {what}{state.best_value:.4f} at step {state.best_step}"
        return f"{said}; " + (f"everything is in {self.run}" if self.recorded else f"{self.run} is as it was")

    def costs(self) -> str:
        """What saving took, and what did not go as usual, in a line."""
        s, state = self.saving, self.state
        told = [f"{s['checkpoints']:.0f} checkpoints, {s['mib']:,.1f} MiB, {100 * s['share']:.1f} % of the time"]
        told += [f"resumed after {self.resume_s:.1f} s"] if self.resume_s is not None else []
        counts = {"spikes": state.spikes, "rewinds": state.rewinds, "skipped steps": state.skipped_steps}
        counts |= {"failed saves": int(s["failed"]), "smaller micro-batches": len(state.out_of_memory)}
        events = ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "no spikes, no skipped steps"
        return f"saved: {'; '.join(told)}; {events}"

    def to_json(self) -> dict[str, Any]:
        state = self.state
        return {
            "run": str(self.run), "from_step": self.from_step, "steps": state.step, "total_steps": self.total_steps,
            "seconds": self.seconds, "world_size": state.world_size,
            "initial_dev_loss": state.initial_dev_loss, "last_dev_loss": state.last_dev_loss,
            "best_metric": self.best_metric, "best_value": state.best_value, "best_step": state.best_step,
            "last_loss": state.last_loss,
            "skipped_steps": state.skipped_steps, "spikes": state.spikes, "rewinds": state.rewinds, "saving": self.saving,
            "resume_s": self.resume_s, "signal": self.signal,
            "micro_batch_size": state.micro_batch_size, "out_of_memory": state.out_of_memory,
            "changes": state.changes, "memory": self.memory,
            "calibration": str(self.calibration) if self.calibration else None,
        }  # fmt: skip


def train(
    config: RunConfig,
    data: str | Path | None,
    run: Path,
    resume: str | None = None,
    overwrite: bool = False,
    update_parameters: bool = True,
    init: Path | None = None,
) -> TrainResult:
    """Trains and leaves everything under `run`. Every rank calls it. Raises RedHeartError before anything is written if it cannot.

    `data`: None prepares the table of `config.data.file` first (train/own.py).
    `init`: an export, a checkpoint or a run whose weights the run starts from, instead of random ones.
    A dry run (`update_parameters` False) that goes on with a run leaves its records as they are.
    """
    check_launch()
    check_engine(config)
    split_global_batch(config.training.global_batch_size, config.training.micro_batch_size, launched_world_size())
    if init and resume:
        raise RedHeartError("--init starts a run and --resume goes on with one: give only one of them")
    if overwrite and resume:
        raise RedHeartError("--overwrite replaces a run and --resume goes on with one: give only one of them")
    with Claim(run) as claim:
        if data is None:
            claim.refuse(bool(resume), overwrite)
            if not resume:
                _check_before_data(config, run, overwrite, init)
            data = prepared(config, run, bool(resume))
        return _train(claim, config, data, run, resume, overwrite, update_parameters, init)


def _check_before_data(config: RunConfig, run: Path, overwrite: bool, init: Path | None) -> None:
    """What can be refused before a table is prepared, which takes its time and replaces what an earlier run was trained on."""
    check_settings(config)
    if init:
        source = open_stored(init)
        check_init_stays(init, run, overwrite)
        fitting(model_config(config, source.sizes.encoder), init)
    micro, accumulation = split_global_batch(
        config.training.global_batch_size, config.training.micro_batch_size, launched_world_size()
    )
    check = partial(check_memory, config, micro, accumulation, config.data.encoder.most_tokens)
    if launched_rank() == 0:
        try:
            with unheard():  # it is told once more when the data is there
                check()
        except RedHeartError:
            check()


def _train(
    claim: Claim,
    config: RunConfig,
    data: str | Path,
    run: Path,
    resume: str | None,
    overwrite: bool,
    update_parameters: bool,
    init: Path | None,
) -> TrainResult:
    began = time.perf_counter()
    streams = _open_streams(data, config)
    made_with, named = streams[0].encoder, config.data.encoder
    config = with_edges(with_encoder(config, made_with), streams[0])
    check_encoder(made_with, config.data.encoder, config.model.encoder_width)
    if config.data.encoder != named:
        console.print(f"data.encoder is the data's: {made_with['name']}, hidden layers {made_with['layers']}")
    check_names(config, streams[1])
    source = checkpoint.find(resume, run) if resume else None
    state = checkpoint.read_progress(source) if source else Progress()
    total_steps = steps_of(config, streams[0].rows_per_epoch)
    config = looking_ten_times(config, total_steps)
    if source:
        accept(source, state, config, run, streams[0].index, total_steps)
    state.encoder, state.sources = streams[0].encoder, streams[0].index["sources"]
    state.order = order_of_rows(streams[0].index)
    state.data = str(data) if "://" in str(data) else str(Path(data).resolve())
    state.micro_batch_size, accumulation = split_global_batch(
        config.training.global_batch_size, wanted_micro_batch_size(config, state), launched_world_size()
    )
    records = update_parameters or not source
    if source:
        checkpoint.go_on(state, source, run, quiet=not records)
    planned = None
    if launched_rank() == 0:
        planned = check_memory(config, state.micro_batch_size, accumulation, config.data.encoder.most_tokens)

    split = streams[0].index["splits"]["train"]
    weights, counts = label_weights(split["histograms"]), label_counts(split)
    state.labels, state.label_counts = joined(state.labels, weights), joined(state.label_counts, counts)
    if init:  # where it is not known what it learned before, nothing is known
        stored = fitting(model_config(config, state.encoder), init)
        state.init, earlier = str(stored.directory.resolve()), stored.progress
        state.labels = joined(earlier.labels, weights) if earlier.labels else {}
        state.label_counts = joined(earlier.label_counts, counts) if earlier.label_counts else {}
    if init:
        check_init_stays(init, run, overwrite)
    # what no label taught would move the dev loss at random
    dev = Rows(data, "dev", config.data.remote, labelled_entries(state.labels), few_shapes(config))
    check_names(config, dev)
    claim.take(bool(source), overwrite, config.training.log_samples)
    if launched_rank() == 0 and not source:  # else it is written once the checkpoint is loaded
        write_config(run / "config.yaml", config)
    if config.memory.strategy != "plain":
        others = launched_world_size() - 1
        waiting = f"; waiting up to {START_S} s for {others} other processes of this launch" if others else ""
        console.print(f"starting DeepSpeed (its kernels compile on first use, about a minute){waiting} …")
    known = None
    if not source:
        sample = streams[0].label_sample()
        state.scales = constant_losses(*sample, config.loss)
        known = what_is_known(*sample, state.scales, config.loss)
    with (
        naming_no_room(run),
        naming_lost_ranks(
            "once all processes have ended, the same command with --resume goes on from the last checkpoint "
            "(training.collective_timeout_s is how long ranks wait for each other)",
            lambda: f" at step {state.step}",
        ),
    ):
        engine = build_engine(config, state.encoder, run, state.micro_batch_size, init, known, records)
        agree(run, config, streams[0].index, source)
        if source:
            engine.load(source)
            barrier()  # every rank has read what it needs
            if launched_rank() == 0 and records:
                checkpoint.clear(run, config if source == checkpoint.last(run) else None)
                write_config(run / "config.yaml", config)
            barrier()
        _announce(config, engine.world_size, accumulation, total_steps, state)
        trainer = Trainer(config, run, engine, (streams[0], dev), state, total_steps, update_parameters, records)
        started, first = time.perf_counter(), state.step
        with stacks(run):
            stop = trainer.run()
        barrier()
    if isinstance(trainer.engine, PlainEngine) and trainer.engine.swap.names:
        console.print(str(trainer.engine.swap.report()))
    if config.training.compile == "regional":
        console.print(str(compiler()))
    seconds = time.perf_counter() - started
    memory = planned_and_taken(planned) if planned and launched_world_size() == 1 else {}
    show_taken(memory)
    calibration = None
    if update_parameters and not stop.signal and state.ended(total_steps, config.training.patience):
        trainer.engine.close()
        if launched_rank() == 0:
            calibration = calibrate_best(run, streams[1], state)
    go_on = command(run) if update_parameters else "a dry run keeps no checkpoint: start it again"
    result = TrainResult(
        run, state, total_steps, seconds, stop.signal, memory, go_on, calibration, first, trainer.saver.figures(),
        started - began if source else None, records, config.training.best_metric,
    )  # fmt: skip
    if update_parameters:
        console.print(result.costs())
        if launched_rank() == 0:
            write_json(run / RESULT, result.to_json())
    return result


def check_init_stays(init: Path, run: Path, overwrite: bool) -> None:
    if overwrite and init.resolve().is_relative_to(run.resolve()):
        raise RedHeartError(f"--overwrite would remove {init}, which --init reads: name another --out")


def with_edges(config: RunConfig, train: SampleStream) -> RunConfig:
    """The configuration with the edges of regret's levels that the data's own SURD labels were derived with."""
    where = f"{train.store.location}/index.json"
    if "levels" not in train.index:
        raise RedHeartError(f"{where} names no levels, so an earlier version wrote it: prepare the data again")
    edges = tuple(train.index["levels"]["regret"])
    if config.loss.regret_edges not in (THIRDS, edges):
        raise RedHeartError(
            f"loss.regret_edges is {list(config.loss.regret_edges)}, and {where} says {list(edges)}: leave it out"
        )
    return config.model_copy(update={"loss": config.loss.model_copy(update={"regret_edges": edges})})


def _open_streams(data: str | Path, config: RunConfig) -> tuple[SampleStream, SampleStream]:
    few = few_shapes(config)
    streams = SampleStream(data, "train", config.data.remote, few), SampleStream(data, "dev", config.data.remote, few)
    if not streams[0].num_rows:
        raise RedHeartError(f"{data} has no training rows: prepare more samples, or give some of them split 'train'")
    if not streams[0].index["splits"]["train"]["histograms"]:
        raise RedHeartError(
            f"no row of the training split of {data} has a label, and every loss would be 0: {LABEL_REMEDY}"
        )
    return streams


def _announce(config: RunConfig, world_size: int, accumulation: int, total_steps: int, state: Progress) -> None:
    console.print(
        f"training {config.preset}: {total_steps} steps of {config.training.global_batch_size} samples "
        f"(micro-batch {state.micro_batch_size} × accumulation {accumulation} × ranks {world_size}), {config.memory.strategy}, "
        f"{config.training.precision}"
        + (f", ablation without {', '.join(config.model.ablate)}" if config.model.ablate else "")
        + (f", resumed at step {state.step}" if state.step else "")
        + (", each shape of a micro-batch is compiled when it first comes" if config.training.compile != "off" else "")
    )
    if config.training.precision == "bf16" and not bf16_is_fast(compute_device()):
        console.print(
            f"the {compute_device().type} here emulates bf16, a CPU some 60 times slower than --set training.precision=fp32"
        )
