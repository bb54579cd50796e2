"""Moments of another run's optimizer into a fresh one, whatever it keeps them in: fp32, or 8 bits on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from redheart.optim.adam8bit import CPUAdamW8bit
from redheart.optim.state import BLOCK
from redheart.schema import RedHeartError

CHUNK = 2**16 * BLOCK  # elements that are fp32 at once on their way into 8 bits: two times 64 MiB

Read = Callable[[str], tuple[torch.Tensor, torch.Tensor]]  # a parameter's first and second moment, fp32, of any shape


class Piece(NamedTuple):
    """Elements `start` … of what the optimizer steps are elements `origin` … of a parameter."""

    name: str
    start: int
    origin: int
    size: int


def adopt(optimizer: torch.optim.Optimizer, flat: torch.Tensor, pieces: Sequence[Piece], read: Read, step: int) -> None:
    """Gives `flat`, one of the optimizer's parameters, moments and step count; elements in no piece (padding) have none."""
    state = optimizer.state[flat]
    if isinstance(optimizer, CPUAdamW8bit):
        for start in range(0, flat.numel(), CHUNK):
            optimizer.set_moments(flat, *_gather(pieces, read, start, min(CHUNK, flat.numel() - start)), start)
        state["step"] = step
        return
    kind = type(optimizer).__name__
    if kind not in ("AdamW", "DeepSpeedCPUAdam"):
        raise RedHeartError(
            f"{kind} cannot take over moments: choose a memory.strategy other than gpu_8bit, or grow without --moments"
        )
    m, v = _gather(pieces, read, 0, flat.numel())
    state["step"] = (
        torch.tensor(float(step), device=flat.device) if kind == "AdamW" else step
    )  # fused: beside its parameter
    state["exp_avg"], state["exp_avg_sq"] = (x.view(flat.shape).to(flat) for x in (m, v))


def partitions(zero: Any, stage: int, names: dict[int, str], rank: int) -> Iterable[tuple[torch.Tensor, list[Piece]]]:
    """What this rank's optimizer steps under ZeRO, with the pieces of parameters in it. `names` by id of the parameter."""
    groups = zero.fp16_groups if stage == 3 else zero.bit16_groups
    flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for group, flat in zip(groups, flats, strict=True):
        pieces = []
        for p in group:
            if stage == 3:
                _, start, size = zero.grad_position[zero.get_param_id(p)]
                pieces.append(Piece(names[id(p)], start, rank * size, min(size, p.ds_numel - rank * size)))
            elif p._hp_mapping is not None:  # None: on other ranks
                here, there = p._hp_mapping.get_hp_fragment_address(), p._hp_mapping.lp_fragment_address
                pieces.append(Piece(names[id(p)], here.start, there.start, here.numel))
        yield flat, [piece for piece in pieces if piece.size > 0]


def _gather(pieces: Sequence[Piece], read: Read, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of elements start … start + size of a flat partition."""
    found = torch.zeros(size), torch.zeros(size)
    for piece in pieces:
        first, last = max(piece.start, start), min(piece.start + piece.size, start + size)
        if first < last:
            origin = piece.origin + first - piece.start
            for into, moment in zip(found, read(piece.name), strict=True):
                into[first - start : last - start] = moment.flatten()[origin : origin + last - first]
    return found
