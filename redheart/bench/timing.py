"""Seconds of several pieces of work, measured in turns: what else the machine does then meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from redheart.console import progress


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round but a first one, which warms up. Each round begins with another one; a GPU is waited for."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    with progress("measuring", (rounds + 1) * len(names)) as (bar, task):
        for turn in range(rounds + 1):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                _wait()
                started = time.perf_counter()
                runs[name]()
                _wait()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
                bar.update(task, advance=1, note=name)
    return seconds


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
