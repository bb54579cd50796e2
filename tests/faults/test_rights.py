"""Where users' texts lie nobody else reads: directories 0700, files 0600; what holds none follows the umask."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from redheart.files import committed_directory, unfinished_directory, write_text
from redheart.owned import make_directory
from redheart.reading import write_answers


def rights(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_directories_of_runs_and_of_data_are_their_owner_s(tmp_path: Path):
    make_directory(tmp_path / "runs" / "one", "--out")
    assert (rights(tmp_path / "runs"), rights(tmp_path / "runs" / "one")) == (0o755, 0o700)
    (tmp_path / "shared").mkdir(0o750)
    make_directory(tmp_path / "shared", "--out")
    assert rights(tmp_path / "shared") == 0o750
    with unfinished_directory(tmp_path / "deduped", 0o700) as made:
        assert rights(made) == 0o700


def test_answers_are_their_owner_s_and_an_export_follows_the_umask(tmp_path: Path):
    for suffix in ("csv", "jsonl"):
        write_answers(tmp_path / f"answers.{suffix}", [{"text": "mine"}], [{"regret": 0.5}])
        assert rights(tmp_path / f"answers.{suffix}") == 0o600
    with committed_directory(tmp_path / "export") as made:
        write_text(made / "card", "x")
    assert (rights(tmp_path / "export"), rights(tmp_path / "export" / "card")) == (0o755, 0o644)
