"""Master weights that the 8-bit optimizer keeps as bfloat16 and a byte (`optimizer.master: split`), inside DeepSpeed's ZeRO.

DeepSpeed 0.19.8 keeps master weights and their gradients in bfloat16 where bf16.bf16_master_weights_and_grads asks for it, and
then insists on its own CPU Adam, by type. What it calls fp32 partitions are the upper halves here. A checkpoint holds whole fp32
weights, as with fp32 masters, so that every strategy, world size and reader takes it: they are joined on their way out, in files
without a name beside the checkpoint, mapped, which the system may write back instead of holding; and split again on their way in, which
brings back every bit.
tests/train/test_split_master.py pins the version.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from redheart.optim.adam8bit import CPUAdamW8bit
from redheart.optim.state import REMAINDER
from redheart.train.engine.moments import Piece


@contextlib.contextmanager
def taken_for_cpu_adam() -> Iterator[None]:
    """DeepSpeed accepts our optimizer for bfloat16 masters while this lasts."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    theirs = stage_1_and_2.DeepSpeedCPUAdam
    for module in (stage_1_and_2, stage3):
        module.DeepSpeedCPUAdam = CPUAdamW8bit
    try:
        yield
    finally:
        for module in (stage_1_and_2, stage3):
            module.DeepSpeedCPUAdam = theirs


class SplitMasters:
    """The masters of a ZeRO optimizer (stage 1 to 3), whole on the disk."""

    def __init__(self, zero: Any, stage: int, optimizer: CPUAdamW8bit):
        self._zero, self._is_3, self._optimizer = zero, stage == 3, optimizer
        self._save, self._load = zero.state_dict, zero.load_state_dict
        self.directory: Path | None = None  # where a checkpoint is being saved
        zero.state_dict, zero.load_state_dict = self.state_dict, self.load_state_dict

    @property
    def _flats(self) -> list[torch.Tensor]:
        zero = self._zero
        found: list[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat if self._is_3 else zero.single_partition_of_fp32_groups
        )
        return found

    @property
    def _keys(self) -> tuple[str, str]:
        """Where a shard has masters, and the optimizer's state."""
        if self._is_3:
            return "fp32_flat_groups", "optimizer_state_dict"
        return "single_partition_of_fp32_groups", "base_optimizer_state"

    @property
    def mapped_bytes(self) -> int:
        """Of the files that hold whole masters while a checkpoint is saved."""
        return 4 * sum(flat.numel() for flat in self._flats)

    @property
    def more_bytes(self) -> int:
        """By which the masters of a checkpoint are larger than what is here."""
        return sum(flat.numel() for flat in self._flats)

    def state_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = self._save()
        masters, base = self._keys
        sizes = [saved.numel() for saved in content[masters]]  # without padding
        whole = [self._whole(flat)[:size] for flat, size in zip(self._flats, sizes, strict=True)]
        states = content[base]["state"].items()
        bare = {i: {name: x for name, x in state.items() if name != REMAINDER} for i, state in states}
        return content | {masters: whole, base: content[base] | {"state": bare}}

    def load_state_dict(self, state_dict_list: Any, checkpoint_folder: str | None = None, **wanted: Any) -> None:
        self._load(state_dict_list, checkpoint_folder=checkpoint_folder, **wanted)
        if checkpoint_folder:
            return  # a universal one: `fill`
        rank = torch.distributed.get_rank(group=self._zero.dp_process_group)
        for flat, saved in zip(self._flats, state_dict_list[rank][self._keys[0]], strict=True):
            self._optimizer.set_master_weights(flat, saved)
        self._round()

    def fill(self, partitions: Iterable[tuple[torch.Tensor, list[Piece]]], read: Callable[[str], torch.Tensor]) -> None:
        """From whole parameters in fp32, by name. Collective."""
        for flat, pieces in partitions:
            for piece in pieces:
                part = read(piece.name).flatten()[piece.origin : piece.origin + piece.size]
                self._optimizer.set_master_weights(flat, part, piece.start)
        self._round()

    def _round(self) -> None:
        """The model's weights are the upper halves: DeepSpeed has rounded fp32 to them, ties to even, where a pair's go up."""
        zero = self._zero
        if self._is_3:
            for weights, flat in zip(zero.fp16_partitioned_groups_flat, self._flats, strict=True):
                weights.data.copy_(flat.data)
            return
        for i, (parts, flat) in enumerate(zip(zero.parallel_partitioned_bit16_groups, self._flats, strict=True)):
            group = zero.real_dp_process_group[i]
            parts[torch.distributed.get_rank(group=group)].data.copy_(flat.data)
            for rank, part in enumerate(parts):
                torch.distributed.broadcast(part, torch.distributed.get_global_rank(group, rank), group=group)

    def _whole(self, flat: torch.Tensor) -> torch.Tensor:
        with tempfile.NamedTemporaryFile(dir=self.directory) as file:  # gone with the tensor
            os.posix_fallocate(
                file.fileno(), 0, 4 * flat.numel()
            )  # a disk that is full is an error here, and a crash in a mapping
            whole = torch.from_file(file.name, shared=True, size=flat.numel(), dtype=torch.float32)
        return self._optimizer.master_weights(flat, whole)
