"""Where the processes of a run stand when it seems to stand still: `kill -QUIT` of one writes the stacks of all on its node.

RUN/stacks-rankN.txt gets every thread's stack, from a handler that runs whatever the process is stuck in (faulthandler). The process
that was asked passes it on to the others of its node as SIGUSR2, from a thread: its main thread may be waiting in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from redheart.ranks import gathered, rank
from redheart.train.aside import Aside


def stacks_file(number: int) -> str:
    return f"stacks-rank{number}.txt"


@contextmanager
def stacks(run: Path) -> Iterator[None]:
    """While it lasts, SIGQUIT does that. Collective; in the main thread, where alone signals can be heard."""
    me = (socket.gethostname(), os.getpid())
    others = [pid for host, pid in gathered(me) if host == me[0] and pid != me[1]]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    path = run / stacks_file(rank())
    with ExitStack() as held:
        Aside(path.name)(lambda: held.enter_context(_listening(path, others)))
        yield
    if path.exists() and not path.stat().st_size:
        path.unlink()


@contextmanager
def _listening(path: Path, others: Sequence[int]) -> Iterator[None]:
    with path.open("a", encoding="utf-8") as file, ExitStack() as held:
        if others:
            held.enter_context(_passing_on(others))
        faulthandler.register(signal.SIGQUIT, file, chain=bool(others))
        faulthandler.register(signal.SIGUSR2, file)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR2)
            faulthandler.unregister(signal.SIGQUIT)


@contextmanager
def _passing_on(others: Sequence[int]) -> Iterator[None]:
    """Python's own handler writes a signal's number to a pipe, also while no Python runs in the main thread; a thread reads it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def pass_on() -> None:
        while number := os.read(reading, 1):
            for pid in others if number[0] == signal.SIGQUIT else ():
                try:
                    os.kill(pid, signal.SIGUSR2)
                except ProcessLookupError:
                    continue  # it has ended

    thread = threading.Thread(target=pass_on, name="stacks", daemon=True)
    thread.start()
    handler = signal.signal(signal.SIGQUIT, lambda *_: None)
    before = signal.set_wakeup_fd(writing)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGQUIT, handler)
        os.close(writing)
        thread.join()
        os.close(reading)
