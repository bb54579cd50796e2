"""torch alone on one process: the reference that the other engines are tested against."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from redheart.config import RunConfig
from redheart.device import compute_device
from redheart.memory.malloc import map_pieces
from redheart.memory.swap import place
from redheart.model.redheart import module_of
from redheart.optim.adam8bit import CPUAdamW8bit
from redheart.schema import RedHeartError
from redheart.train.engine.base import (
    Build,
    Engine,
    Update,
    adamw_arguments,
    clip_coefficient,
    free_memory,
    host_copy,
    norms_of,
    parameter_groups,
    read_norms,
    states_of,
)
from redheart.train.engine.machinery import not_tensors, torn
from redheart.train.engine.moments import Piece, Read, adopt

PLAIN_STATE = "plain_state.pt"


class PlainEngine(Engine):
    """torch.optim.AdamW (on the CPU also 8-bit states) on one process, fp32 weights, bf16 through autocast.

    Modules of `memory.swap` have their weights, gradients and optimizer states on the host, and are computed on the device.
    """

    def __init__(self, build: Build, config: RunConfig, accumulation: int):
        self.device = compute_device()
        if self.device.type == "cpu":
            map_pieces(None)
        self.model, self.rank, self.world_size = build(lambda name, module: None), 0, 1
        if self.device.type == "cpu":
            map_pieces(sum(p.numel() for p in self.model.parameters()))
        self.swap = place(self.model, self.device, config.memory.swap)
        self._owned = [(module_of(n), p) for n, p in self.model.named_parameters()]  # a walk through all modules, once
        self.dtype = torch.float32
        self._accumulation, self._max_norm = accumulation, config.optimizer.max_grad_norm
        self._autocast = config.training.precision == "bf16"
        groups = parameter_groups(self.model, config.optimizer.weight_decay)
        arguments = adamw_arguments(config.optimizer)
        self._optimizer: torch.optim.Optimizer
        if config.optimizer_name == "adamw_8bit":
            self._optimizer = CPUAdamW8bit(groups, seed=config.training.seed, **arguments)
        else:
            self._optimizer = torch.optim.AdamW(groups, fused=True, **arguments)

    def __call__(self, **inputs: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.model(**inputs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> Update:
        given = [(owner, p.grad) for owner, p in self._owned if p.grad is not None]
        owners, gradients = [owner for owner, _ in given], [g for _, g in given]
        norms = read_norms(self.model.built, owners, norms_of(gradients))  # the one wait of a step
        update = Update(all(map(math.isfinite, norms.values())), norms)
        if update.applied:
            clip = clip_coefficient(update.grad_norm, self._max_norm)
            if clip < 1:
                torch._foreach_mul_(gradients, clip)
            self._optimizer.step()
        self._optimizer.zero_grad()
        return update

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def save(self, directory: Path) -> None:
        torch.save(self._state(), directory / PLAIN_STATE)

    def stage(self, directory: Path) -> Callable[[], None]:
        return partial(torch.save, host_copy(self._state()), directory / PLAIN_STATE)

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def optimizer_states(self) -> Iterator[torch.Tensor]:
        return states_of(self._optimizer)

    def load(self, directory: Path) -> None:
        if not (directory / PLAIN_STATE).is_file():
            raise RedHeartError(
                f"{directory} was not saved with memory.strategy=plain: resume with the strategy it names"
            )
        state = read_state(directory, self.device)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def set_moments(self, read: Read, step: int) -> None:
        for name, p in self.model.named_parameters():
            adopt(self._optimizer, p, [Piece(name, 0, 0, p.numel())], read, step)

    def close(self) -> None:
        del self.model, self.swap, self._optimizer, self._owned
        free_memory()


def read_state(directory: Path, device: torch.device | str = "cpu", mmap: bool = False) -> dict[str, Any]:
    """{"model", "optimizer"} of a checkpoint of this engine; one that holds more than tensors is an error, and nothing of it is run."""
    try:
        return torch.load(directory / PLAIN_STATE, map_location=device, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise not_tensors(error) from None
    except Exception as error:
        if not torn(error):
            raise
        raise RedHeartError(
            f"{directory / PLAIN_STATE} is no whole file of torch's: choose another checkpoint"
        ) from None
