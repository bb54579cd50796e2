"""What computes: the one place that asks torch whether a GPU is here, decided by torch alone.

What a device is fast at is a question about that device: a card beside a processor changes nothing for what runs on the
processor. Nothing here imports torch before it is asked.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from redheart.schema import RedHeartError

if TYPE_CHECKING:
    import torch

ALLOCATOR = "PYTORCH_ALLOC_CONF"
OLDER_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"  # torch still reads it, and before the other one
# above so many MiB a page-locked buffer takes what it holds and is given back when it is let go of; below it torch rounds up to a
# power of two and keeps it for the next. A batch stays below, partitions of a network worth planning lie above
PINNED_KEPT = "pinned_max_cached_size_mb"
PINNED_KEPT_MB = 32
KNOWS_PINNED_KEPT = (2, 13)  # the torch it was read in; an older one that does not know a key ends with an error


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
    except (RuntimeError, TypeError):
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
    """How torch's allocators on a GPU and in page-locked memory go about it; a setting of the user's stays.

    Batches differ in length from step to step: segments that grow are reused where fixed blocks would lie about. Not under WSL2,
    where the driver advertises what those segments need and then fails at the first allocation (pytorch issue 192330). Page-locked
    buffers: see PINNED_KEPT. Read by torch when CUDA starts, so this comes before it.
    """
    if ALLOCATOR in os.environ or OLDER_ALLOCATOR in os.environ:
        return
    settings = [] if "microsoft" in platform.release().lower() else ["expandable_segments:True"]
    if tuple(int(n) for n in version("torch").split(".")[:2]) >= KNOWS_PINNED_KEPT:
        settings.append(f"{PINNED_KEPT}:{PINNED_KEPT_MB}")
    if settings:
        os.environ[ALLOCATOR] = ",".join(settings)


def pinned_bytes(size: int) -> int:
    """What a page-locked buffer of so many bytes takes, as the environment stands: torch's CachingHostAllocator rounds it up to a
    power of two, up to the size that PINNED_KEPT names."""
    settings = os.environ.get(OLDER_ALLOCATOR) or os.environ.get(ALLOCATOR, "")
    kept = re.search(rf"{PINNED_KEPT}:(\d+)", settings)
    return size if not size or (kept and size > int(kept[1]) * 2**20) else 1 << (size - 1).bit_length()
