"""Weights on the disk, read one tensor at a time: an export's safetensors (one file or several), or a checkpoint's state.

`read(name)` gives a tensor on the CPU; of an export only the tensors that are asked for take memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors import safe_open
from torch import nn

from redheart.config import RunConfig, parse_config
from redheart.console import quiet_libraries
from redheart.files import read_json
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.schema import RedHeartError
from redheart.train.checkpoint import Progress, read_progress
from redheart.train.engine import consolidated_weights
from redheart.train.export import SETTINGS, resolve

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
        kept = read_json(directory / SETTINGS, "export the checkpoint again")
        sizes = RedHeartConfig.from_pretrained(directory)
        assert isinstance(sizes, RedHeartConfig)
        return Stored(directory, sizes, parse_config(kept["config"]), Progress(**kept["progress"]), _reader(directory))
    progress = read_progress(directory)
    config = parse_config(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")))
    values = config.model.model_dump()
    del values["activation_checkpointing"]
    weights = consolidated_weights(directory)
    return Stored(directory, RedHeartConfig(**values, encoder=progress.encoder), config, progress, weights.__getitem__)


def _reader(directory: Path) -> Callable[[str], torch.Tensor]:
    if (directory / INDEX).is_file():
        places: dict[str, str] = read_json(directory / INDEX, "export the checkpoint again")["weight_map"]
    elif (directory / SINGLE).is_file():
        with safe_open(directory / SINGLE, framework="pt") as file:
            places = dict.fromkeys(file.keys(), SINGLE)
    else:
        raise RedHeartError(f"{directory} has neither {SINGLE} nor {INDEX}: export the checkpoint again")

    files = {file: safe_open(directory / file, framework="pt") for file in set(places.values())}  # maps, reads nothing

    def read(name: str) -> torch.Tensor:
        if name not in places:
            raise RedHeartError(f"{directory} has no weights for {name}: it was made by another version; export again")
        return files[places[name]].get_tensor(name)

    return read


def load_stored(stored: Stored) -> RedHeartModel:
    """The network with these weights, in training mode, holding every weight once."""
    with torch.device("meta"):
        model = RedHeartModel(stored.sizes)
    model.load_state_dict({name: stored.read(name) for name in model.state_dict()}, assign=True)
    return model


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


def initialise(model: RedHeartModel, path: Path) -> None:
    """Replaces the weights of a fresh network by those of an export, a checkpoint or a run; each must fit."""
    assert isinstance(model.config, RedHeartConfig)
    stored = fitting(model.config, path)
    for name in model.built:
        fill(stored, name, model.get_submodule(name))
