"""YAML of settings: plain values, each key once, within bounds. A small file can stand for gigabytes by names that repeat (`&a`, `*a`)
and for any depth of calls by brackets; settings need neither."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from redheart.schema import RedHeartError

NOT_PLAIN = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")
MAX_BYTES, MAX_DEPTH = 1_000_000, 16  # a complete configuration has 2,000 bytes and a depth of 4


class _Loader(yaml.SafeLoader):
    """Raises YAMLError for what plain settings do not have."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: *{event.anchor} repeats a value: write it out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice} is there twice")
        return super().construct_mapping(node, deep)


def check_size(path: Path) -> None:
    """Raises RedHeartError where a file is too large to be one of settings; one that is not there is another's matter."""
    if path.is_file() and (size := path.stat().st_size) > MAX_BYTES:
        raise RedHeartError(f"{path} has {size:,} bytes, and settings at most {MAX_BYTES:,}: give a file of settings")


def setting(value: Any) -> str:
    """`value` as `--set` reads it: JSON in which what YAML takes for the end of a line, or for no character, is an escape. Characters
    beyond U+FFFF stay: as halves of a pair, which is how JSON escapes them, YAML would read two."""
    dumped = json.dumps(value, ensure_ascii=False, default=str)
    return NOT_PLAIN.sub(lambda found: f"\\u{ord(found[0]):04x}", dumped)


def parse(text: str) -> Any:
    """The value of a YAML text; yaml.YAMLError where it is none, or no plain one."""
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"longer than {MAX_BYTES:,} characters")
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError, TypeError, AttributeError) as error:  # a date that is none, for instance
        raise yaml.YAMLError(str(error)) from None
