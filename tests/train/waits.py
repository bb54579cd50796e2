"""Counts where Python waits for a device: on the CPU too, where such a wait costs nothing but stands in the same places."""

from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "_linalg_check_errors"}
COPIES = {torch.Tensor.tolist, torch.Tensor.numpy}  # no operation of theirs is dispatched


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Counter[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, seen: Counter[str]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPIES:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted():
    """with counted() as seen: …; then seen.total() waits."""
    seen: Counter[str] = Counter()
    with _Operations(seen), _Functions(seen):
        yield seen
