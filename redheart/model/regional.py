"""`training.compile: regional`: the layers of all stacks compiled by torch.compile, in training.

A stack's layers are alike, so they share one graph for every shape of a micro-batch; the rest of the network, whose parts each
come once, stays as it is. Shapes are fixed (dynamic=False), and a run has few (data/collate.py). What was compiled is kept in
redheart's cache and found again by later runs; nothing falls back to uncompiled layers by itself.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from redheart.caches import cache_directory, writable
from redheart.config import RunConfig
from redheart.device import compute_device
from redheart.model.backbone import EncoderStack, encoder_layer
from redheart.model.layers import QueryStack, query_layer
from redheart.model.redheart import RedHeartModel
from redheart.schema import RedHeartError

CACHE = "TORCHINDUCTOR_CACHE_DIR"
MOST_GRAPHS = 128  # of one function: four stacks of queries, each for every shape


def check_compilation(config: RunConfig) -> None:
    """Raises RedHeartError where `training.compile` asks for what cannot be done with this configuration or on this machine."""
    if config.training.compile == "off":
        return
    remedy = "set training.compile=off"
    if config.memory.strategy.startswith("zero3"):
        raise RedHeartError(
            f"training.compile=regional: {config.memory.strategy} gathers weights as each module's turn comes, which compiled layers "
            f"have not been shown to stand: {remedy}, or choose a zero2 strategy"
        )
    if config.memory.swap:
        raise RedHeartError(
            f"training.compile=regional: memory.swap moves weights between host and device, which compiled layers have not been "
            f"shown to stand: {remedy}, or empty memory.swap"
        )
    needed = os.environ.get("CXX", "g++")
    if shutil.which(needed) is None:
        raise RedHeartError(
            f"training.compile=regional: the compiler {needed} is missing: apt-get install g++, let CXX name one, or {remedy}"
        )
    if compute_device().type == "cuda" and importlib.util.find_spec("triton") is None:
        raise RedHeartError(f"training.compile=regional: a GPU needs the package triton, which is missing: {remedy}")


def few_shapes(config: RunConfig) -> bool:
    """Whether micro-batches are padded so that a run has few shapes of them: where each is compiled, and on a GPU, whose kernels and
    allocator prefer them. A CPU that compiles nothing would only compute the padding, a seventh more tokens."""
    return config.training.compile == "regional" or compute_device().type == "cuda"


class Compiler:
    """The compiled layers of this process, for any network of it, and what making them has taken so far."""

    def __init__(self) -> None:
        from torch._dynamo import callback, config
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        if os.environ.get(CACHE) in (None, default_cache_dir()):  # torch writes its own default there
            os.environ[CACHE] = str(cache_directory() / "inductor")
        writable(Path(os.environ[CACHE]), CACHE)

        # beyond torch's own limit a further shape would run uncompiled without a word
        config.recompile_limit, config.fail_on_recompile_limit_hit = MOST_GRAPHS, True
        self.seconds, self.graphs = 0.0, 0
        self.shapes: set[torch.Size] = set()  # of the attention bias of a micro-batch, [rows, 1, 1, T]
        self._started = 0.0
        callback.on_compile_start(self._starts)
        callback.on_compile_end(self._ends)
        self._encoder = torch.compile(encoder_layer, dynamic=False)
        self.query_layer = torch.compile(query_layer, dynamic=False)

    def encoder_layer(self, x: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        if bias is not None:
            self.shapes.add(bias.shape)
        return self._encoder(x, bias, *rest)

    def report(self) -> dict[str, float]:
        return {"seconds": self.seconds, "graphs": self.graphs, "shapes": len(self.shapes)}

    def __str__(self) -> str:
        return (
            f"compiling layers took {self.seconds:.0f} s so far: {self.graphs} graphs, forward and backward, for {len(self.shapes)} "
            f"shapes of micro-batches; kept in {os.environ[CACHE]}"
        )

    def _starts(self, _: Any) -> None:
        self._started = time.perf_counter()

    def _ends(self, _: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        self.graphs += 1


@cache
def compiler() -> Compiler:
    """The one of this process."""
    return Compiler()


def compile_layers(model: RedHeartModel) -> None:
    """From here on `model` runs compiled layers in training mode; each shape is compiled when it first comes."""
    for module in model.modules():
        if isinstance(module, EncoderStack):
            module.compiled_layer = compiler().encoder_layer
        elif isinstance(module, QueryStack):
            module.compiled_layer = compiler().query_layer
