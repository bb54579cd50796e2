"""launch/gpu_check.sh: its words, its parts and their time with a stand-in for Python, and all of it on the CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import BIN, ROOT

SCRIPT = ROOT / "launch" / "gpu_check.sh"
PARTS = ["setup", "tests", "bench", "memory", "more"]


def check(*words: str, timeout: int = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    # the last: the tests that the script runs are no worker's of this run
    ours = ("OUT", "PYTHON", "REDHEART_GPU_STAND_IN", "PYTEST_XDIST_WORKER")
    known = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(
        ["bash", str(SCRIPT), *words], text=True, capture_output=True, timeout=timeout, env={**known, **variables}
    )


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu_check.json").read_text())


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Writes down what it is asked; does $STUB_tests and the like, by part."""
    stub = tmp_path / "python-stub"
    stub.write_text(
        f"""#!/bin/bash
echo "$*" >>{tmp_path}/asked
case "$*" in
  -\\ *) eval "${{STUB_setup:-true}}" ;;
  *"-m pytest "*) eval "${{STUB_tests:-true}}" ;;
  *chosen-only*) eval "${{STUB_more:-true}}" ;;
  *"bench memory"*) eval "${{STUB_memory:-true}}" ;;
  *"redheart bench "*) eval "${{STUB_bench:-true}}" ;;
  *'import xdist'*) exit 1 ;;
esac
"""
    )
    stub.chmod(0o755)
    return str(stub)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--skip", "lunch"], "setup tests bench memory more"),
        (["--skip"], "--skip needs"),
        (["--minutes", "0"], "positive whole number"),
        (["--minutes", "eight"], "positive whole number"),
        (["--wheels", "/nowhere"], "--wheels needs a directory"),
        (["--device", "tpu"], "gpu or cpu"),
        (["--out"], "--out needs"),
        (["--fast"], "unknown option"),
    ],
)
def test_wrong_words_print_the_usage_and_exit_2(words: list[str], said: str):
    done = check(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "bash launch/gpu_check.sh [--out DIR]" in done.stderr


def test_help_explains_and_exits_0():
    done = check("--help")
    assert done.returncode == 0
    assert "at most eight minutes" in done.stdout
    assert "set -euo" not in done.stdout


def test_every_part_runs_in_order_and_is_written_down(python: str, tmp_path: Path):
    done = check("--out", str(tmp_path / "out"), PYTHON=python)
    assert done.returncode == 0, done.stderr
    told = results(tmp_path / "out")
    assert [(p["part"], p["outcome"]) for p in told["parts"]] == [(p, "ok") for p in PARTS]
    assert told["device"] == "gpu"
    asked = (tmp_path / "asked").read_text()
    for words in (
        "- gpu",
        "tests/gpu",
        "bench gpu --presets 330m --tokens 64 --caps 8GiB",
        "--at-once 6",
        "--presets 1b3",
    ):
        assert words in asked


def test_results_go_where_out_says(python: str, tmp_path: Path):
    skip = [word for part in PARTS[1:] for word in ("--skip", part)]
    assert check(*skip, PYTHON=python, OUT=str(tmp_path / "given")).returncode == 0
    told = results(tmp_path / "given")
    assert [p["outcome"] for p in told["parts"]] == ["ok", *["skipped"] * 4]
    assert "pytest" not in (tmp_path / "asked").read_text()


def test_a_part_that_fails_leaves_the_others_their_turn(python: str, tmp_path: Path):
    done = check("--out", str(tmp_path / "out"), PYTHON=python, STUB_tests="echo broken; exit 3")
    assert done.returncode == 1
    outcomes = {p["part"]: p["outcome"] for p in results(tmp_path / "out")["parts"]}
    assert outcomes == dict.fromkeys(PARTS, "ok") | {"tests": "failed with exit code 3"}
    assert "broken" in (tmp_path / "out" / "gpu_check.log").read_text()


def test_without_its_device_it_stops_and_says_so(python: str, tmp_path: Path):
    done = check("--out", str(tmp_path / "out"), PYTHON=python, STUB_setup="echo 'torch sees no GPU here' >&2; exit 1")
    assert done.returncode == 1
    assert "torch sees no GPU here" in done.stderr
    assert [p["outcome"] for p in results(tmp_path / "out")["parts"]] == ["failed with exit code 1"]


@pytest.mark.slow
def test_the_time_is_kept(python: str, tmp_path: Path):
    """A part that hangs is cut off, its children too, and who comes after it is told that no time is left."""
    left = tmp_path / "left"
    began = time.monotonic()
    done = check(
        "--out",
        str(tmp_path / "out"),
        "--minutes",
        "1",
        timeout=90,
        PYTHON=python,
        STUB_tests=f"sleep 300; touch {left}",
        STUB_bench="sleep 300",
    )
    assert done.returncode == 1
    assert 50 < time.monotonic() - began < 62
    outcomes = {p["part"]: p["outcome"] for p in results(tmp_path / "out")["parts"]}
    assert outcomes["tests"] == "cut off after 30 s"  # its share: half of the time
    assert outcomes["bench"].startswith("cut off after 2")
    assert outcomes["more"] == "no time left"
    assert subprocess.run(["pgrep", "-f", f"touch {left}"]).returncode == 1


@pytest.mark.slow
def test_all_of_it_with_the_cpu_as_the_gpu(tmp_path: Path):
    """The tests of tests/gpu themselves, both benches, and the figures they leave."""
    none = tmp_path / "wheels"  # those in .whl, where somebody has collected any, are another Python's
    none.mkdir()
    done = check(
        "--device", "cpu", "--minutes", "30", "--out", str(tmp_path), "--wheels", str(none), timeout=1900,
        PYTHON=sys.executable, PATH=f"{BIN}:{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (tmp_path / "gpu_check.log").read_text()[-5000:]
    assert [p["outcome"] for p in results(tmp_path)["parts"]] == ["ok"] * 5
    tests = json.loads((tmp_path / "tests.json").read_text())
    assert tests["stand_in"]
    others = {t["test"]: t["outcome"] for t in tests["tests"] if t["outcome"] != "passed"}
    assert others == {
        "test_an_operation_and_a_wait_cost_what_the_plan_assumes_within_an_order": "skipped"
    }  # prices of a card
    assert sum("test_a_step_on_the_gpu_is_the_cpus" in t["test"] for t in tests["tests"]) == 14
    bench = json.loads((tmp_path / "gpu-cpu-uncapped.json").read_text())
    assert {c["strategy"] for c in bench["cases"]} >= {"plain", "zero2_offload_8bit"}
    assert all(c["ended"] for c in bench["cases"])
