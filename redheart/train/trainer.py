"""The training loop: a window of micro-batches through FORWARD, COMPUTE and UPDATE, then log, evaluate, checkpoint.

    for step in …:  window = open_window(…);  forward → compute → backward for each micro-batch;  update
A run is its configuration, its data and one integer, the step: whatever dies resumes bit for bit from a checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from redheart.config import RunConfig
from redheart.console import progress
from redheart.data.stream import SampleStream
from redheart.evaluation.evaluate import Evaluation, evaluate
from redheart.losses.combine import factors
from redheart.ranks import sum_over_ranks
from redheart.schema import Batch
from redheart.tasks import task_weights
from redheart.train import checkpoint, stages
from redheart.train.board import Board
from redheart.train.checkpoint import Progress
from redheart.train.engine import Engine
from redheart.train.guard import NonFiniteGuard, StopRequest
from redheart.train.sample_log import SampleLog
from redheart.train.synergy import Synergy


def every(step: int, n: int) -> bool:
    return step % n == 0


class Trainer:
    """Trains `engine` on a data directory from `state.step` to `total_steps`; see train/start.py for how one is made."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        engine: Engine,
        streams: tuple[SampleStream, SampleStream],
        state: Progress,
        total_steps: int,
        micro_batch_size: int,
        update_parameters: bool = True,
    ):
        self.config, self.run_directory, self.engine, self.state = config, run, engine, state
        self.train_stream, self.dev_stream = streams
        self.total_steps, self.micro_batch_size = total_steps, micro_batch_size
        self.update_parameters = update_parameters
        self.factors = factors(task_weights(config.loss), state.scales, config.loss.constant_floor)
        self.guard = NonFiniteGuard(run, config.training.max_bad_steps)
        self.guard.skipped = state.skipped_steps
        self.board, self.synergy = Board(run, state.step), Synergy(config.loss)
        self.log = SampleLog(run, engine.rank, engine.world_size, state.step) if config.training.log_samples else None

    def run(self) -> StopRequest:
        """Runs to the end, or to a signal; the last thing it does is a checkpoint."""
        state, settings = self.state, self.config.training
        with StopRequest().listening() as stop, progress("training", self.total_steps, state.step) as (bar, task):
            if state.initial_dev_loss is None and self.dev_stream.num_rows:
                before = self._evaluate()
                state.initial_dev_loss, state.initial_dev_losses = before.total, before.losses
            self.board.restart_clock()
            while state.step < self.total_steps:
                window = stages.open_window(self._batches(state.step), stop.wanted)
                if window.stop:
                    break
                self._step(window, want_log=every(state.step + 1, settings.log_every))
                state.step += 1
                bar.update(task, completed=state.step, note=self._note())
                done = state.step == self.total_steps
                improved = False
                if self.dev_stream.num_rows and (done or every(state.step, settings.evaluate_every)):
                    improved = self._is_best(self._evaluate())
                if self.update_parameters and (improved or done or every(state.step, settings.checkpoint_every)):
                    self._save(improved)
                    self.board.restart_clock()
            if self.update_parameters and state.step < self.total_steps:
                self._save(False)
        self.board.close()
        return stop

    def _step(self, window: stages.Window, want_log: bool) -> None:
        """One optimizer step."""
        ranks, sums = self.engine.world_size, dict.fromkeys(window.counts, 0.0)
        for i, batch in enumerate(window.batches):
            outputs = stages.forward(self.engine, batch)
            self.synergy.remember(outputs)
            loss, parts = stages.compute(
                outputs, batch, window.counts, self.factors, window.num_micro_batches * ranks, self.config.loss
            )
            self.engine.backward(loss, is_last=i == window.num_micro_batches - 1)
            sums = {name: sums[name] + value for name, value in parts.items()}
        step = self.state.step
        if self.log:
            self.log.write(step, window.batches)
        learning_rate = stages.learning_rate_at(step, self.total_steps, self.config.optimizer)
        update = stages.update(self.engine, learning_rate * self.update_parameters, want_log)
        self.guard.check(step, update, sums, [i for b in window.batches for i in b.ids])
        self.state.skipped_steps = self.guard.skipped
        self.board.count(self.config.training.global_batch_size)
        if every(step + 1, self.config.training.synergy_every):
            self.board.synergy(step + 1, self.synergy.analyse(self.engine.model, window.batches[0], self.factors))
        if want_log:
            losses = self._global_losses(sums, window.counts)
            total = sum(self.factors[n] * v for n, v in losses.items())
            self.state.last_loss = total
            self.board.train(step + 1, losses, total, update, learning_rate, self.guard.skipped)

    def _global_losses(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """Loss per label over the whole global batch, for the tasks that had labels in it."""
        totals = dict(zip(sums, sum_over_ranks(list(sums.values())), strict=True))
        return {name: totals[name] / counts[name] for name in totals if counts[name] > 0}

    def _batches(self, step: int) -> list[Batch]:
        settings, engine = self.config.training, self.engine
        batches = self.train_stream.micro_batches(
            step, settings.seed, settings.global_batch_size, self.micro_batch_size, engine.rank, engine.world_size
        )
        return [batch.to(engine.device, engine.dtype) for batch in batches]

    def _evaluate(self) -> Evaluation:
        engine, settings = self.engine, self.config.training
        result = evaluate(
            engine.model, self.dev_stream, self.config.loss, self.factors, engine.device, engine.dtype,
            self.micro_batch_size, engine.rank, engine.world_size, settings.evaluate_rows,
        )  # fmt: skip
        self.state.last_dev_loss, self.state.dev_losses = result.total, result.losses
        self.board.dev(self.state.step, result)
        return result

    def _is_best(self, result: Evaluation) -> bool:
        wanted = self.config.training.best_metric
        value = result.total if wanted == "loss" else result.losses[wanted]
        if self.state.best_value is not None and value >= self.state.best_value:
            return False
        self.state.best_value, self.state.best_step = value, self.state.step
        return True

    def _save(self, is_best: bool) -> None:
        self.state.world_size = self.engine.world_size
        is_best = is_best or not self.dev_stream.num_rows  # without dev rows the newest counts as the best
        keep = self.config.training.keep_checkpoints
        checkpoint.save(self.engine, self.run_directory, self.config, self.state, is_best, keep)

    def _note(self) -> str:
        parts = [f"loss {self.state.last_loss:.4f}"] if self.state.last_loss is not None else []
        parts += [f"dev {self.state.last_dev_loss:.4f}"] if self.state.last_dev_loss is not None else []
        return "  ".join(parts)
