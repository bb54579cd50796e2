"""Swap (DESIGN §5): modules that stay on the host and visit the device for their turn of a forward pass.

`place(model, device, swap)` puts a network on its device: the modules that `swap` names keep their parameters on the host
(page-locked, where the device is a GPU). When one is called, it runs on copies of them, which are gone when it returns. While
it runs, the copies of the module that was called after it in the pass before are fetched on a stream of their own. So at
most two swapped modules are on the device at a time.

Where gradients are wanted, the module runs under torch.utils.checkpoint and the copy is part of the graph: the backward pass
fetches the parameters again, and copies their gradients to the host's. There nothing is fetched ahead.

The same arithmetic runs on the same values: results are bit for bit those without swap.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from redheart.device import device_of
from redheart.model.redheart import RedHeartModel
from redheart.model.select import MODULES
from redheart.schema import RedHeartError

GIB = 2**30
Tensors = dict[str, torch.Tensor]
_Interval = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass(frozen=True)
class SwapReport:
    """What swapping did since `place`. Seconds of the device's clock on a GPU, of the wall elsewhere.

    `resident_gib` stays on the device, `peak_gib` was there at most: parameters and buffers, without activations.
    """

    modules: tuple[str, ...]
    fetches: int
    ahead: int  # fetches that began while another module ran
    moved_gib: float
    copy_s: float  # spent copying, beside the computation or not
    wait_s: float  # the computation waited for copies
    resident_gib: float
    peak_gib: float

    def __str__(self) -> str:
        return (
            f"swap: {', '.join(self.modules)} on the host; {self.fetches} fetches ({self.ahead} ahead of time) moved "
            f"{self.moved_gib:.2f} GiB in {self.copy_s:.2f} s, of which the computation waited {self.wait_s:.2f} s; parameters on the "
            f"device: {self.resident_gib:.3f} GiB always, {self.peak_gib:.3f} GiB at most"
        )


def place(model: RedHeartModel, device: torch.device | str, swap: Collection[str] = ()) -> Swap:
    """Puts the network on `device`, the modules of `swap` (names of MODULES) and idle ones apart; inputs follow by themselves.

    Raises RedHeartError for a name that is no module of this network, and for a device that is not there.
    """
    for name in swap:
        if name not in model.built:
            why = "this network was built without it" if name in MODULES else f"choose from {', '.join(MODULES)}"
            raise RedHeartError(f"swap: {name!r} cannot be swapped: {why}")
    return Swap(model, device_of(device), [m for m in model.built if m in swap])


class Swap:
    """The swapped modules of one network, made by `place`."""

    def __init__(self, model: RedHeartModel, device: torch.device, names: list[str]):
        self.device, self.names = device, names
        self._turns = {name: _Turn(self, name, model.get_submodule(name)) for name in names}
        for name in model.built:
            if name not in names and name not in model.idle:
                nn.Module.to(model.get_submodule(name), device)
        stay = [m for m in model.built if m not in names and m not in model.idle]
        self._resident = sum(_bytes_of(_tensors(model.get_submodule(m))) for m in stay)
        self._clock = _Clock(device)
        self._successor: dict[str, str] = {}  # who was called after whom in the last pass
        self._last: str | None = None
        self._ahead: tuple[str, Tensors] | None = None
        self._visiting = self._peak = self._moved = self._fetches = self._fetched_ahead = 0
        model.register_forward_pre_hook(self._open_pass, with_kwargs=True)

    def report(self) -> SwapReport:
        copy_s, wait_s = self._clock.seconds()
        return SwapReport(
            tuple(self.names), self._fetches, self._fetched_ahead, self._moved / GIB, copy_s, wait_s,
            self._resident / GIB, (self._resident + self._peak) / GIB,
        )  # fmt: skip

    def _open_pass(self, model: nn.Module, inputs: Any, keywords: Any) -> Any:
        """Before the network's forward: its inputs come to the device."""
        self._last = None
        move = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        return tuple(x.to(self.device) if isinstance(x, torch.Tensor) else x for x in inputs), move

    def take_turn(self, turn: _Turn, inputs: tuple[Any, ...]) -> Any:
        """The module's outputs for `inputs`, on copies of its parameters."""
        if torch.is_grad_enabled():
            training = turn.training()

            def run(*again: Any) -> Any:
                with turn.mode(training):  # the network's may have changed before the backward pass
                    return turn.run(self._fetch(turn), again)

            return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
        copies = self._arrived(turn.name) or self._fetch(turn)
        outputs = turn.run(copies, inputs)
        self._clock.launched()
        if self._last is not None:
            self._successor[self._last] = turn.name
        self._last = turn.name
        following = self._turns.get(self._successor.get(turn.name, ""))
        if following is not None and following is not turn:
            with self._clock.ahead():
                self._ahead = following.name, self._copies(following)
            self._fetched_ahead += 1
        return outputs

    def _arrived(self, name: str) -> Tensors | None:
        """The copies that were fetched ahead, if they are this module's; another module's are let go."""
        fetched, self._ahead = self._ahead, None
        if fetched is None or fetched[0] != name:
            return None
        self._clock.wait(fetched[1].values())
        return fetched[1]

    def _fetch(self, turn: _Turn) -> Tensors:
        with self._clock.now():
            return self._copies(turn)

    def _copies(self, turn: _Turn) -> Tensors:
        self._fetches += 1
        copies = {}
        for name, host in turn.tensors.items():
            copy = host.to(self.device, non_blocking=True, copy=True)
            size = _bytes_of({name: copy})
            self._moved += size
            self._visiting += size
            self._peak = max(self._peak, self._visiting)
            weakref.finalize(copy, self._leave, size)  # autograd may hold it longer than we do
            copies[name] = copy
        return copies

    def _leave(self, size: int) -> None:
        self._visiting -= size


class _Turn:
    """Stands in for the forward of one swapped module."""

    def __init__(self, swap: Swap, name: str, module: nn.Module):
        self.name, self._swap = name, swap
        if swap.device.type == "cuda":
            for tensor in _tensors(module).values():
                tensor.data = tensor.data.pin_memory()
        self.tensors = {f"module.{n}": t for n, t in _tensors(module).items()}
        self._original = _Original(module)
        module.forward = self  # type: ignore[method-assign,assignment]

    def __call__(self, *inputs: Any) -> Any:
        return self._swap.take_turn(self, inputs)

    def training(self) -> bool:
        return self._original.module.training

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        module, before = self._original.module, self._original.module.training
        if before == training:
            yield
            return
        module.train(training)
        try:
            yield
        finally:  # a recomputation ends by an exception, once it has what it needs
            module.train(before)

    def run(self, copies: Tensors, inputs: tuple[Any, ...]) -> Any:
        return functional_call(self._original, copies, inputs)


class _Original(nn.Module):
    """Calls a module by its class's forward, past the turn that stands in for it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return type(self.module).forward(self.module, *inputs)


class _Clock:
    """Where copies run and how long they take: on the computation's stream or beside it on a GPU, in the program elsewhere."""

    def __init__(self, device: torch.device):
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrival: torch.cuda.Event | None = None  # of what is fetched ahead
        self._launched: torch.cuda.Event | None = None  # the end of the last turn's computation
        self._copy_s = self._wait_s = 0.0
        self._copies: list[_Interval] = []
        self._waits: list[_Interval] = []

    @contextmanager
    def now(self) -> Iterator[None]:
        """Copies that the computation waits for."""
        if self._side is None:
            started = time.perf_counter()
            yield
            self._copy_s += time.perf_counter() - started
            self._wait_s += time.perf_counter() - started
        else:
            with _timed(torch.cuda.current_stream(), self._copies, self._waits):
                yield

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Copies beside the computation of the turn that was launched last, where the device can."""
        if self._side is None:
            with self.now():
                yield
        else:
            with torch.cuda.stream(self._side), _timed(self._side, self._copies):
                yield
            self._arrival = self._copies[-1][1]

    def wait(self, copies: Collection[torch.Tensor]) -> None:
        """The computation waits for what was fetched ahead."""
        if self._side is not None and self._arrival is not None:
            stream = torch.cuda.current_stream()
            with _timed(stream, self._waits):
                stream.wait_event(self._arrival)
            for copy in copies:
                copy.record_stream(stream)

    def launched(self) -> None:
        """After a turn. On a GPU the program then waits for the turn before this one, whose copies can only now be reused:
        without that it would run ahead and hold the copies of many."""
        if self._side is not None:
            before, self._launched = self._launched, torch.cuda.Event()
            self._launched.record(torch.cuda.current_stream())
            if before is not None:
                before.synchronize()

    def seconds(self) -> tuple[float, float]:
        """(copying, waited for), so far."""
        if self._side is not None:
            torch.cuda.synchronize()
            self._copy_s += sum(a.elapsed_time(b) for a, b in self._copies) / 1000
            self._wait_s += sum(a.elapsed_time(b) for a, b in self._waits) / 1000
            self._copies.clear()
            self._waits.clear()
        return self._copy_s, self._wait_s


@contextmanager
def _timed(stream: torch.cuda.Stream, *logs: list[_Interval]) -> Iterator[None]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    yield
    end.record(stream)
    for log in logs:
        log.append((start, end))


def _tensors(module: nn.Module) -> Tensors:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _bytes_of(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
