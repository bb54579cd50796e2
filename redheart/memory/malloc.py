"""What glibc does with pieces of host memory that a run on the CPU has freed; other C libraries are left as they are.

By itself glibc maps pieces above a threshold that it raises, up to 32 MiB, as pieces are freed, and keeps what lies below in its
heap. There gradients, casts and flattened weights leave holes: 3.2 GiB of 19.1 for `1b3`. Mapped pieces go back at once, and
what is resident is what is held, and what was planned; for that every new piece is handed out as zeroed pages, and steps of
`330m` take a third longer. Mapping while the network is built alone, with or without trimming after each micro-step, costs no
time, but leaves peaks that nobody can foretell: 7.8 to 8.7 GiB for the same two steps of `330m`, 6.9 to 8.0 for ten others.
"""

from __future__ import annotations

import ctypes
from functools import cache

MIB = 2**20
MANY = 25_000_000  # parameters from which on memory matters more than time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def map_pieces(num_parameters: int | None) -> None:
    """Pieces from 1 MiB on are mapped where a network has `MANY` parameters, from 32 MiB on where it has fewer; None: not known yet."""
    threshold = 1 if num_parameters is None or num_parameters >= MANY else 32
    if (mallopt := getattr(_libc(), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, threshold * MIB)
        mallopt(M_TRIM_THRESHOLD, 16 * MIB)


def trim() -> None:
    """Hands back what lies free in the heap."""
    if (malloc_trim := getattr(_libc(), "malloc_trim", None)) is not None:
        malloc_trim(0)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
