"""Weights on the disk, read one tensor at a time: an export's safetensors (one file or several), or a checkpoint's state.

`read(name)` gives a tensor on the CPU; of an export, and of a checkpoint of ZeRO-1 or -2, only the tensors that are asked for take memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from redheart.config import RunConfig, read_config
from redheart.console import quiet_libraries
from redheart.files import below, read_json
from redheart.model.build import model_config
from redheart.model.loading import (
    Shape,
    open_safetensors,
    read_tensor,
    refuse_integers,
    refuse_other_tensors,
    shapes_of,
    verify_export,
)
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.schema import RedHeartError
from redheart.train.checkpoint import read_progress
from redheart.train.engine import weights_in_parts
from redheart.train.export import AGAIN, read_settings, resolve
from redheart.train.progress import Progress

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # Transformers' names


class Stored(NamedTuple):
    directory: Path
    sizes: RedHeartConfig
    config: RunConfig
    progress: Progress
    read: Callable[[str], torch.Tensor]


def open_stored(path: Path) -> Stored:
    """What an export, a checkpoint or a run directory (its best checkpoint) holds; raises RedHeartError where it holds nothing."""
    quiet_libraries()
    directory = resolve(path)
    if (directory / "config.json").is_file():
        verify_export(directory)
        config, progress = read_settings(directory)
        sizes = _sizes(directory / "config.json")
        read, shapes = _reader(directory)
    else:
        progress = read_progress(directory)
        config = read_config(directory / "config.yaml", "choose another checkpoint")
        sizes = model_config(config, progress.encoder)
        read, shapes = weights_in_parts(directory)
    with torch.device("meta"):
        network = RedHeartModel(sizes).state_dict()
    refuse_other_tensors(directory, shapes_of(network), shapes)
    refuse_integers(directory, network)
    return Stored(directory, sizes, config, progress, read)


def _sizes(path: Path) -> RedHeartConfig:
    values = read_json(path, AGAIN)
    if not isinstance(values, dict) or values.get("model_type") != RedHeartConfig.model_type:
        raise RedHeartError(f"{path} is of no network of this program (model_type redheart): {AGAIN}")
    return RedHeartConfig.from_dict(values)


def _reader(directory: Path) -> tuple[Callable[[str], torch.Tensor], dict[str, Shape]]:
    """What reads a tensor by its name, and the shapes of all that are there."""
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX, AGAIN)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict):
            raise RedHeartError(f"{directory / INDEX} does not say which file holds which weights: {AGAIN}")
        names = sorted({str(below(directory / INDEX, file, AGAIN).relative_to(directory)) for file in places.values()})
    elif (directory / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise RedHeartError(f"{directory} has neither {SINGLE} nor {INDEX}: {AGAIN}")
    holder: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    for path in (directory / name for name in names):
        file = open_safetensors(path, AGAIN)
        holder |= dict.fromkeys(file.keys(), path)
        shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return lambda name: read_tensor(holder[name], name, AGAIN), shapes


def load_stored(stored: Stored) -> RedHeartModel:
    """The network with these weights, in training mode, holding every weight once."""
    with torch.device("meta"):
        model = RedHeartModel(stored.sizes)
    model.load_state_dict({name: stored.read(name) for name in model.state_dict()}, assign=True)
    return model


def streamed(stored: Stored) -> RedHeartModel:
    """The same network, to look at only: each module holds its weights while it runs, so that it takes no more than the largest of them."""
    with torch.device("meta"):
        model = RedHeartModel(stored.sizes)
    for name in model.built:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(partial(_come, stored.read, name))
        module.register_forward_hook(_go)
    return model


def _come(read: Callable[[str], torch.Tensor], name: str, module: nn.Module, inputs: Any) -> None:
    module.load_state_dict({key: read(f"{name}.{key}") for key in module.state_dict()}, assign=True)


def _go(module: nn.Module, inputs: Any, outputs: Any) -> None:
    module.to_empty(device="meta")


def fitting(mine: RedHeartConfig, path: Path) -> Stored:
    """What is stored at `path`, if a network of `mine` can start from it; else a RedHeartError that says what does not fit."""
    stored = open_stored(path)
    theirs = stored.sizes
    for key in ("encoder_width", "width", "heads", "layers", "task_width", "task_heads", "num_experts"):
        if getattr(mine, key) != getattr(theirs, key):
            raise RedHeartError(
                f"--init: {path} has {key} = {getattr(theirs, key)} and this run {getattr(mine, key)}: "
                f"choose the preset it was made for ({stored.config.preset}), or grow it first (redheart grow)"
            )
    if set(mine.ablate) != set(theirs.ablate):
        raise RedHeartError(
            f"--init: {path} was built with model.ablate = {sorted(theirs.ablate)} and this run has {sorted(mine.ablate)}: "
            "give both the same"
        )
    if theirs.encoder is not None and mine.encoder != theirs.encoder:
        raise RedHeartError(
            f"--init: {path} was trained on features of another encoder ({theirs.encoder}) than the data holds ({mine.encoder}): "
            "prepare the data with that encoder"
        )
    return stored


def fill(stored: Stored, name: str, module: nn.Module) -> None:
    """Replaces the weights of one module of a fresh network, tensor by tensor."""
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            tensor.copy_(stored.read(f"{name}.{key}"))
