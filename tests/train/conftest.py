"""A small data directory, prepared once from the shipped texts by the real LLM and the real encoder."""

from pathlib import Path

import pytest

from redheart.config import DataConfig
from redheart.data.prepare import PrepareReport, prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PrepareReport]:
    out = tmp_path_factory.mktemp("data") / "everyday-24"
    return out, prepare(["everyday"], out, DataConfig(), num_samples=24)


@pytest.fixture(scope="session")
def data(prepared: tuple[Path, PrepareReport]) -> Path:
    return prepared[0]


@pytest.fixture(scope="session")
def whole_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 uninterrupted steps on DeepSpeed ZeRO-2 with the optimizer on the host."""
    from tests.runs import train

    run = tmp_path_factory.mktemp("runs") / "whole"
    train(data, run, 20, "--set", "training.evaluate_every=10")
    return run
