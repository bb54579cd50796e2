"""What the trainer needs of an engine, and what all engines share."""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redheart.config import OptimizerConfig
from redheart.device import has_gpu
from redheart.memory.malloc import trim
from redheart.model.build import Place
from redheart.model.redheart import RedHeartModel, module_of
from redheart.ranks import sum_over_ranks
from redheart.train.engine.moments import Read

Build = Callable[[Place], RedHeartModel]  # a fresh network, each of whose modules has gone through `place` once built


class Engine(ABC):
    """Holds the model and its optimizer. `dtype` is what features are cast to."""

    model: RedHeartModel  # the bare module, for evaluation and analysis
    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    forward_has_collectives = False  # ZeRO-3 gathers parameters in the forward pass

    @abstractmethod
    def __call__(self, **inputs: Any) -> Any:
        """The training forward pass; keywords and outputs as RedHeartModel.forward."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Adds the gradients of one micro-batch; `is_last` ends the accumulation window."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For passes through `model` alone that end in torch.autograd.grad of activations: the training step is not touched."""
        yield

    @abstractmethod
    def non_finite(self) -> bool:
        """Whether any rank's accumulated gradient is not finite. Collective; between the last backward and step."""

    @abstractmethod
    def squared_norms(self) -> dict[str, float]:
        """Σ g² of every module over this rank's share of the accumulated gradient."""

    @abstractmethod
    def step(self) -> tuple[bool, float]:
        """Clips and updates; (applied, global gradient norm before clipping). A non-finite gradient is not applied."""

    @abstractmethod
    def optimizer_groups(self) -> list[dict[str, Any]]: ...

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes everything a bitwise resume needs. Collective."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Restores what `save` wrote, on as many ranks or on another number of them. Collective."""

    @abstractmethod
    def set_moments(self, read: Read, step: int) -> None:
        """The optimizer goes on as if it had taken `step` updates and had these moments of every parameter."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the model, the optimizer and the memory of both; another engine may then be made in this process."""

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer_groups():
            group["lr"] = value

    def grad_norms(self) -> dict[str, float]:
        """Norm of the accumulated gradient of every module, over all ranks. Collective; before step."""
        mine = self.squared_norms()
        total = sum_over_ranks([mine[m] for m in self.model.built])
        return {m: math.sqrt(v) if v >= 0 else math.nan for m, v in zip(self.model.built, total, strict=True)}


def free_memory() -> None:
    """Returns what nobody holds any more to the device and to the system; engines and their models are full of cycles."""
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()
    trim()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights with decay; biases, norms, other vectors and the scales of readings without."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # ZeRO-3 leaves an empty vector behind and keeps the shape aside
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        plain = dimensions < 2 or name.endswith("bias") or ".scale." in name
        (free if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def adamw_arguments(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}


def squared_by_module(modules: Iterable[str], gradients: Iterable[tuple[str, torch.Tensor | None]]) -> dict[str, float]:
    """Σ g² by module, in float64."""
    sums = dict.fromkeys(modules, 0.0)
    for name, gradient in gradients:
        if gradient is not None:
            sums[module_of(name)] += float(gradient.float().square().sum(dtype=torch.float64))
    return sums
