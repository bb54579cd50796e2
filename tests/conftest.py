"""What every test stands on: fixed seeds, few threads, no network, and the CPU."""

import gc
import os
import random
import signal
from collections.abc import Iterator

# these tests are about the CPU, on machines with a GPU too; tests/gpu gives the GPUs back to processes of its own
os.environ.setdefault("REDHEART_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")  # subprocesses inherit it

import numpy as np
import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test may draw from the global generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """The command line ignores SIGUSR1 from its start to the end of its process, which here is not its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """What is imported by now stays: else every garbage collection, and a run asks for several, walks through all of it."""
    gc.collect()
    gc.freeze()
