"""What the trainer needs of an engine, and what all engines share."""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from redheart.config import OptimizerConfig
from redheart.device import has_gpu
from redheart.memory.malloc import trim
from redheart.memory.states import chunked
from redheart.model.axes import decays
from redheart.model.build import Place
from redheart.model.redheart import RedHeartModel
from redheart.ranks import sum_over_ranks
from redheart.train.engine.moments import Read


@dataclass(frozen=True)
class Update:
    """What became of an optimizer step."""

    applied: bool
    module_norms: dict[str, float]  # of the gradient, before clipping, over all ranks; not finite where it is not

    @property
    def grad_norm(self) -> float:
        return math.hypot(*self.module_norms.values())


LARGE = 2**14  # elements of a gradient
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
    def step(self) -> Update:
        """Clips and updates, and drops the gradients; a gradient that is not finite on some rank is not applied. Collective."""

    @abstractmethod
    def optimizer_groups(self) -> list[dict[str, Any]]: ...

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes everything a bitwise resume needs. Collective."""

    @abstractmethod
    def stage(self, directory: Path) -> Callable[[], None]:
        """Copies on the host what `save` would write; the call that writes this rank's part of it, with no collective, from any thread.
        Collective."""

    def state_bytes(self) -> int:
        """Of this rank's weights and optimizer states: what `save` writes of them, but for headers."""
        groups = {id(p): p.nbytes for group in self.optimizer_groups() for p in group["params"]}
        model = {id(p): p.nbytes for p in self.model.parameters()} if self.rank == 0 else {}
        return sum((groups | model).values()) + sum(t.nbytes for t in self.optimizer_states())

    @abstractmethod
    def optimizer_states(self) -> Iterator[torch.Tensor]:
        """Of this rank, as far as they are there: before the first step there are none."""

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


def host_copy(state: Any) -> Any:
    """The same containers with every tensor copied to the host."""
    # a torch.Size would come back as a mere tuple
    return tree_map_only(
        torch.Tensor, lambda t: t.detach().to("cpu", copy=True), state, is_leaf=lambda x: isinstance(x, torch.Size)
    )


def states_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Every tensor that an optimizer keeps of its parameters."""
    return (t for kept in optimizer.state.values() for t in kept.values() if isinstance(t, torch.Tensor))


def free_memory() -> None:
    """Returns what nobody holds any more to the device and to the system; engines and their models are full of cycles."""
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned blocks that DeepSpeed has let go of
    trim()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights with decay; biases, norms, other vectors and the scales of readings without."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # ZeRO-3 leaves an empty vector behind and keeps the shape aside
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        (decayed if decays(name, dimensions) else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def in_chunks(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same in groups of bounded size: ZeRO-1 and -2 hold a second copy of one group at a time, while they start and step."""
    return [
        {**group, "params": [group["params"][i] for i in chunk]}
        for group in groups
        for chunk in chunked([p.numel() for p in group["params"]])
    ]


def adamw_arguments(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}


def read_norms(modules: Sequence[str], owners: Sequence[str], norms: Sequence[torch.Tensor]) -> dict[str, float]:
    """The norm of every module's gradient over all ranks, from this rank's `norms`: one 0-d tensor for each of `owners`.

    Waits for each device once, whatever the number of tensors, and once more where there are several ranks. Collective.
    """
    squares = dict.fromkeys(modules, 0.0)
    places: dict[torch.device, list[int]] = {}
    for i, norm in enumerate(norms):
        places.setdefault(norm.device, []).append(i)
    for place in places.values():
        for i, norm in zip(place, torch.stack([norms[i] for i in place]).tolist(), strict=True):
            squares[owners[i]] += norm * norm
    return {m: math.sqrt(v) for m, v in zip(squares, sum_over_ranks(list(squares.values())), strict=True)}


def norms_of(gradients: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The 2-norm of each gradient, one 0-d tensor for each; nothing waits for it.

    On the CPU of large ones the norms of rows first: one fp32 sum over 35M elements is wrong by 2e-3 there, and in float64 takes
    four times as long.
    """
    if all(g.is_cuda for g in gradients):
        return torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else ()
    rows = [
        torch.linalg.vector_norm(g, dim=-1, dtype=torch.float32) if g.dim() > 1 and g.numel() > LARGE else g
        for g in gradients
    ]
    return torch._foreach_norm(rows, 2, dtype=torch.float64)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by; 1.0 where there is nothing to clip. As torch.nn.utils.clip_grad_norm_."""
    return min(1.0, max_norm / (norm + 1e-6))
