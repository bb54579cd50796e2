"""When a run's checkpoints are written, and what they cost: the trainer's side of train/checkpoint.py."""

from __future__ import annotations

from pathlib import Path

from redheart.config import RunConfig
from redheart.train import checkpoint
from redheart.train.aside import Events
from redheart.train.checkpoint import Progress
from redheart.train.engine import Engine


class Saver:
    """Saves a run; `wanted` is False for a dry run, which has nothing to save."""

    def __init__(self, config: RunConfig, run: Path, state: Progress, events: Events, wanted: bool):
        self._config, self._run, self._state, self._events = config, run, state, events
        self._wanted = wanted
        self._saved = state.step if checkpoint.holds(run, state.step) else None  # the step of the last checkpoint

    def save(self, engine: Engine) -> None:
        """A checkpoint of the present step, unless it is there. Collective."""
        if not self._wanted or self._saved == self._state.step:
            return
        self._state.world_size, self._saved = engine.world_size, self._state.step
        checkpoint.save(engine, self._run, self._config, self._state, self._config.checkpoint.keep_last)
