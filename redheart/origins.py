"""Where each value of a configuration comes from: the program's default, the preset or file, the command line, that there is a table of
one's own, or the data."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from redheart.config import MOVED, OWN_KEYS, RunConfig, config_keys, leaves, load_config


class Value(NamedTuple):
    key: str
    value: Any
    origin: str  # `default`, `preset NAME`, `file PATH`, `command line`, `own table` or `data`


def origins(preset: str, overrides: Sequence[str], on_data: RunConfig | None = None) -> list[Value]:
    """Every leaf key of the configuration that a preset's name or a file and `--set` values make, in its order. `on_data`: what becomes
    of it in a run on its data."""
    base, config = load_config(preset), load_config(preset, overrides)
    given, stated = _stated(config), _stated(base)
    before, values = leaves(base), leaves(config)
    named = {MOVED.get(key, key) for key in (text.partition("=")[0] for text in overrides)}
    of_table = OWN_KEYS if config.data.file and not base.data.file else frozenset()
    source = f"file {preset}" if preset.endswith((".yaml", ".yml")) else f"preset {preset}"

    def origin(key: str) -> str:
        if key in of_table and key not in named and values[key] != before[key]:
            return "own table"
        if key in named or values[key] != before[key] or (key in given and key not in stated):
            return "command line"
        return source if key in stated else "default"

    changed = {key: value for key, value in leaves(on_data or config).items() if value != values[key]}
    return [
        Value(key, changed.get(key, value), "data" if key in changed else origin(key)) for key, value in values.items()
    ]


def _stated(config: RunConfig) -> set[str]:
    """The leaf keys that were given, by whoever made the configuration."""
    found = set()
    for key in config_keys():
        *sections, name = key.split(".")
        section: BaseModel = functools.reduce(getattr, sections, config)
        inside = all(
            part in functools.reduce(getattr, sections[:i], config).model_fields_set for i, part in enumerate(sections)
        )
        if inside and name in section.model_fields_set:
            found.add(key)
    return found


def shown(values: Sequence[Value]) -> str:
    """A line for each value: `training.epochs = 3    # command line`."""
    lines = [(f"{v.key} = {json.dumps(v.value, ensure_ascii=False)}", v.origin) for v in values]
    width = min(60, max(len(line) for line, _ in lines))
    return "\n".join(f"{line.ljust(width)}  # {origin}" for line, origin in lines)
