"""DeepSpeed ZeRO-1, -2 and -3 through Accelerate, on GPUs (nccl) or on the CPU (gloo).

DeepSpeed steps inside Accelerate's `backward`; here backward and step stand apart, so gradients can be looked at.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redheart.config import RunConfig
from redheart.device import has_gpu
from redheart.memory.budget import without
from redheart.memory.ds_files import SPLIT
from redheart.memory.malloc import map_pieces
from redheart.model.build import Place
from redheart.model.redheart import module_of
from redheart.optim.adam8bit import CPUAdamW8bit
from redheart.ranks import launched_world_size
from redheart.schema import RedHeartError
from redheart.train.engine.base import (
    Build,
    Engine,
    Update,
    adamw_arguments,
    free_memory,
    host_copy,
    in_chunks,
    parameter_groups,
    states_of,
)
from redheart.train.engine.fused_copy import fuse_the_copy
from redheart.train.engine.machinery import (
    CPU_ADAM,
    START_S,
    deepspeed_config,
    import_machinery,
    load_communication,
    load_kernel,
    mixed_precision,
    plugin_of,
    settle_groups,
    settle_sizes,
    tensors_only,
)
from redheart.train.engine.moments import Piece, Read, adopt, partitions
from redheart.train.engine.one_norm import OneNorm
from redheart.train.engine.split_master import SplitMasters, taken_for_cpu_adam
from redheart.train.engine.universal import num_ranks_of, universal_checkpoint, whole_moments, whole_weight

TAG = "pytorch_model"  # Accelerate's name for a DeepSpeed checkpoint


class DeepSpeedEngine(Engine):
    """See the module's docstring. The network is built inside, so that ZeRO-3 can take its part of each module at once."""

    def __init__(self, build: Build, config: RunConfig, accumulation: int, micro_batch_size: int):
        accelerate, self._deepspeed = self._accelerate, _ = import_machinery()
        world_size = launched_world_size()
        settings = deepspeed_config(config, accumulation, micro_batch_size, world_size)
        self.settings = settings
        self._stage = settings["zero_optimization"]["stage"]
        self.forward_has_collectives = self._stage == 3
        patience = timedelta(seconds=max(START_S, config.training.collective_timeout_s))
        backend = "nccl" if has_gpu() else "gloo"
        bf16 = config.training.precision == "bf16"
        plugin = plugin_of(accelerate, settings, accumulation, config)
        load_communication()
        self._accelerator = accelerate.Accelerator(
            deepspeed_plugin=plugin,
            gradient_accumulation_steps=accumulation,
            mixed_precision=mixed_precision(config),
            kwargs_handlers=[accelerate.InitProcessGroupKwargs(backend=backend, timeout=patience)],
        )
        self.device = self._accelerator.device
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
        if self.world_size != world_size:
            raise RedHeartError(f"the launcher started {world_size} processes but {self.world_size} found each other")
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            map_pieces(None)
        model = build(self._place())
        sizes = [getattr(p, "ds_numel", p.numel()) for p in model.parameters()]  # ZeRO-3 leaves empty ones
        if on_cpu:
            map_pieces(sum(sizes))
        settle_sizes([settings, plugin.deepspeed_config], sizes)
        place_buffers(model, self.device)
        self._names = {id(p): n for n, p in model.named_parameters()}
        optimizer = self._optimizer(model, config)
        with taken_for_cpu_adam() if settings["bf16"].get(SPLIT) else nullcontext():
            self._engine, _ = self._accelerator.prepare(model, optimizer)
        self._zero = self._engine.optimizer
        inner = self._zero.optimizer
        if type(inner) is not type(optimizer):
            raise RedHeartError(
                f"the optimizer became {type(inner).__name__} instead of {type(optimizer).__name__}: check ds_configs/"
            )
        if isinstance(inner, CPUAdamW8bit) and self._stage < 3 and bf16:
            fuse_the_copy(self._zero, inner)
        self._masters = None
        if settings["bf16"].get(SPLIT):
            self._masters = SplitMasters(self._zero, self._stage, inner)
        self.model = self._engine.module
        owners = {i: module_of(name) for i, name in self._names.items()}
        self._norm = OneNorm(self._zero, self._stage, self.model.built, owners, config.optimizer.max_grad_norm)
        self._timeout_s = config.training.collective_timeout_s
        settle_groups(self._timeout_s, self.device)
        del model, optimizer
        free_memory()

    def _place(self) -> Place:
        """What happens to a module once it is built: cast to what the engine computes in, under ZeRO-3 partitioned too.

        So the network never exists as a whole in fp32, under ZeRO-3 not even in bf16.
        """
        if self._stage < 3:
            return lambda name, module: None if self.dtype == torch.float32 else _cast(module, self.dtype)

        def partition(name: str, module: nn.Module) -> None:
            _cast(module, self.dtype)
            self._deepspeed.zero.Init(module=module, config_dict_or_path=self.settings, mem_efficient_linear=False)

        return partition

    def _optimizer(self, model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
        """The optimizer that `optimizer.name` and `memory.strategy` mean; asserted again after `prepare`."""
        groups, arguments = parameter_groups(model, config.optimizer.weight_decay), adamw_arguments(config.optimizer)
        if self._stage < 3:
            groups = in_chunks(groups)
        on_host = "offload_optimizer" in self.settings["zero_optimization"]
        if config.optimizer_name == "adamw_8bit" and on_host:
            master = "split" if self.settings["bf16"].get(SPLIT) else "fp32"
            return CPUAdamW8bit(groups, seed=config.training.seed, master=master, **arguments)
        if config.optimizer_name == "adamw_8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(groups, **arguments)
        if on_host:
            load_kernel(CPU_ADAM)
            return self._deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
        return torch.optim.AdamW(groups, fused=True, **arguments)

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        self._engine.backward(loss)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """ZeRO-3 reduces a leaf module's gradients whenever a backward pass has gone through it, there or not: not here."""
        hooked = {module: module._backward_hooks for module in self.model.modules() if module._backward_hooks}
        for module in hooked:
            module._backward_hooks = OrderedDict()
        try:
            yield
        finally:
            for module, hooks in hooked.items():
                module._backward_hooks = hooks
        if self._stage == 3:
            # modules none of whose inputs has a gradient stay gathered; DeepSpeed's backward ends so, too
            self._zero.parameter_offload.release_backward_leftovers()

    def step(self) -> Update:
        if self._stage == 3 and self.device.type == "cpu":
            # gradients are partitioned already; DeepSpeed 0.19.8 would wait for a stream on them
            for parameter in self.model.parameters():
                parameter.grad = None
        self._engine.step()
        applied = self._engine.was_step_applied()
        if not applied and self._stage < 3:
            # with the optimizer on the host 0.19.8 keeps the gradients, and adds the next step's
            self._zero.averaged_gradients.update(dict.fromkeys(self._zero.averaged_gradients))
        return Update(applied, self._norm.module_norms)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self._zero.param_groups

    def save(self, directory: Path) -> None:
        if self._masters is not None:
            self._masters.directory = directory
        with without(self._masters.mapped_bytes if self._masters is not None else 0):
            self._accelerator.save_state(str(directory), safe_serialization=True)

    def stage(self, directory: Path) -> Callable[[], None]:
        writer = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = staged = Staged(writer)
        try:
            self.save(directory)
        finally:
            self._engine.checkpoint_engine = writer
        return staged.write

    def state_bytes(self) -> int:
        return super().state_bytes() + (self._masters.more_bytes if self._masters else 0)

    def optimizer_states(self) -> Iterator[torch.Tensor]:
        return states_of(self._zero.optimizer)

    def load(self, directory: Path) -> None:
        if not (directory / TAG).is_dir():
            raise RedHeartError(f"{directory} was not saved by DeepSpeed: resume with the memory.strategy it names")
        saved_ranks = num_ranks_of(directory / TAG)
        if saved_ranks == self.world_size:
            try:
                with tensors_only():
                    self._accelerator.load_state(str(directory))
            except ValueError as error:
                if "parameter groups" not in str(error):
                    raise
                raise RedHeartError(
                    f"{directory} was made by an earlier version, whose optimizer held its parameters in other groups: go on with that "
                    "version, or start from its weights with --init"
                ) from None
        else:
            # the others wait while the main process converts, however short a step's patience is
            settle_groups(max(START_S, self._timeout_s), self.device)
            with universal_checkpoint(directory / TAG) as converted:
                self._load_universal(converted)
            settle_groups(self._timeout_s, self.device)
        self._match_bias_correction()

    def set_moments(self, read: Read, step: int) -> None:
        for flat, pieces in self._partitions():
            adopt(self._zero.optimizer, flat, pieces, read, step)
        self._match_bias_correction()

    def close(self) -> None:
        self._accelerator.free_memory()
        self._engine.destroy()
        del self.model, self._engine, self._zero, self._norm, self._accelerator
        # Accelerate refuses a second DeepSpeed plugin while this is set; the process group, in PartialState, stays
        self._accelerate.state.AcceleratorState._reset_state()
        free_memory()

    def _partitions(self) -> Iterable[tuple[torch.Tensor, list[Piece]]]:
        return partitions(self._zero, self._stage, self._names, self.rank)

    def _load_universal(self, converted: Path) -> None:
        settings = self._engine._config
        settings.load_universal_checkpoint = True
        try:
            path, _ = self._engine.load_checkpoint(str(converted.parent), tag=converted.name)
        finally:
            settings.load_universal_checkpoint = False
        if path is None:
            raise RedHeartError(f"DeepSpeed could not read the universal checkpoint {converted}")
        if isinstance(optimizer := self._zero.optimizer, CPUAdamW8bit):
            for flat, pieces in self._partitions():
                state = optimizer.state[flat]
                # DeepSpeed has made them of the masters' type
                if state.pop("exp_avg", None) is not None and state.pop("exp_avg_sq", None) is not None:
                    adopt(optimizer, flat, pieces, lambda name: whole_moments(converted, name), int(state["step"]))
        if self._masters is not None:
            self._masters.fill(self._partitions(), lambda name: whole_weight(converted, name))

    def _match_bias_correction(self) -> None:
        """Brings DeepSpeedCPUAdam's hidden β^t to where an uninterrupted run has it, to the last bit.

        Its C++ object multiplies β into a running product at every step but, after a resume, starts from pow(β, t), which
        rounds differently. One element stepped from 1 to t with the same object repeats the product.
        """
        adam = self._zero.optimizer
        if not isinstance(adam, self._deepspeed.ops.adam.DeepSpeedCPUAdam):
            return
        group = adam.param_groups[0]
        last = max((int(state["step"]) for state in adam.state.values()), default=0)
        p, g, m, v = torch.zeros(4, 1)
        for step in range(1, last + 1):
            adam.ds_opt_adam.adam_update(
                adam.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], p, g, m, v
            )


class Staged:
    """DeepSpeed's writer of checkpoints, but that what it is given is copied, and written when `write` is called."""

    def __init__(self, writer: Any):
        self._writer = writer
        self._kept: list[tuple[Any, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        self._kept.append((host_copy(state_dict), path))

    def write(self) -> None:
        while self._kept:
            self._writer.save(*self._kept.pop(0))


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Moves what is no parameter: where ZeRO-3 has partitioned the parameters, DeepSpeed 0.19.8 leaves buffers where they were made."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    nn.Module.to(module, dtype=dtype)
