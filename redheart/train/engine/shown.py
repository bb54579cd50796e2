"""What Accelerate and DeepSpeed make of a run's settings, key by key, told by their own classes and without starting a process.

The stages: ds_configs/STRATEGY.json; what this run fills in (machinery.deepspeed_config); what Accelerate's plugin hands on; what
DeepSpeed reads from that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from pydantic import BaseModel

from redheart.config import RunConfig
from redheart.device import variables_kept
from redheart.files import read_json
from redheart.model.build import build_model
from redheart.origins import Value
from redheart.ranks import launched_world_size
from redheart.train.engine.machinery import (
    check_accelerate,
    check_launch_file,
    deepspeed_config,
    ds_config_path,
    import_machinery,
    plugin_of,
    settle_sizes,
)

READ_AS = {"zero_optimization": "zero_config", "bf16": "bfloat16_config", "fp16": "float16_config"}  # DeepSpeed's names
ACCELERATE, DEEPSPEED = "Accelerate", "DeepSpeed"
MISSING = object()


def engine_values(config: RunConfig, micro_batch_size: int, accumulation: int) -> list[Value]:
    """Every key that DeepSpeed gets or fills in, with who gave it its value, and Accelerate's variables, with what becomes of them.

    The first process shows what all would get. Raises RedHeartError as the engine does.
    """
    with variables_kept(), torch.device("meta"):
        check_accelerate()
        check_launch_file(config.memory.strategy)
        accelerate, _ = import_machinery()
        from deepspeed.runtime.config import DeepSpeedConfig

        path = ds_config_path(config.memory.strategy)
        ours = deepspeed_config(config, accumulation, micro_batch_size, launched_world_size())
        plugin = plugin_of(accelerate, ours, accumulation, config)
        settle_sizes([ours, plugin.deepspeed_config], [p.numel() for p in build_model(config, None).parameters()])
        read = object.__new__(DeepSpeedConfig)  # its own __init__ asks the process group how many there are
        read._initialize_params(dict(plugin.deepspeed_config))
        stages = {
            f"ds_configs/{path.name}": _flat(read_json(path, "reinstall Red Heart")),
            "this run": _flat(ours),
            ACCELERATE: _flat(plugin.deepspeed_config),
            DEEPSPEED: _flat(_read(read, plugin.deepspeed_config)),
        }
        variables = list(_variables(accelerate, ours, accumulation, config))
    keys = dict.fromkeys(key for values in stages.values() for key in values)
    return [*(_value(key, stages) for key in keys), *variables]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        value = str(value) if value == math.inf else value  # Accelerate's way to say never; JSON has no word for it
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _read(read: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """By our keys: what DeepSpeed's object holds, of those given, and of its own where they are a number, a word or a switch."""
    held: dict[str, Any] = {
        name: value for name, value in vars(read).items() if isinstance(value, bool | int | float | str)
    }
    for section, value in given.items():
        if section in READ_AS:
            model = getattr(read, READ_AS[section])
            assert isinstance(model, BaseModel)
            known = {field.alias or name for name, field in type(model).model_fields.items()}
            dumped = model.model_dump(mode="json", by_alias=True)
            held[section] = {k: v for k, v in dumped.items() if k in known and v is not None}
        elif isinstance(value, Mapping):  # such as data_types, whose keys are attributes
            held[section] = {key: held.pop(key) for key in value if key in held}
    return held


def _value(key: str, stages: Mapping[str, Mapping[str, Any]]) -> Value:
    value, origin = MISSING, ""
    for who, values in stages.items():
        now = values.get(key, MISSING)
        if now == value:
            continue
        if now is MISSING:
            origin = f"dropped by {who} ({origin} gave {value!r})"
            continue
        filled = f"{who}, filled in" if who in (ACCELERATE, DEEPSPEED) else who
        origin = filled if value is MISSING else f"{who} (before: {value!r})"
        value = now
    return Value(f"deepspeed.{key}", value, origin)


def _variables(accelerate: Any, ours: dict[str, Any], accumulation: int, config: RunConfig) -> Iterator[Value]:
    """What an `accelerate launch` or its file put into the environment: a variable without which all is the same is not heard."""

    def made() -> dict[str, Any]:
        plugin = plugin_of(accelerate, ours, accumulation, config)
        return _flat({**plugin.deepspeed_config, "dynamo": asdict(accelerate.utils.TorchDynamoPlugin())})

    with_all = made()
    for name in sorted(n for n in os.environ if n.startswith("ACCELERATE_")):
        value = os.environ.pop(name)
        without = made()
        os.environ[name] = value
        changed = [k for k in with_all.keys() | without.keys() if with_all.get(k) != without.get(k)]
        origin = (
            f"Accelerate's own setting, sets {', '.join(sorted(changed))}"
            if changed
            else "Accelerate's own setting, dropped"
        )
        yield Value(name, value, origin)
