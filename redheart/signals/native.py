"""The compiled recursions of csrc/: built once on a machine, found again, called by the addresses of tensors; and who uses them.

The rule stands in `kernels_serve`. A training step on a CPU runs the kernels, always, so that a run and its resumption round alike;
where they cannot be built it stops and says why. Inference on a CPU runs them where they are built already, and computes the same
function by torch's operations where they are not, as it does on a GPU: equal but for rounding.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from redheart.caches import cache_directory, writable
from redheart.schema import RedHeartError

SOURCES = sorted((Path(__file__).parent / "csrc").iterdir())
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
PROCESSORS = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}  # by what torch itself computes with here
NAMES = {torch.float32: "float32", torch.float64: "float64"}

_by_torch = False


@contextlib.contextmanager
def torch_form() -> Iterator[None]:
    """Within it the recursions are torch's operations, as on a GPU: for memory plans, and as the oracle of tests."""
    global _by_torch
    before, _by_torch = _by_torch, True
    try:
        yield
    finally:
        _by_torch = before


def kernels_serve(*tensors: torch.Tensor) -> bool:
    """Whether a function of these tensors, of fp32 or fp64, is computed by the kernels."""
    if _by_torch or tensors[0].device.type != "cpu":
        return False
    return (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or is_built()


@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Whether an earlier run has compiled the kernels for this processor."""
    try:
        return _path().is_file()
    except RedHeartError:  # this user has nowhere to keep one
        return False


def call(name: str, dtype: torch.dtype, *args: torch.Tensor | ctypes.Array | int | float) -> None:
    """Runs a kernel on contiguous tensors of host memory. Raises RedHeartError where it cannot be compiled."""
    given: list[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double | ctypes.Array] = []
    for x in args:
        if isinstance(x, torch.Tensor):
            assert x.is_contiguous()
            assert (x.device.type, x.dtype) in (("cpu", dtype), ("cpu", torch.bool))
            given.append(ctypes.c_void_p(x.data_ptr()))
        elif isinstance(x, int):
            given.append(ctypes.c_int64(x))
        else:
            given.append(ctypes.c_double(x) if isinstance(x, float) else x)
    getattr(library(), f"{name}_{NAMES[dtype]}")(*given)


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels; the first call on a machine compiles them, in a few seconds."""
    path = _path()
    if not path.is_file():
        from redheart.optim.building import built_alone  # takes torch's machinery for extensions along

        built_alone(_name(), lambda: None if path.is_file() else _compile(path))
    return ctypes.CDLL(str(path))


def _path() -> Path:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return (Path(given) if given else cache_directory() / "kernels") / _name() / "signals.so"


@cache
def _name() -> str:
    """From the sources and the processor: two checkouts, and unlike machines with one home, share a cache but no kernel."""
    texts = b"".join(path.read_bytes() for path in SOURCES)
    key = texts + repr((FLAGS, torch.backends.cpu.get_cpu_capability())).encode()
    return f"redheart_signals_{hashlib.sha256(key).hexdigest()[:8]}"


def _compile(path: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RedHeartError(
            f"training on a CPU compiles its filters, and the compiler {compiler} is missing: apt-get install g++, or let CXX name one"
        )
    processor = PROCESSORS.get(torch.backends.cpu.get_cpu_capability())
    writable(path.parent, "TORCH_EXTENSIONS_DIR")
    part = path.with_suffix(f".{os.getpid()}")
    sources = [str(source) for source in SOURCES if source.suffix == ".cpp"]
    command = [compiler, *FLAGS, *([f"-march={processor}"] if processor else []), *sources, "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RedHeartError(
            f"the filters could not be compiled by `{' '.join(command)}`: {done.stderr.strip()[-2000:]}"
        )
    part.replace(path)
