"""The training loop: a window of micro-batches through FORWARD, COMPUTE and UPDATE, then log, evaluate, checkpoint.

    for step in …:  window = open_window(…);  forward → compute → backward for each micro-batch;  update
A run is its configuration, its data and one integer, the step: whatever dies resumes bit for bit from a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from redheart.config import RunConfig
from redheart.data.stream import SampleStream
from redheart.evaluation.evaluate import Evaluation, evaluate
from redheart.losses.combine import factors
from redheart.memory.budget import over_host_memory
from redheart.ranks import OutOfMemory
from redheart.schema import Batch, RedHeartError
from redheart.tasks import task_weights
from redheart.train import oom, stages
from redheart.train.aside import Events
from redheart.train.board import Board
from redheart.train.engine import Engine
from redheart.train.guard import NonFiniteGuard, StopRequest
from redheart.train.progress import Progress
from redheart.train.saving import Saver
from redheart.train.spikes import SpikeGuard
from redheart.train.synergy import Synergy

T = TypeVar("T")


def every(step: int, n: int) -> bool:
    return step % n == 0


class Trainer:
    """Trains `engine` on a data directory from `state.step` to `total_steps` or its patience's end; see train/start.py."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        engine: Engine,
        streams: tuple[SampleStream, SampleStream],
        state: Progress,
        total_steps: int,
        update_parameters: bool = True,
        records: bool = True,
    ):
        self.config, self.run_directory, self.engine, self.state, self.records = config, run, engine, state, records
        self.train_stream, self.dev_stream = streams
        self.total_steps, self.update_parameters, self.events = total_steps, update_parameters, Events(run, records)
        self.factors = factors(task_weights(config.loss), state.scales, config.loss.constant_floor)
        self.synergy, self.rehearsals = Synergy(config.loss, state.labels), oom.Rehearsals(config)
        self.guard = NonFiniteGuard(run, config.training.max_bad_steps, state, self.events)
        self.spikes = SpikeGuard(config, run, state, self.factors, self.events, may_rewind=update_parameters)
        self.saver = Saver(config, run, state, self.events, wanted=update_parameters)
        self.board = Board(run, config, state, self.factors, total_steps, engine.rank, engine.world_size, records)

    def run(self) -> StopRequest:
        """Runs to the end, or to a signal; the last thing it does is a checkpoint."""
        state, settings = self.state, self.config.training
        ended = partial(state.ended, self.total_steps, settings.patience if self.update_parameters else None)
        with StopRequest().listening() as stop, self.board.progress() as (bar, task), self.saver:
            if not state.step and state.initial_dev_loss is None and self.dev_stream.num_rows:
                self._fitting(self._evaluate)
                state.initial_dev_loss, state.initial_dev_losses = state.last_dev_loss, state.dev_losses
            if self.spikes.rewinds:
                self.saver.save(self.engine)  # what a spike before the next checkpoint goes back to
            self.board.restart_clock()
            while not (over := over_host_memory(self.config, state.step)) and not ended():
                if not self._fitting(lambda: self._step(stop)):
                    break
                state.step += 1
                if self.spikes.undo(self.engine, self.saver):
                    self.board.reopen()
                    continue
                bar.update(task, completed=state.step, note=state.note())
                done, improved = state.step == self.total_steps, False
                if self.dev_stream.num_rows and (done or every(state.step, settings.evaluate_every)):
                    improved = self._is_best(self._fitting(self._evaluate))
                if improved or done or every(state.step, settings.checkpoint_every):
                    self.saver.save(self.engine)
                    self.board.restart_clock()
            self.saver.save(self.engine, last=True)
        self.board.close()
        if over and not ended():
            raise RedHeartError(over)
        return stop

    def _fitting(self, work: Callable[[], T]) -> T:
        """`work()`; where it runs out of memory, again on an engine that was rebuilt for a smaller micro-batch."""
        while True:
            try:
                return work()
            except OutOfMemory as error:
                reason = str(error)  # what failed holds its activations until this block is left
            self.engine = oom.shrink(self.engine, self.config, self.run_directory, self.state, reason, self.records)
            self.board.out_of_memory(self.state.out_of_memory[-1])

    def _step(self, stop: StopRequest) -> bool:
        """One optimizer step; False, and nothing done, where some rank was asked to stop."""
        step = self.state.step
        batches = self._batches(self.state.reads(step))
        new, asks = self.rehearsals.wanted(self.engine, batches), self.saver.asks(stop.take_save())
        window = stages.open_window(batches, stop.wanted, new, asks)
        if self.saver.heed(self.engine, window.asked):
            self.board.restart_clock()
        if window.stop:
            return False
        self.rehearsals.run(self.engine, window, self.factors, self.config.loss)
        sums, said = stages.accumulate(self.engine, window, self.factors, self.config.loss)
        self.synergy.remember(said)
        self.board.samples(step, window.batches)
        learning_rate = stages.learning_rate_at(step, self.total_steps, self.config.optimizer)
        update = stages.update(self.engine, learning_rate * self.update_parameters)
        losses = stages.global_losses(sums, window.counts)  # ready: the host has waited for the gradient's norms
        total = sum(self.factors[n] * v for n, v in losses.items())
        self.guard.check(step, update, sums, [i for b in window.batches for i in b.ids])
        self.spikes.look(step, losses, total if update.applied else math.nan)
        self.board.count(self.config.training.global_batch_size)
        if every(step + 1, self.config.training.log_every):
            self.state.last_loss = total if math.isfinite(total) else None
            self.board.train(step + 1, losses, total, update, learning_rate)
        if every(step + 1, self.config.training.synergy_every):
            first = batches[0].to(self.engine.device, self.engine.dtype)
            self.board.synergy(step + 1, self.synergy.analyse(self.engine, first, self.factors))
        return True

    def _batches(self, step: int) -> list[Batch]:
        settings, ranks = self.config.training, (self.engine.rank, self.engine.world_size)
        micro = self.state.micro_batch_size
        return self.train_stream.window(step, settings.seed, settings.global_batch_size, micro, *ranks)

    def _evaluate(self) -> Evaluation:
        engine, settings = self.engine, self.config.training
        result = evaluate(
            engine.model, self.dev_stream, self.config.loss, self.factors, engine.device, engine.dtype,
            self.state.micro_batch_size, engine.rank, engine.world_size, settings.evaluate_rows, engine.forward_has_collectives,
        )  # fmt: skip
        self.state.evaluated(result.total, result.losses)
        self.board.dev(self.state.step, result, self.dev_stream)
        return result

    def _is_best(self, result: Evaluation) -> bool:
        return self.state.improves(result.value(self.config.training.best_metric, task_weights(self.config.loss)))
