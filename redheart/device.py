"""What computes: the one place that asks torch whether a GPU is here, decided by torch alone.

What a device is fast at is a question about that device: a card beside a processor changes nothing for what runs on the
processor. Nothing here imports torch before it is asked.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from redheart.schema import RedHeartError

if TYPE_CHECKING:
    import torch

ALLOCATOR = "PYTORCH_ALLOC_CONF"
OLDER_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"  # torch still reads it


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def compute_device() -> torch.device:
    """Where this process trains: its own GPU of this machine's, or the CPU where there is none."""
    import torch

    if not has_gpu():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def device_of(name: torch.device | str, option: str = "--device") -> torch.device:
    """The device of that name (cpu, cuda, cuda:1 …), if this machine has it; else a RedHeartError that names the option."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise RedHeartError(f"{option} {name}: torch knows no such device: choose cpu, cuda or cuda:N") from None
    if device.type == "cpu" and not device.index:
        return torch.device("cpu")
    if device.type != "cuda":
        raise RedHeartError(f"{option} {name}: the network computes on cpu, cuda or cuda:N")
    if not has_gpu():
        raise RedHeartError(f"{option} {name}: torch sees no GPU on this machine: choose cpu")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise RedHeartError(f"{option} {name}: torch sees {count} GPU here, cuda:0 to cuda:{count - 1}")
    return device


def chosen_device(name: torch.device | str, option: str) -> torch.device:
    """As device_of, with `auto`: a GPU where there is one. Of several processes each has its own."""
    if name == "auto":
        return compute_device()
    device = device_of(name, option)
    return compute_device() if device.type == "cuda" and device.index is None else device


def bf16_is_fast(device: torch.device | str) -> bool:
    """Whether this device has bf16 arithmetic. Without it torch's products on a CPU are some 60 times slower than in fp32; cards
    older than Ampere emulate it."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def tell_deepspeed() -> None:
    """Makes DeepSpeed, which looks around by itself when it is imported, decide as torch does. Call it before importing it.

    Raises RedHeartError where DS_ACCELERATOR says otherwise.
    """
    here = "cuda" if has_gpu() else "cpu"
    chosen = os.environ.setdefault("DS_ACCELERATOR", here)
    if chosen != here:
        remedy = "hide the GPU with CUDA_VISIBLE_DEVICES=" if chosen == "cpu" else "check the driver with nvidia-smi"
        raise RedHeartError(
            f"DS_ACCELERATOR={chosen} is set, but torch computes on {here} here: unset DS_ACCELERATOR, or {remedy}"
        )


@contextmanager
def variables_kept() -> Iterator[None]:
    """What is set in the environment inside, by us and by libraries, is as it was before once this is left."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def settle_allocator() -> None:
    """Batches differ in length from step to step: segments that grow are reused where fixed blocks would lie about.

    Read by torch when CUDA starts, so this comes before it. A setting of the user's stays. Not under WSL2, where the driver
    advertises what those segments need and then fails at the first allocation (pytorch issue 192330).
    """
    if "microsoft" not in platform.release().lower() and OLDER_ALLOCATOR not in os.environ:
        os.environ.setdefault(ALLOCATOR, "expandable_segments:True")
