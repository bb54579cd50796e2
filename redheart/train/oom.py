"""What a run does when the micro-batch turns out too large: the same step again, with a smaller one, on a rebuilt engine.

Every rank has to notice. FORWARD and COMPUTE hold no collective (ZeRO-1 and 2), so ranks agree after them
(ranks.together). A backward pass under ZeRO reduces gradients as it goes: whoever leaves it leaves the others waiting. So on
several ranks a micro-batch larger than any before is first rehearsed: forward and backward with torch.autograd.grad, which
runs no gradient hook, hence no collective, and keeps no gradient; then the ranks agree, then the step begins. On one process
the backward pass itself may fail. The global batch stays the same, so does every sample's dropout, and so does the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redheart.config import LossConfig, RunConfig
from redheart.console import console
from redheart.files import remove, write_json
from redheart.model.build import Place, build_model, model_config
from redheart.model.prior import Start, start_at
from redheart.model.redheart import RedHeartModel
from redheart.ranks import barrier, is_main, launched_world_size, together
from redheart.schema import Batch, RedHeartError
from redheart.train.checkpoint import REBUILD
from redheart.train.engine import DeepSpeedEngine, Engine, free_memory, make_engine
from redheart.train.moments import carry
from redheart.train.progress import Progress
from redheart.train.stages import Window, loss_of, split_global_batch
from redheart.train.stored import fill, fitting

Shape = tuple[int, ...]  # rows, tokens, contrast rows, contrast tokens


def build_engine(
    config: RunConfig,
    encoder: dict[str, Any] | None,
    run: Path,
    micro_batch_size: int,
    init: Path | None = None,
    start: Start | None = None,
    records: bool = True,
) -> Engine:
    """A fresh network from the run's seed on the configured engine; DeepSpeed's settings go to RUN/ds_config.json with `records`.

    `micro_batch_size` has to divide what one rank has of the global batch. `init`: where its weights come from instead;
    `start`: what it knows of its data (model/prior.py).
    """
    torch.manual_seed(config.training.seed)
    stored = fitting(model_config(config, encoder), init) if init else None

    def build(place: Place) -> RedHeartModel:
        def start_and_place(name: str, module: nn.Module) -> None:
            if stored:
                fill(stored, name, module)
            elif start:
                start_at(name, module, start)
            place(name, module)  # last: it may cut the module up

        return build_model(config, encoder, start_and_place)

    accumulation = config.training.global_batch_size // launched_world_size() // micro_batch_size
    engine = make_engine(build, config, accumulation, micro_batch_size)
    if stored and (steps := carry(engine, stored)) is not None:
        console.print(f"the optimizer goes on with the moments of {steps} steps that {init} carries")
    if records and is_main() and isinstance(engine, DeepSpeedEngine):
        write_json(run / "ds_config.json", engine.settings)
    return engine


def shrink(engine: Engine, config: RunConfig, run: Path, state: Progress, reason: str, records: bool = True) -> Engine:
    """Another engine where `engine` stood after its last step, for the next smaller micro-batch; `state` keeps the event.

    `engine` is closed. Collective; gradients of the step under way are dropped. Call it when the exception is no longer being
    handled: its traceback holds the activations. Raises RedHeartError where the micro-batch is one sample already.
    """
    before = state.micro_batch_size
    if before == 1:
        raise RedHeartError(
            f"out of memory at step {state.step} with a micro-batch of one sample ({reason}): set "
            "model.activation_checkpointing=true, choose a memory.strategy that keeps more on the host, or shorten "
            "data.encoder.max_tokens; `redheart plan` shows what fits"
        )
    after, accumulation = split_global_batch(config.training.global_batch_size, before // 2, engine.world_size)
    console.print(
        f"out of memory at step {state.step} ({reason}): micro-batch {before} → {after}, accumulation {accumulation}, the "
        "same global batch; rebuilding the engine …"
    )
    free_memory()
    directory = run / REBUILD
    if is_main():
        remove(directory)
        directory.mkdir(parents=True)
    barrier()
    engine.save(directory)
    engine.close()
    barrier()
    rebuilt = build_engine(config, state.encoder, run, after, records=records)
    rebuilt.load(directory)
    barrier()
    if is_main():
        remove(directory)
    state.micro_batch_size = after
    state.out_of_memory.append(
        {
            "step": state.step,
            "micro_batch_size_before": before,
            "micro_batch_size": after,
            "gradient_accumulation_steps": accumulation,
            "configured_micro_batch_size": config.training.micro_batch_size,
            "reason": reason,
        }
    )
    return rebuilt


def wanted_micro_batch_size(config: RunConfig, state: Progress) -> int:
    """The configured micro-batch, or the smaller one that a resumed run had come to with that same setting."""
    configured = config.training.micro_batch_size
    if state.out_of_memory and state.out_of_memory[-1]["configured_micro_batch_size"] == configured:
        return state.micro_batch_size
    return configured


class Rehearsals:
    """Which shapes of micro-batches have gone through a backward pass, and the rehearsal of those that have not."""

    def __init__(self, config: RunConfig):
        self._strategy = config.memory.strategy
        self._proven: list[Shape] = []

    def wanted(self, engine: Engine, batches: Sequence[Batch]) -> bool:
        """Whether this rank has something to rehearse: never on one process, where the real backward pass may fail."""
        return engine.world_size > 1 and not engine.forward_has_collectives and not all(map(self._covers, batches))

    def run(self, engine: Engine, window: Window, factors: Mapping[str, float], config: LossConfig) -> None:
        """Forward and backward of every new shape of a window, largest first, where any rank has one.

        No effect but the memory that it takes. Raises OutOfMemory on every rank. The bare model runs, not the engine, whose
        hooks would prepare a real backward pass.
        """
        if window.rehearse:
            with together():
                self._run(engine, window, factors, config)

    def _run(self, engine: Engine, window: Window, factors: Mapping[str, float], config: LossConfig) -> None:
        parameters = list(engine.model.parameters())
        spare = torch.empty(self._spare_bytes(engine, parameters), dtype=torch.uint8, device=engine.device)
        hooks = [p.register_hook(_no_memory) for p in parameters]
        try:
            for batch in sorted(window.batches, key=lambda b: b.features.shape[:2].numel(), reverse=True):
                if not self._covers(batch):
                    _, loss, _ = loss_of(engine.model, engine, batch, window, factors, config)
                    torch.autograd.grad(loss, parameters, allow_unused=True)
                    self._proven = [s for s in self._proven if not _within(s, _shape(batch))] + [_shape(batch)]
        finally:
            for hook in hooks:
                hook.remove()
            del spare

    def _covers(self, batch: Batch) -> bool:
        return any(_within(_shape(batch), proven) for proven in self._proven)

    def _spare_bytes(self, engine: Engine, parameters: Sequence[torch.Tensor]) -> int:
        """What a real backward pass takes beside its own: gradients that accumulate on the device, in fp32 at most, and two
        fp32 copies of the largest one on its way into a bucket or to the host."""
        sizes = [p.numel() for p in parameters]
        share = {"zero1": 1, "zero2": engine.world_size, "gpu_8bit": engine.world_size}.get(self._strategy)
        return 4 * (2 * max(sizes) + (sum(sizes) // share if share else 0))


def _no_memory(gradient: torch.Tensor) -> torch.Tensor:
    """A zero that looks like the gradient and takes one element; the gradient itself is freed."""
    return gradient.new_zeros(()).expand_as(gradient)


def _shape(batch: Batch) -> Shape:
    return (*batch.features.shape[:2], *batch.contrast_features.shape[:2])


def _within(shape: Shape, limit: Shape) -> bool:
    return all(a <= b for a, b in zip(shape, limit, strict=True))
