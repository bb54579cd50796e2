"""The seam between the trainer and the machinery. The only room that imports accelerate and deepspeed.

An Engine holds the model and its optimizer and knows six verbs: forward, backward, step, set_learning_rate, save, load.
`plain` is torch alone on one process; the others are DeepSpeed ZeRO through Accelerate.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from redheart.config import RunConfig
from redheart.device import tell_deepspeed
from redheart.memory.budget import limit_gpu
from redheart.model.regional import compile_layers
from redheart.ranks import is_out_of_memory
from redheart.schema import RedHeartError
from redheart.train.engine.base import Build, Engine, Update, free_memory, parameter_groups
from redheart.train.engine.machinery import compile_kernels, tensors_only
from redheart.train.engine.plain import PLAIN_STATE, PlainEngine, read_state
from redheart.train.engine.possible import check_engine
from redheart.train.engine.zero import TAG, DeepSpeedEngine
from redheart.train.engine.zero_files import ZeroFiles, is_readable_in_parts


def make_engine(build: Build, config: RunConfig, accumulation: int, micro_batch_size: int) -> Engine:
    """The engine that `memory.strategy` names, around the network that `build` makes (model/build.py).

    On a GPU it stays within memory.gpu_memory_gib. Raises RedHeartError where its weights and states do not fit, and what
    `check_engine` raises.
    """
    check_engine(config)
    limit_gpu(config)
    try:
        engine = _engine(build, config, accumulation, micro_batch_size)
        if config.training.compile == "regional":
            compile_layers(engine.model)
        return engine
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RedHeartError(
            f"out of memory while {config.memory.strategy} sets up ({str(error).splitlines()[0]}): `redheart plan` shows what fits; "
            "page-locked host memory is bounded by `ulimit -l` too"
        ) from None


def _engine(build: Build, config: RunConfig, accumulation: int, micro_batch_size: int) -> Engine:
    if config.memory.strategy == "plain":
        return PlainEngine(build, config, accumulation)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed greets on stdout, which is kept for results
        return DeepSpeedEngine(build, config, accumulation, micro_batch_size)


def consolidated_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights in a checkpoint of any engine and world size, on the CPU."""
    if (directory / PLAIN_STATE).is_file():
        return read_state(directory)["model"]
    tell_deepspeed()
    with tensors_only(), contextlib.redirect_stdout(io.StringIO()):  # it tells its progress on stdout, which is ours
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag="pytorch_model")
    return {name: tensor.clone() for name, tensor in state.items()}


def weights_in_parts(directory: Path) -> tuple[Callable[[str], torch.Tensor], dict[str, tuple[int, ...]]]:
    """The same, read one by one where the engine's files allow it; and their shapes."""
    if is_readable_in_parts(directory / TAG):
        files = ZeroFiles(directory / TAG)
        return files.weight, files.shapes
    weights = consolidated_weights(directory)
    return weights.__getitem__, {name: tuple(tensor.shape) for name, tensor in weights.items()}
