"""Legs of tests/benchmarks/masters.py that are there already: the same are used again, others refused."""

from pathlib import Path

import pytest

from redheart.schema import RedHeartError
from tests.benchmarks import masters
from tests.data.shard_data import write_directory


def test_a_leg_stands_for_its_own_settings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_directory(tmp_path, [4])
    run: list[str] = []

    def leg(kept: str, *_: object) -> dict[str, float]:
        run.append(kept)
        return {"dev_loss": 1.0, "train_loss": 1.0, "seconds": 1.0}

    monkeypatch.setattr(masters, "leg", leg)

    def bench(steps: int) -> None:
        asked = ["--data", tmp_path, "--work", tmp_path / "work", "--preset", "local", "--steps", steps, "--seeds", 2]
        monkeypatch.setattr("sys.argv", ["masters.py", *map(str, asked)])
        masters.main()

    bench(20)
    bench(20)
    assert run == [*masters.MASTERS] * 2
    with pytest.raises(RedHeartError, match=r"fp32-0\.json was made with other data, settings .* another --work"):
        bench(10)
