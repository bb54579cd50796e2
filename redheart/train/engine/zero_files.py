"""Weights and moments in a checkpoint of ZeRO-1 or -2, of any world size, read parameter by parameter from the mapped files.

DeepSpeed's own ways take all of it into memory at once: zero_to_fp32 the weights, ds_to_universal the moments too. Its shards say where in
a rank's partitions a parameter's elements lie (param_slice_mappings); in the order of the ranks they are the parameter. ZeRO-3's shards
say no such thing, and are read in DeepSpeed's ways.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from redheart.optim.adam8bit import expand_states
from redheart.optim.state import STATES
from redheart.train.engine.machinery import tensors_only

# bytes read of mapped files before they are mapped anew: what was read stays in memory as long as the mapping
RESIDENT = 2**27
EXPANDED = 2  # partitions of a rank whose 8-bit moments are there in fp32: of weights with decay, and of the small ones without
Pair = tuple[torch.Tensor, torch.Tensor]


class Fragment(NamedTuple):
    """`size` elements of a parameter, from `start` on in a rank's partition of a group."""

    rank: int
    group: int
    start: int
    size: int


class ZeroFiles:
    """`weight(name)` and `moments(name)` (first and second) are new fp32 tensors in the parameter's shape; buffers are weights too.

    `shapes`: of all weights. `step`: how many updates the moments have seen, None where there are none yet.
    """

    def __init__(self, checkpoint: Path):
        self._files = [path.open("rb") for path in _shards(checkpoint)]
        self._expanded: list[OrderedDict[int, Pair]] = [OrderedDict() for _ in self._files]
        self._open()
        with tensors_only():
            model = torch.load(next(checkpoint.glob("*_model_states.pt")), map_location="cpu", mmap=True)
        held = {name: model["module"][name] for name in model["buffer_names"]}
        self._buffers = {name: x.float() if x.is_floating_point() else x.clone() for name, x in held.items()}
        shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
        self.shapes = shapes | {name: tuple(buffer.shape) for name, buffer in self._buffers.items()}
        self._fragments: dict[str, list[Fragment]] = {}
        for rank, shard in enumerate(self._mapped):
            for group, names in enumerate(shard["param_slice_mappings"]):
                for name, at in names.items():
                    self._fragments.setdefault(name, []).append(Fragment(rank, group, at.start, at.numel))

    @property
    def step(self) -> int | None:
        return max((int(state["step"]) for state in self._all_states()), default=0) or None

    @property
    def knows_moments(self) -> bool:
        """Whether they are fp32, or 8 bits as CPUAdamW8bit codes them."""
        return all(STATES[0] in state or "exp_avg" in state for state in self._all_states())

    def weight(self, name: str) -> torch.Tensor:
        if name in self._buffers:
            return self._buffers[name].clone()
        return self._whole(name, lambda f: self._mapped[f.rank]["single_partition_of_fp32_groups"][f.group])

    def moments(self, name: str) -> Pair:
        return self._whole(name, lambda f: self._pair(f)[0]), self._whole(name, lambda f: self._pair(f)[1])

    def _whole(self, name: str, partition: Callable[[Fragment], torch.Tensor]) -> torch.Tensor:
        if self._touched > RESIDENT:
            self._open()
        fragments = self._fragments[name]
        self._touched += 4 * sum(f.size for f in fragments)
        parts = [partition(f).flatten()[f.start : f.start + f.size].float() for f in fragments]
        return torch.cat(parts).view(self.shapes[name])

    def _pair(self, f: Fragment) -> Pair:
        state = self._states(self._mapped[f.rank])[f.group]
        if STATES[0] not in state:
            return state["exp_avg"], state["exp_avg_sq"]
        known = self._expanded[f.rank]
        if f.group not in known:
            while len(known) >= EXPANDED:
                known.popitem(last=False)
            known[f.group] = expand_states(state)
        known.move_to_end(f.group)
        return known[f.group]

    def _open(self) -> None:
        with tensors_only():  # by their descriptors: a run that trains on may have removed the checkpoint meanwhile
            self._mapped = [
                torch.load(f"/proc/self/fd/{file.fileno()}", map_location="cpu", mmap=True)["optimizer_state_dict"]
                for file in self._files
            ]
        self._touched = 0

    def _all_states(self) -> Iterator[dict[str, Any]]:
        return (state for shard in self._mapped for state in self._states(shard).values())

    @staticmethod
    def _states(shard: dict[str, Any]) -> dict[int, Any]:
        states: dict[int, Any] = shard["base_optimizer_state"]["state"]
        return states


def is_readable_in_parts(checkpoint: Path) -> bool:
    """Whether a checkpoint's shards are of ZeRO-1 or -2."""
    return bool(paths := _shards(checkpoint)) and _stage_of(paths[0]) < 3


def _stage_of(path: Path) -> int:
    with tensors_only():
        return int(torch.load(path, map_location="cpu", mmap=True)["optimizer_state_dict"]["zero_stage"])


def _shards(checkpoint: Path) -> list[Path]:
    """In the order of the ranks."""
    found = {
        int(m[1]): p for p in checkpoint.glob("*_optim_states.pt") if (m := re.search(r"zero_pp_rank_(\d+)_", p.name))
    }
    return [found[rank] for rank in sorted(found)]
