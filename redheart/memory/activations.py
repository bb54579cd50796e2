"""What one micro-step keeps beside the weights, and what it computes, measured on tensors without memory: no GPU, no guess.

    measure(config, micro_batch_size, tokens, checkpointing, dtype) -> MicroStep (bytes, FLOPs, kernels)
    activations(config, tokens, …) -> Activations, a line through two measured micro-batch sizes, cached on disk

The real network (model/build.py) runs forward, losses (tasks.py) and backward on shapes alone (memory/shapes.py) while a
dispatch mode counts the bytes of every live storage. It does what torch.distributed._tools.mem_tracker.MemTracker does (a
test compares the two) without that one's books per module, whose cost is operations × modules: minutes for this network.
Every sample has every label, and one in `PAIR_SHARE` has a contrast text of full length, as a preference corpus gives them.

Counted in `peak`: activations, gradients of activations, temporaries, losses, and of the weights' gradients only the newest: it is
dropped when it is complete, as ZeRO does once it lies in the bucket. `peak_with_gradients` keeps them all (strategy plain).
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from redheart.caches import cache_directory, writable
from redheart.config import RunConfig
from redheart.files import read_sealed_json, write_sealed_json
from redheart.losses.combine import combine
from redheart.memory.shapes import Shapes
from redheart.model.build import build_model
from redheart.model.redheart import RedHeartModel
from redheart.schema import LABELS
from redheart.signals.native import torch_form
from redheart.tasks import GATES, TASKS, task_losses, task_weights

PAIR_SHARE = 1.0  # contrast texts per sample: a batch of a preference corpus has one for each
MEASURED_AT = (4, 12)  # micro-batch sizes the line goes through
CUDA_BLOCK = 512  # bytes to which CUDA's caching allocator rounds an allocation
PIECE = 2**20  # bytes from which on a CPU gives freed memory back (memory/malloc.py)
CACHE_VERSION = 4


@dataclass(frozen=True)
class MicroStep:
    """One forward and backward of a micro-batch."""

    peak: int  # bytes beside weights and inputs, weights' gradients dropped when complete
    peak_with_gradients: int  # bytes, weights' gradients kept
    peak_rounded: int  # `peak` in the allocator's blocks of 512 bytes
    inputs: int  # bytes of the micro-batch itself
    flops: int  # forward and backward, a multiply-add counts as two
    kernels: int  # operations that are no views: what a GPU has to be told one by one
    gradients: int = 0  # bytes of all the weights' gradients
    # bytes beyond `peak` and `peak_with_gradients` where pieces of less than 1 MiB, once there, stay (a CPU's heap: memory/malloc.py)
    heap: int = 0
    heap_with_gradients: int = 0


@dataclass(frozen=True)
class Activations:
    """A line per figure of MicroStep through two micro-batch sizes."""

    low: MicroStep
    high: MicroStep
    sizes: tuple[int, int]

    def at(self, micro_batch_size: int) -> MicroStep:
        """The figures of any micro-batch size; exact at the two measured ones."""
        (a, b), lows, highs = self.sizes, asdict(self.low), asdict(self.high)
        share = (micro_batch_size - a) / (b - a)
        return MicroStep(**{k: max(0, round(lows[k] + (highs[k] - lows[k]) * share)) for k in lows})


class Watch(TorchDispatchMode):
    """Bytes of all storages that operations under this mode have made and that still live; the largest sums; FLOPs; kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.rounded = self.peak_rounded = 0  # in the allocator's blocks
        self.gradients = self.peak_with_gradients = 0  # of weights, were they kept
        self.small = self.most_small = self.most_large = self.most_large_with_gradients = (
            0  # pieces below and from 1 MiB on
        )
        self.flops = self.kernels = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return result
        self.kernels += not func.is_view
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        self.peak_rounded = max(self.peak_rounded, self.rounded)
        self.peak_with_gradients = max(self.peak_with_gradients, self.now + self.gradients)
        large = self.now - self.small
        self.most_small, self.most_large = max(self.most_small, self.small), max(self.most_large, large)
        self.most_large_with_gradients = max(self.most_large_with_gradients, large + self.gradients)
        return result

    def know(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors that were there before; they do not count."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = None

    def drop_gradient(self, parameter: torch.Tensor) -> None:
        """A hook for complete gradients: ZeRO has them in its bucket now."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            size = storage.nbytes()
            rounded = -(-size // CUDA_BLOCK) * CUDA_BLOCK
            self._known[storage] = weakref.finalize(storage, self._release, size, rounded)
            self.now += size
            self.small += size * (size < PIECE)
            self.rounded += rounded

    def _release(self, size: int, rounded: int) -> None:
        self.now -= size
        self.small -= size * (size < PIECE)
        self.rounded -= rounded


def measure(
    config: RunConfig,
    micro_batch_size: int,
    tokens: int,
    checkpointing: bool,
    dtype: torch.dtype,
    autocast: bool = False,
    contrasts: int | None = None,
) -> MicroStep:
    """One micro-step of the real network on shapes. `dtype`: of weights and features; `autocast`: to bf16, as `plain` does."""
    pairs = round(micro_batch_size * PAIR_SHARE) if contrasts is None else contrasts
    with Shapes(), torch_form():  # as a GPU computes the recursions: their kernels on a CPU take and keep less
        model = _model_of_shapes(config, dtype, checkpointing)
        step, inputs = _step(model, config, micro_batch_size, pairs, tokens, dtype, autocast)
        watch = Watch()
        watch.know([*model.parameters(), *model.buffers(), *inputs])
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(watch.drop_gradient)
        with watch:
            step()
    size = sum(x.untyped_storage().nbytes() for x in inputs)
    return MicroStep(
        watch.peak, watch.peak_with_gradients, watch.peak_rounded, size, watch.flops, watch.kernels, watch.gradients,
        watch.most_large + watch.most_small - watch.peak,
        watch.most_large_with_gradients + watch.most_small - watch.peak_with_gradients,
    )  # fmt: skip


def activations(
    config: RunConfig,
    tokens: int,
    checkpointing: bool,
    dtype: torch.dtype,
    autocast: bool = False,
    sizes: tuple[int, int] = MEASURED_AT,
) -> Activations:
    """Measured at two micro-batch sizes, or read from the cache of earlier measurements (same sizes, code and torch)."""
    path = _cache_file(config, tokens, checkpointing, dtype, autocast, sizes)
    if path.is_file():
        known = read_sealed_json(path, "delete it, and it is measured again")
        return Activations(MicroStep(**known["low"]), MicroStep(**known["high"]), sizes)
    writable(path.parent)
    low = measure(config, sizes[0], tokens, checkpointing, dtype, autocast)
    high = low if sizes[0] == sizes[1] else measure(config, sizes[1], tokens, checkpointing, dtype, autocast)
    write_sealed_json(path, {"low": asdict(low), "high": asdict(high)})
    return Activations(low, high, sizes)


def measured(
    config: RunConfig,
    micro_batch_size: int,
    tokens: int,
    checkpointing: bool,
    is_plain: bool,
    contrasts: int | None = None,
) -> MicroStep:
    """One micro-batch size of a run's own precision, from the cache where it is there. `is_plain`: fp32 weights under autocast.

    `contrasts`: of other than the usual number of contrast texts, which is measured each time.
    """
    bf16 = config.training.precision == "bf16"
    dtype = torch.bfloat16 if bf16 and not is_plain else torch.float32
    if contrasts is not None and contrasts != round(micro_batch_size * PAIR_SHARE):
        return measure(config, micro_batch_size, tokens, checkpointing, dtype, bf16 and is_plain, contrasts)
    sizes = (micro_batch_size, micro_batch_size)
    if not _cache_file(config, tokens, checkpointing, dtype, bf16 and is_plain, sizes).is_file():
        usual = _cache_file(config, tokens, checkpointing, dtype, bf16 and is_plain, MEASURED_AT)
        if usual.is_file():
            return activations(config, tokens, checkpointing, dtype, bf16 and is_plain).at(micro_batch_size)
    return activations(config, tokens, checkpointing, dtype, bf16 and is_plain, sizes).low


def _cache_file(
    config: RunConfig, tokens: int, checkpointing: bool, dtype: torch.dtype, autocast: bool, sizes: tuple[int, int]
) -> Path:
    model = config.model.model_dump()
    del model["activation_checkpointing"]
    setting = [tokens, checkpointing, str(dtype), autocast, sizes, PAIR_SHARE]
    key = [CACHE_VERSION, model, *setting, torch.__version__, code_digest()]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_directory() / "activations" / f"{name}.json"


def code_digest() -> str:
    """Digest of every source that decides what a micro-step computes."""
    package = Path(__file__).parents[1]
    rooms = ("model", "signals", "losses")
    files = sorted([p for room in rooms for p in (package / room).rglob("*.py")] + [package / "tasks.py"])
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in files)).hexdigest()


def _model_of_shapes(config: RunConfig, dtype: torch.dtype, checkpointing: bool) -> RedHeartModel:
    """The network with weights that have no memory; call it under Shapes(). Built on `meta`, so that nothing is initialised."""
    with torch.device("meta"):
        model = build_model(config, None)
    model.checkpoint_activations(checkpointing)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def _step(
    model: RedHeartModel,
    config: RunConfig,
    rows: int,
    pairs: int,
    tokens: int,
    dtype: torch.dtype,
    autocast: bool,
) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """Forward, losses and backward of a micro-batch in which everything is labelled; and its tensors."""
    width = config.model.encoder_width
    features, mask = torch.empty(rows, tokens, width, dtype=dtype), torch.ones(rows, tokens, dtype=torch.bool)
    others, their_mask = torch.empty(pairs, tokens, width, dtype=dtype), torch.ones(pairs, tokens, dtype=torch.bool)
    keys, whose = torch.arange(rows), torch.arange(pairs)
    labels = {name: torch.empty(rows, label.size) for name, label in LABELS.items()}
    weights = {name: torch.empty(rows, label.size) for name, label in LABELS.items()}
    counts, factors = dict.fromkeys((*TASKS, *GATES), 1.0), task_weights(config.loss)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(features, mask, others, their_mask, whose, sample_keys=keys)
        losses = task_losses(outputs, labels, weights, config.loss)
        combine({name: value for name, (value, _) in losses.items()}, counts, factors, 1).backward()

    return step, [features, mask, others, their_mask, keys, whose, *labels.values(), *weights.values()]
