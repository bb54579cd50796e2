"""Compiling an extension once on a machine, by one process at a time, and after a process that died over it.

torch marks a build under way by a file that nobody removes if the builder is killed: everyone after it waits for ever. Here the
builder holds a lock that ends with the process, and whoever has it next removes what a dead one left. DeepSpeed's kernels other
programs build, too, without that lock: a living builder keeps its mark open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from torch.utils.cpp_extension import get_default_build_root

from redheart.caches import cache_directory, writable
from redheart.console import console

PATIENCE_S = 5  # who only loads what is compiled already is gone by then


def build_root() -> Path:
    """Where torch keeps compiled extensions; RedHeartError where nothing can be written there."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not given:
        cache_directory()  # says so where there is no home; torch would take the current directory for one
    return writable(Path(given or get_default_build_root()), "TORCH_EXTENSIONS_DIR")


def built_alone(name: str, build: Callable[[], Any]) -> Any:
    """What `build` returns, which compiles or loads torch's extension `name`; other processes that call this wait their turn."""
    root = build_root()
    with (root / f"{name}.flock").open("w") as lock:
        _wait_for(lock, name)
        for left in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")):
            if not _is_open(left):
                left.unlink(missing_ok=True)
        return build()


def _wait_for(lock: IO[str], name: str) -> None:
    """Takes the lock; says so where somebody else keeps it, which for all that one sees would look like a hang."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    console.print(f"waiting for another process, which compiles {name} …")
    fcntl.flock(lock, fcntl.LOCK_EX)


def _is_open(file: Path) -> bool:
    """Whether a process of this machine that we may look at has it open (Linux; elsewhere nobody knows: False)."""
    name = os.path.realpath(file)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # somebody else's, or ended meanwhile
            if os.readlink(link) == name:
                return True
    return False
