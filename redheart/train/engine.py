"""The seam between the trainer and the machinery. The only importer of accelerate and deepspeed.

An Engine holds the model and its optimizer and knows eight verbs: forward, backward, non_finite, grad_norms, step,
set_learning_rate, save, load. `plain` is torch alone on one process; the others are DeepSpeed ZeRO through Accelerate.
DeepSpeed steps inside Accelerate's `backward`; here backward and step stand apart, so gradients can be looked at.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redheart.config import OptimizerConfig, RunConfig
from redheart.files import read_json
from redheart.model.redheart import RedHeartModel, module_of
from redheart.optim.adam8bit import CPUAdamW8bit
from redheart.optim.adam8bit import kernel as adam8bit_kernel
from redheart.ranks import launched_world_size, sum_over_ranks
from redheart.schema import RedHeartError

PLAIN_STATE = "plain_state.pt"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights with decay; biases, norms, other vectors and the scales of readings without."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.dim() < 2 or name.endswith("bias") or ".scale." in name
        (free if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def adamw_arguments(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}


class Engine(ABC):
    """What the trainer needs; see the module's docstring. `dtype` is what features are cast to."""

    model: RedHeartModel  # the bare module, for evaluation
    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int

    @abstractmethod
    def __call__(self, **inputs: Any) -> Any:
        """The training forward pass; keywords and outputs as RedHeartModel.forward."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Adds the gradients of one micro-batch; `is_last` ends the accumulation window."""

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
        """Restores what `save` wrote. Collective."""

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer_groups():
            group["lr"] = value

    def grad_norms(self) -> dict[str, float]:
        """Norm of the accumulated gradient of every module, over all ranks. Collective; before step."""
        mine = self.squared_norms()
        total = sum_over_ranks([mine[m] for m in self.model.built])
        return {m: math.sqrt(v) if v >= 0 else math.nan for m, v in zip(self.model.built, total, strict=True)}


class PlainEngine(Engine):
    """torch.optim.AdamW on one process: the reference the others are tested against."""

    def __init__(self, model: RedHeartModel, config: RunConfig, accumulation: int):
        if launched_world_size() > 1:
            raise RedHeartError("memory.strategy=plain runs on one process: choose zero2_offload for several")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.rank, self.world_size = model, 0, 1
        nn.Module.to(model, self.device)
        self.dtype = torch.float32
        self._accumulation, self._max_norm = accumulation, config.optimizer.max_grad_norm
        self._autocast = config.training.precision == "bf16"
        groups = parameter_groups(self.model, config.optimizer.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, **adamw_arguments(config.optimizer))

    def __call__(self, **inputs: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.model(**inputs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        (loss / self._accumulation).backward()

    def non_finite(self) -> bool:
        return not all(math.isfinite(v) for v in self.squared_norms().values())

    def squared_norms(self) -> dict[str, float]:
        return _squared_by_module(self.model.built, ((n, p.grad) for n, p in self.model.named_parameters()))

    def step(self) -> tuple[bool, float]:
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm))
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return math.isfinite(norm), norm

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def save(self, directory: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, directory / PLAIN_STATE)

    def load(self, directory: Path) -> None:
        if not (directory / PLAIN_STATE).is_file():
            raise RedHeartError(
                f"{directory} was not saved with memory.strategy=plain: resume with the strategy it names"
            )
        state = torch.load(directory / PLAIN_STATE, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO-1 or ZeRO-2 through Accelerate, on GPUs (nccl) or on the CPU (gloo)."""

    def __init__(self, model: RedHeartModel, config: RunConfig, accumulation: int, micro_batch_size: int):
        accelerate, self._deepspeed = _import_machinery()
        world_size = launched_world_size()
        settings = deepspeed_config(config, accumulation, micro_batch_size, world_size)
        self.settings = settings
        timeout = timedelta(seconds=config.training.collective_timeout_s)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        bf16 = config.training.precision == "bf16"
        self._accelerator = accelerate.Accelerator(
            deepspeed_plugin=accelerate.utils.DeepSpeedPlugin(
                hf_ds_config=settings, gradient_accumulation_steps=accumulation
            ),
            gradient_accumulation_steps=accumulation,
            mixed_precision="bf16" if bf16 else "no",
            kwargs_handlers=[accelerate.InitProcessGroupKwargs(backend=backend, timeout=timeout)],
        )
        self.device = self._accelerator.device
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
        if self.world_size != world_size:
            raise RedHeartError(f"the launcher started {world_size} processes but {self.world_size} found each other")
        optimizer, expected = self._optimizer(model, config)
        self._engine, _ = self._accelerator.prepare(model, optimizer)
        inner = self._engine.optimizer.optimizer
        if type(inner) is not expected:
            raise RedHeartError(
                f"the optimizer became {type(inner).__name__} instead of {expected.__name__}: check ds_configs/"
            )
        self.model = self._engine.module
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self._names = {id(p): n for n, p in self.model.named_parameters()}

    def _optimizer(self, model: RedHeartModel, config: RunConfig) -> tuple[torch.optim.Optimizer, type]:
        groups, arguments = parameter_groups(model, config.optimizer.weight_decay), adamw_arguments(config.optimizer)
        if config.memory.strategy.endswith("_offload_8bit"):
            return CPUAdamW8bit(groups, seed=config.training.seed, **arguments), CPUAdamW8bit
        if config.memory.strategy.endswith("_offload"):
            adam = self._deepspeed.ops.adam.DeepSpeedCPUAdam
            return adam(groups, adamw_mode=True, **arguments), adam
        return torch.optim.AdamW(groups, **arguments), torch.optim.AdamW

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        self._engine.backward(loss)

    def non_finite(self) -> bool:
        return bool(self._engine.optimizer.has_overflow())

    def squared_norms(self) -> dict[str, float]:
        return _squared_by_module(self.model.built, self._gradient_fragments())

    def _gradient_fragments(self) -> Iterable[tuple[str, torch.Tensor | None]]:
        """(parameter name, this rank's part of its averaged gradient); ZeRO keeps each element on one rank."""
        for parameter in self.model.parameters():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined] # DeepSpeed's link from a parameter to its partition; None on other ranks
            if mapping is not None:
                yield self._names[id(parameter)], mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]

    def step(self) -> tuple[bool, float]:
        self._engine.step()
        return self._engine.was_step_applied(), float(self._engine.get_global_grad_norm())

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self._engine.optimizer.param_groups

    def save(self, directory: Path) -> None:
        self._accelerator.save_state(str(directory), safe_serialization=True)

    def load(self, directory: Path) -> None:
        if not (directory / "pytorch_model").is_dir():
            raise RedHeartError(f"{directory} was not saved by DeepSpeed: resume with the memory.strategy it names")
        self._accelerator.load_state(str(directory))
        if isinstance(self._engine.optimizer.optimizer, self._deepspeed.ops.adam.DeepSpeedCPUAdam):
            self._replay_bias_correction()

    def _replay_bias_correction(self) -> None:
        """Brings DeepSpeedCPUAdam's hidden β^t to where an uninterrupted run has it, to the last bit.

        Its C++ object multiplies β into a running product at every step but, after a resume, starts from pow(β, t), which
        rounds differently. One element stepped from 1 to t with the same object repeats the product.
        """
        adam = self._engine.optimizer.optimizer
        group = adam.param_groups[0]
        last = max((int(state["step"]) for state in adam.state.values()), default=0)
        p, g, m, v = torch.zeros(4, 1)
        for step in range(1, last + 1):
            adam.ds_opt_adam.adam_update(
                adam.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], p, g, m, v
            )


def make_engine(model: RedHeartModel, config: RunConfig, accumulation: int, micro_batch_size: int) -> Engine:
    """The engine that `memory.strategy` names."""
    if config.memory.strategy == "plain":
        return PlainEngine(model, config, accumulation)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed greets on stdout, which is kept for results
        return DeepSpeedEngine(model, config, accumulation, micro_batch_size)


def deepspeed_config(config: RunConfig, accumulation: int, micro_batch_size: int, world_size: int) -> dict[str, Any]:
    """ds_configs/STRATEGY.json with the sizes and precision of this run."""
    path = ds_config_path(config.memory.strategy)
    settings: dict[str, Any] = read_json(path, "reinstall Red Heart")
    settings["train_micro_batch_size_per_gpu"] = micro_batch_size
    settings["gradient_accumulation_steps"] = accumulation
    settings["train_batch_size"] = micro_batch_size * accumulation * world_size
    settings["gradient_clipping"] = config.optimizer.max_grad_norm
    settings["bf16"]["enabled"] = config.training.precision == "bf16"
    if "offload_optimizer" in settings["zero_optimization"] and not torch.cuda.is_available():
        settings["zero_optimization"]["offload_optimizer"]["pin_memory"] = False  # pinning serves copies to a GPU
    return settings


def ds_config_path(strategy: str) -> Path:
    """ds_configs/ of the checkout, or of the installed package."""
    package = Path(__file__).parents[1]
    return next(p for p in (package.parent / "ds_configs", package / "ds_configs") if p.is_dir()) / f"{strategy}.json"


def consolidated_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights in a checkpoint of any engine and world size, on the CPU."""
    if (directory / PLAIN_STATE).is_file():
        return torch.load(directory / PLAIN_STATE, map_location="cpu", weights_only=True)["model"]
    _import_machinery()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress on stdout, which is ours
        state = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag="pytorch_model")
    return {name: tensor.clone() for name, tensor in state.items()}


def compile_kernels() -> None:
    """Compiles (once, then cached) the kernels that training here needs: DeepSpeed's and our own."""
    _import_machinery()
    from deepspeed.accelerator import get_accelerator

    names = ["CPUAdamBuilder"] if torch.cuda.is_available() else ["CPUAdamBuilder", "ShareMemCommBuilder"]
    with contextlib.redirect_stdout(sys.stderr):
        for name in names:
            get_accelerator().create_op_builder(name).load(verbose=False)
        adam8bit_kernel()


def _squared_by_module(
    modules: Iterable[str], gradients: Iterable[tuple[str, torch.Tensor | None]]
) -> dict[str, float]:
    sums = dict.fromkeys(modules, 0.0)
    for name, gradient in gradients:
        if gradient is not None:
            sums[module_of(name)] += float(gradient.float().square().sum(dtype=torch.float64))
    return sums


def _import_machinery() -> tuple[Any, Any]:
    """accelerate and deepspeed, told about the CPU and about a run without a launcher before they look around."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:  # no launcher: a world of one
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(world)
    # DeepSpeed compiles its kernels with ninja, which lies beside this interpreter
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    import accelerate
    import deepspeed

    return accelerate, deepspeed
