"""Tensors of a CPU that have a shape and a storage without memory: what a network does, in a third of FakeTensorMode's time.

    with Shapes():
        model = nn.Linear(64, 64)          # its weights are Shape tensors
        model(torch.empty(8, 64)).sum().backward()

Torch's own FakeTensorMode does the same for any operation of any program. It also keeps constants, symbolic sizes and a cache of
operations, and their books take longer than the operations do: of a micro-step of preset `local` 12 to 15 s of processor, where `meta`
tensors take 3. Plain `meta` tensors are no model of a run, however: attention is another operation on them, and autocast passes them by.
So a Shape is a `meta` tensor that dispatches as a CPU's would, and has no data to read (`.item()` fails).

tests/memory/test_shapes.py holds operations, bytes and FLOPs against FakeTensorMode. They are equal but for norms of 16-bit
numbers, whose statistics are kept in fp32 here, as CUDA does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CPU, META = torch.device("cpu"), torch.device("meta")
WHERE = torch.ops.prim.device.default


class Shape(torch.Tensor):
    """A tensor on `meta` that autograd, autocast and attention take for one of a CPU; only Shapes makes them."""

    on_meta: torch.Tensor

    @staticmethod
    def __new__(cls, on_meta: torch.Tensor) -> Shape:
        made: Shape = torch.Tensor._make_subclass(
            cls, on_meta, False, dispatch_device=True, device_for_backend_keys=CPU
        )
        made.on_meta = on_meta
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is WHERE:
            return CPU
        raise RuntimeError(f"{func} met a tensor without data outside of Shapes()")


class Shapes(TorchDispatchMode):
    """Every operation runs on `meta`; what it makes are Shape tensors, whatever device was named."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is WHERE:
            return CPU
        known: dict[int, Shape] = {}

        def bare(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, Shape):
                return tensor.to(META)  # a constant of the program
            known[id(tensor.on_meta)] = tensor
            return tensor.on_meta

        def dressed(tensor: torch.Tensor) -> torch.Tensor:
            return known[id(tensor)] if id(tensor) in known else Shape(tensor)

        named = {name: _each(bare, value) for name, value in (kwargs or {}).items()}
        if _takes_device(func):
            named["device"] = META
        return _each(dressed, func(*_each(bare, args), **named))


@cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _each(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with its tensors changed; operations take and give tensors, and lists and tuples of them."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_each(change, item) for item in value)
    return value
