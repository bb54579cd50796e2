"""The shell scripts: wrong words print the usage and exit 2, before anything is installed or run."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bash(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, text=True, capture_output=True, cwd="/", timeout=60, env={**os.environ, **variables})


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train-locally"],
        ["train-local", "--sample", "3"],
        ["train-local", "--samples"],
        ["train-local", "--samples", "0"],
        ["train-local", "--samples", "many"],
        ["train-local", "--full-dataset"],
        ["train-cloud", "--samples", "3"],
        ["train-cloud", "--checkpoint-interval", "-1"],
        ["train-validate", "--checkpoint-interval", "5"],
        ["train-local", "--dataset"],
    ],
)
def test_wrong_words_print_the_usage_and_exit_2(words: list[str]):
    result = bash("run_learning.sh", *words)
    assert result.returncode == 2
    assert "usage: bash launch/run_learning.sh MODE" in result.stderr


@pytest.mark.parametrize("script", ["run_learning.sh", "setup_env.sh", "run_tests.sh"])
def test_help_explains_and_exits_0(script: str):
    result = bash(script, "--help")
    assert result.returncode == 0
    assert script in result.stdout + result.stderr


def test_a_missing_interpreter_or_compiler_is_one_clear_line(tmp_path: Path):
    copy = tmp_path / "checkout"
    (copy / "launch").mkdir(parents=True)
    for name in ("launch/setup_env.sh", "launch/constraints.txt", "setup.cfg", "setup.py"):
        (copy / name).write_text((ROOT / name).read_text())
    script = str(copy / "launch" / "setup_env.sh")
    for variables, word in (({"PYTHON": "python0.0"}, "python0.0"), ({"CXX": "no-such-compiler"}, "compiler")):
        result = subprocess.run(
            ["bash", script], text=True, capture_output=True, env={**os.environ, **variables}, timeout=60
        )
        assert result.returncode == 1
        assert word in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (copy / "red_heart_env").exists()
