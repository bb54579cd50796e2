"""What glibc does with pieces of host memory that a run on the CPU has freed; other C libraries are left as they are.

By itself glibc maps pieces above a threshold that it raises, up to 32 MiB, as pieces are freed, and keeps what lies below in its
heap. What a network is built and flattened from leaves holes there that nothing fits into: 3 of the 19 GiB of `1b3`. Mapped
pieces go back at once, but every new one is handed out as zeroed pages: with all from 1 MiB on mapped, steps of `330m` take a
third longer. So that is for the building alone. What a large network's micro-steps leave, texts of many lengths after one another
(1.0 GiB of `330m`'s 7.9 in ten steps), is handed back after each of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

MIB = 2**20
LARGE = 100_000_000  # parameters from which on trimming is worth its time: nothing to be seen for `330m`, a tenth of `local`'s steps
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@contextmanager
def mapped_pieces() -> Iterator[None]:
    """Inside, pieces from 1 MiB on are mapped; afterwards those from 32 MiB on, whatever is freed."""
    _map_from(1)
    try:
        yield
    finally:
        _map_from(32)


def trim() -> None:
    """Hands back what lies free in the heap."""
    if (malloc_trim := getattr(_libc(), "malloc_trim", None)) is not None:
        malloc_trim(0)


def _map_from(mib: int) -> None:
    if (mallopt := getattr(_libc(), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, mib * MIB)
        mallopt(M_TRIM_THRESHOLD, 16 * MIB)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
