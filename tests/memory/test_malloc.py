"""Freed pieces between held ones: back to the system at once while a network is built, and kept for the steps afterwards."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")

PIECES = 100
SCRIPT = f"""
import psutil
from redheart.memory.malloc import mapped_pieces, trim

size = psutil.Process().memory_info

def left():  # of as many pieces of 2 MiB, after every second one was freed
    first = size().rss
    held = [bytearray(b"x") * 2**21 for _ in range({PIECES})]
    assert size().rss - first > 0.95 * {PIECES} * 2**21
    del held[1::2]
    freed = size().rss
    trim()
    return (freed - first) / 2**21, (size().rss - first) / 2**21

with mapped_pieces():
    print(*left())
print(*left())
"""


def test_pieces_are_mapped_while_a_network_is_built_and_lie_in_the_heap_afterwards():
    done = subprocess.run([sys.executable, "-c", SCRIPT], text=True, capture_output=True, check=True)
    (inside, _), (outside, trimmed) = ([float(x) for x in line.split()] for line in done.stdout.splitlines())
    assert inside == pytest.approx(PIECES / 2, abs=2)
    assert outside == pytest.approx(PIECES, abs=2)
    assert trimmed == pytest.approx(PIECES / 2, abs=2)
