"""A small data directory, prepared once from the shipped texts by the real LLM and the real encoder, and one run on it."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from redheart.config import DataConfig
from redheart.data.prepare import prepare
from redheart.data.sources import everyday

BY_HAND = f"everyday={everyday.folder() / 'everyday.json'}"  # these texts leave the LLM something to label
WHOLE = 10


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """What `make` writes to the path it is given; parallel workers share it, and the first that needs it makes it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    path, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(path)
            done.touch()
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "everyday-24", lambda out: prepare([BY_HAND], out, DataConfig(), num_samples=24))


@pytest.fixture(scope="session")
def whole_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WHOLE uninterrupted steps on DeepSpeed ZeRO-2 with the optimizer on the host."""
    from tests.runs import SMALL, train

    evaluate = ("--set", f"training.evaluate_every={WHOLE // 2}")
    return made_once(tmp_path_factory, "whole", lambda run: train(data, run, WHOLE, *SMALL, *evaluate))
