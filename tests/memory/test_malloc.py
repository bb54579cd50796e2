"""Freed pieces between held ones: back to the system where they are mapped, kept where they are not."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")

PIECES = 100
SCRIPT = f"""
import sys, psutil
from redheart.memory.malloc import map_pieces, trim

size = psutil.Process().memory_info
map_pieces(int(sys.argv[1]))
first = size().rss
held = [bytearray(b"x") * 2**21 for _ in range({PIECES})]  # 2 MiB each
assert size().rss - first > 0.95 * {PIECES} * 2**21
del held[1::2]
freed = size().rss - first
trim()
print(freed / 2**21, (size().rss - first) / 2**21)
"""


def pieces_resident(num_parameters: int) -> tuple[float, float]:
    """(after every second one was freed, after trim)."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(num_parameters)], text=True, capture_output=True, check=True
    )
    freed, trimmed = map(float, done.stdout.split())
    return freed, trimmed


def test_a_large_network_gets_its_freed_pieces_back_at_once():
    freed, _ = pieces_resident(330_000_000)
    assert freed == pytest.approx(PIECES / 2, abs=2)


def test_a_small_network_keeps_them_until_it_is_trimmed():
    freed, trimmed = pieces_resident(5_000_000)
    assert freed == pytest.approx(PIECES, abs=2)
    assert trimmed == pytest.approx(PIECES / 2, abs=2)
