"""The GPU's path. Every job (work.py) runs in a process of its own: on the GPU, or on the CPU for comparison.

REDHEART_GPU_STAND_IN=cpu lets the CPU stand in for the GPU, so that these tests themselves can be run anywhere.
REDHEART_GPU_RESULTS=FILE: outcomes, seconds and what was measured, as JSON. tests/conftest.py has hidden the GPUs from this process.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from redheart.device import settle_allocator
from tests.runs import ROOT, environment

STAND_IN = os.environ.get("REDHEART_GPU_STAND_IN") == "cpu"
settle_allocator()  # the jobs inherit it
HERE = Path(__file__).parent
REPORTS: list[dict[str, Any]] = []


def variables(on: str) -> dict[str, str]:
    """The environment of a process that computes on `gpu` (or its stand-in) or on `cpu`."""
    found = environment()
    if on == "gpu" and not STAND_IN:
        del found["CUDA_VISIBLE_DEVICES"], found["DS_ACCELERATOR"]
        if found["REDHEART_TEST_GPUS"] != "all":
            found["CUDA_VISIBLE_DEVICES"] = found["REDHEART_TEST_GPUS"]
    return found


def begin(job: str, on: str, **wanted: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.gpu.work", job, json.dumps(wanted)]
    return subprocess.Popen(
        command, cwd=ROOT, env=variables(on), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: "subprocess.Popen[str]", timeout: int = 240) -> Any:
    """The job's last line that is JSON: libraries still say goodbye after it."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, output[-4000:]
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith('{"')))


def work(job: str, on: str = "gpu", **wanted: Any) -> Any:
    return finish(begin(job, on, **wanted))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            # the tests of one precision share its steps; all others go where there is room
            if precision := getattr(item, "callspec", None) and item.callspec.params.get("both"):
                item.add_marker(pytest.mark.xdist_group(precision))


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    """`cuda` or, where the CPU stands in, `cpu`; without either the tests are skipped."""
    if STAND_IN:
        return "cpu"
    code = "import torch; print(torch.cuda.is_available())"
    seen = subprocess.run([sys.executable, "-c", code], env=variables("gpu"), text=True, capture_output=True)
    if seen.stdout.strip() != "True":
        pytest.skip("torch sees no GPU; REDHEART_GPU_STAND_IN=cpu runs these tests on the CPU")
    return "cuda"


def grows_segments() -> bool:
    return "microsoft" not in platform.release().lower()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Written after every test: whoever cuts the run off keeps what there is."""
    if "tests/gpu/" not in report.nodeid or (report.when != "call" and report.outcome == "passed"):
        return
    REPORTS.append(
        {
            "test": report.nodeid.split("::", 1)[1],
            "when": report.when,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "measured": dict(report.user_properties),
            "why": "" if report.outcome == "passed" else str(report.longrepr)[-3000:],
        }
    )
    file = os.environ.get("REDHEART_GPU_RESULTS")
    if file and "PYTEST_XDIST_WORKER" not in os.environ:
        Path(file).write_text(json.dumps({"stand_in": STAND_IN, "tests": REPORTS}, indent=1), encoding="utf-8")
