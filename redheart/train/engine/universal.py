"""A ZeRO checkpoint of any world size as DeepSpeed's universal checkpoint, 8-bit states included.

DeepSpeed's converter knows the moments as fp32 `exp_avg` and `exp_avg_sq`. Shards that hold our 8-bit states are rewritten
with those first, one shard at a time; what is loaded is coded into 8 bits again. Weights, step
and fp32 moments survive bit for bit; 8-bit moments are coded anew over other blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from redheart.console import console
from redheart.optim.adam8bit import expand_states
from redheart.optim.state import STATES
from redheart.ranks import barrier, is_main
from redheart.train.engine.machinery import tensors_only

STATE_OF = {False: "base_optimizer_state", True: "optimizer_state_dict"}  # where a shard has them: ZeRO-1/2, ZeRO-3


def num_ranks_of(checkpoint: Path) -> int:
    """The number of processes that saved a ZeRO checkpoint."""
    return len(list(checkpoint.glob("*_optim_states.pt")))


@contextlib.contextmanager
def universal_checkpoint(checkpoint: Path) -> Iterator[Path]:
    """A universal checkpoint made of `checkpoint`, there until the context ends. Collective: the main process makes it."""
    work = checkpoint.parent.with_name(f".{checkpoint.parent.name}.redheart-universal")  # no name of a user's
    with tensors_only():
        if is_main():
            shutil.rmtree(work, ignore_errors=True)
            (work / "plain").mkdir(parents=True)
            console.print(
                f"{checkpoint.parent.name} was saved by {num_ranks_of(checkpoint)} processes: converting it …"
            )
            for file in sorted(checkpoint.glob("*.pt")):
                if file.name.endswith("_optim_states.pt"):
                    torch.save(_with_plain_moments(file), work / "plain" / file.name)
                else:
                    os.link(file, work / "plain" / file.name)
            _convert(work / "plain", work / "universal")
            shutil.rmtree(work / "plain")
        barrier()
        try:
            yield work / "universal"
            barrier()
        finally:
            if is_main():
                shutil.rmtree(work, ignore_errors=True)


def whole_weight(converted: Path, name: str) -> torch.Tensor:
    """A parameter of a universal checkpoint, fp32, of any shape."""
    return read_whole(converted / "zero" / name / "fp32.pt").float()


def whole_moments(converted: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A parameter's first and second moment, as `whole_weight`."""
    first, second = (read_whole(converted / "zero" / name / f"{kind}.pt") for kind in ("exp_avg", "exp_avg_sq"))
    return first.float(), second.float()


def read_whole(file: Path) -> torch.Tensor:
    content = torch.load(file, map_location="cpu", mmap=True)
    whole: torch.Tensor = content["param"] if isinstance(content, dict) else content
    return whole


def _with_plain_moments(file: Path) -> dict[str, Any]:
    """A shard's content, 8-bit moments as fp32."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True)
    optimizer = content["optimizer_state_dict"]
    for state in optimizer[STATE_OF["optimizer_state_dict" in optimizer]]["state"].values():
        if STATES[0] in state:
            state["exp_avg"], state["exp_avg_sq"] = expand_states(state)
            for name in STATES:
                del state[name]
    return content


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
