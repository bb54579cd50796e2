"""Which modules are built, trained and resident in which mode: one table.

In training every module is essential. Leaving one out is an error unless the configuration names it in `model.ablate`,
which makes the run an ablation; `backbone` can never be left out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from redheart.model.parts import BACKBONE, FUSION, MODULES, PARTS
from redheart.schema import RedHeartError

__all__ = ["MODULES", "ExecutionMode", "Selection", "closure", "select"]

FEEDS = {part.name: part.feeds_on for part in PARTS} | {FUSION: tuple(part.name for part in PARTS)}


class ExecutionMode(Enum):
    TRAINING = "training"
    EVALUATION = "evaluation"
    INFERENCE = "inference"


@dataclass(frozen=True)
class Selection:
    """`built` modules exist, `trained` ones get gradients, `resident` ones stay on the device of computation."""

    built: tuple[str, ...]
    trained: tuple[str, ...]
    resident: tuple[str, ...]


def select(mode: ExecutionMode, ablate: Collection[str] = (), wanted: Collection[str] = MODULES) -> Selection:
    """The modules of a mode. `wanted`: those whose readings are asked for; in INFERENCE what they do not need is not resident.

    Raises RedHeartError for an unknown module, for an ablated backbone, and where TRAINING leaves out a module that is not ablated.
    """
    for name in (*ablate, *wanted):
        if name not in MODULES:
            raise RedHeartError(f"unknown module {name!r}: choose from {', '.join(MODULES)}")
    if BACKBONE in ablate:
        raise RedHeartError("the backbone cannot be ablated: every module reads its tokens and features")
    built = tuple(m for m in MODULES if m not in ablate)
    needed = tuple(m for m in built if m in closure(wanted))
    if mode is ExecutionMode.TRAINING:
        missing = [m for m in built if m not in wanted]
        if missing:
            raise RedHeartError(
                f"training needs every module and {', '.join(missing)} would be left out: "
                "name them in model.ablate to make this run an ablation"
            )
        return Selection(built, built, built)
    if mode is ExecutionMode.EVALUATION:
        return Selection(built, (), built)
    return Selection(built, (), needed)


def closure(wanted: Collection[str]) -> set[str]:
    """`wanted`, and everything it takes readings from."""
    found = {BACKBONE}
    pending = list(wanted)
    while pending:
        module = pending.pop()
        if module not in found:
            found.add(module)
            pending += FEEDS.get(module, ())
    return found
