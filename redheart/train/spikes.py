"""Losses that leap: found by a robust z-score, told, and undone where `guard.on_spike` is rewind.

z = (loss - median) / max(1.4826 MAD, FLOOR · median) over the `guard.window` losses before it (Hampel 1974): neither the trend of a
run nor earlier spikes move median and MAD much. Losses are shares of the constant predictor's, and like is compared with like: with
batches in which the same answers have labels, for in a mixture of corpora the ones spread as the others never do. A batch of a kind
too rare for that is compared with all, and is a spike only if it is worse than three times the constant predictor as well.

A rewind restores the newest checkpoint from before the samples at fault and leaves these out for good (Chowdhery et al. 2022, PaLM): the
steps between are taken again, bit for bit. Every rank has the same sums over ranks, so all find the same; losses and what was left out
are kept with each checkpoint, so a resumed run does, too, wherever its checkpoints lie.

False alarms at a threshold of 20, per 1,000 steps: none where losses are normal or gamma (k = 4), 0.02 lognormal (σ = 0.5), 0.2 with
Student's t of 3 degrees of freedom, 1.1 with 2 (at 12: none, 0.01, 0.3, 0.7, 2.8; 400,000 draws each). `local` on
GoEmotions and ETHICS' pairs, 32 a step, two runs of 937 steps looked at again: none; at most z = 9.7 beside batches of its kind. Before
there were enough of them z was 22.7 at 1.85 of the constant predictor's loss, a batch of the one corpus after sixteen of the other, and
14.0 at 2.6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

from redheart.config import RunConfig
from redheart.console import console
from redheart.ranks import barrier
from redheart.schema import RedHeartError
from redheart.train import checkpoint
from redheart.train.aside import Events
from redheart.train.engine import Engine
from redheart.train.progress import Progress
from redheart.train.saving import Saver

NORMAL = 1.4826  # MADs in a normal distribution's standard deviation
ALL = "all"  # of `recent_losses`: whatever answers they are of
WORSE = 3.0  # times the constant predictor's loss
FLOOR = 0.01  # of the median: losses that hardly vary are no reason to call small steps spikes


class Spike(NamedTuple):
    """The loss of `step` (from 0), as shares of the constant predictor's, and how far it lies above what is usual."""

    step: int
    loss: float
    usual: float
    z: float

    def __str__(self) -> str:
        return (
            f"step {self.step}: loss {self.loss:.3f} of the constant predictor's, {self.z:.0f} robust deviations above the "
            f"usual {self.usual:.3f}"
        )


class SpikeGuard:
    """Looks at the loss of every step that was applied; a run that keeps no checkpoints only warns."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        state: Progress,
        factors: Mapping[str, float],
        events: Events,
        may_rewind: bool,
    ):
        self._config, self._run, self._state, self._events = config, run, state, events
        self.rewinds = may_rewind and config.guard.on_spike == "rewind"
        self._found: Spike | None = None
        self._constant = {name: factor * state.scales[name] for name, factor in factors.items()}

    def look(self, step: int, losses: Mapping[str, float], total: float) -> None:
        """Remembers the global `losses` of `step`, which weigh `total` (NaN: not applied), and tells of a spike."""
        self._found = None
        if not math.isfinite(total):
            return
        answers = " ".join(sorted(name for name in losses if "/" not in name))
        constant = sum(self._constant[name] for name in losses)
        if constant <= 0:  # a batch without a label, or of labels that never vary: nothing to measure it by
            return
        loss = total / constant
        wanted, before = self._config.guard, self._state.recent_losses
        alike = before.get(answers, [])[-wanted.window :]
        recent, least = (alike, 0.0) if len(alike) == wanted.window else (before.get(ALL, []), WORSE)
        self._state.recent_losses = before | {k: [*before.get(k, []), loss][-wanted.window :] for k in (answers, ALL)}
        if len(recent) < wanted.window:
            return
        usual = median(recent)
        deviation = max(NORMAL * median(abs(x - usual) for x in recent), FLOOR * usual)
        if deviation <= 0:  # most of the losses before it were 0
            return
        spike = Spike(step, loss, usual, (loss - usual) / deviation)
        if spike.z <= wanted.threshold or loss <= least:
            return
        self._found = spike
        self._state.spikes += 1
        self._events.write(step, "spike", loss=loss, usual=usual, z=spike.z, reads=self._state.reads(step))
        if not self.rewinds:
            console.print(f"{spike} (guard.on_spike=rewind would leave its samples out)", markup=False)

    def undo(self, engine: Engine, saver: Saver) -> bool:
        """Whether the last step was a spike that has to be undone; engine and state are then as of a checkpoint from before the samples
        at fault, which are left out from now on. Collective. Raises RedHeartError after `guard.max_rewinds`."""
        spike = self._found if self.rewinds else None
        if spike is None:
            return False
        saver.finish()
        state, wanted = self._state, self._config.guard
        if state.rewinds == wanted.max_rewinds:
            raise RedHeartError(
                f"{spike}, and the run went back {state.rewinds} times before (guard.max_rewinds): lower optimizer.learning_rate, "
                f"look at the samples of these steps ({self._run / 'events.jsonl'}), or raise guard.threshold"
            )
        first = max(0, spike.step - wanted.skip_steps + 1)
        source = checkpoint.before(self._run, state, first)
        if source is None:
            raise RedHeartError(f"{spike}, and {self._run} has no checkpoint to go back to: a save has failed before")
        checkpoint.verified(source)
        earlier = checkpoint.read_progress(source)
        left_out = [state.reads(step) for step in range(max(first, earlier.step), spike.step + 1)]
        engine.load(source)
        barrier()
        state.go_back(earlier, left_out)
        console.print(
            f"{spike}: back to {source.name}; {len(left_out)} steps' samples are left out from step {spike.step + 1 - len(left_out)} "
            f"on (rewind {state.rewinds} of {wanted.max_rewinds})",
            markup=False,
        )
        checkpoint.forget_lost_best(state, self._run)  # it may have made room for a better one that is undone now
        self._events.write(spike.step, "rewind", to_step=state.step, left_out=left_out, rewinds=state.rewinds)
        return True
