"""`redheart bench gpu` to its end on a machine without a GPU, its failures, and what it may import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from redheart.bench import gpu, gpu_worker, processes
from redheart.bench.gpu_worker import matmul, operation
from redheart.cli import app
from redheart.config import dump_config, load_config
from redheart.schema import RedHeartError
from tests.runs import ROOT, environment, forked
from tests.train.tiny import SETTINGS

# few modules: what is tested is the bench, not the network
SMALL = [
    *SETTINGS,
    "model.encoder_width=32",
    "model.ablate=[analyzers.emotion, analyzers.regret, analyzers.surd, heads.surd, aux.dsp, aux.kalman]",
    "preset=tiny",
]
MACHINE = {
    "card": "NVIDIA H100 80GB HBM3",
    "matmul": {"tflop_per_s": 2.0, "edge": 8, "precision": "bfloat16"},
    "versions": {"torch": "0"},
    "launch_s": 5e-6,
    "operation_s": 3e-5,
    "wait_s": 2e-5,
}


@pytest.fixture
def preset(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(load_config("local", SMALL)), encoding="utf-8")
    return str(path)


def test_it_runs_to_its_end_on_the_cpu(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its processes are forked here; test_a_process_that_fails_tells_why starts them as the bench does."""

    def fork(command, **_):
        done = forked(command[2], *command[3:])
        return subprocess.CompletedProcess(command, done.returncode, done.stdout + done.stderr)

    monkeypatch.setattr(processes.subprocess, "run", fork)
    out = tmp_path / "results"
    asked = ["--strategies", "zero2_offload_8bit", "--tokens", "8", "--steps", "2"]
    done = CliRunner().invoke(app, ["bench", "gpu", "--presets", preset, *asked, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert {c["strategy"] for c in told["cases"]} == {"zero2_offload_8bit"}
    assert {told["machine"][price] for price in ("launch_s", "wait_s", "operation_s")} == {None}  # of a card
    peak = told["machine"]["matmul"]["tflop_per_s"]
    for case in told["cases"]:
        assert case["ended"], case
        assert case["cap_gib"] is None
        assert len(case["step_seconds"]) == len(case["losses"]) == 2 + 2
        timed = sorted(case["step_seconds"][2:])
        assert case["samples_per_s"] == pytest.approx(8 / (sum(timed) / 2))  # global batch ÷ median seconds
        assert case["tflop_per_s"] == pytest.approx(case["samples_per_s"] * case["flops_per_sample"] / 1e12)
        assert case["share_of_matmul"] == pytest.approx(case["tflop_per_s"] / peak)
        assert case["losses"][-1] < case["losses"][0]
        predicted, observed = case["predicted"]["host_peak_gib"], case["observed"]["host_peak_gib"]
        assert case["ratio"]["host_peak_gib"] == pytest.approx(predicted / observed)
        assert 0.5 < case["ratio"]["host_peak_gib"] < 2
        assert case["base_gib"] < case["start_gib"]["host_peak_gib"] <= observed
        assert case["micro_batch_size"] * case["gradient_accumulation_steps"] == 8
    assert told["ok"]
    assert told["target"]["met"] is None
    assert told["files"] == [str(out / "gpu-cpu-uncapped.json")]
    written = json.loads((out / "gpu-cpu-uncapped.json").read_text(encoding="utf-8"))
    assert {c["name"]: c["samples_per_s"] for c in written["cases"]} == {
        c["name"]: c["samples_per_s"] for c in told["cases"]
    }


def fake(preset: str, tmp_path: Path, monkeypatch, answer, **more):
    """The bench with `answer(job)` in place of processes, on a card of 80 GiB."""
    machine = {**MACHINE, "gpu_total_gib": 80.0, "host_free_gib": 64.0}
    monkeypatch.setattr(gpu, "alone", lambda job, _: machine if job["what"] == "machine" else answer(job))
    return gpu.bench_gpu([preset], [8], out=tmp_path, **more)


def test_a_case_that_fails_is_recorded_and_the_next_one_runs(preset: str, tmp_path: Path, monkeypatch, capfd):
    asked = []

    def answer(job):
        asked.append((job["config"]["memory"]["strategy"], job["cap_gib"]))
        if job["config"]["memory"]["strategy"] == "zero1":
            return {"ended": False, "error": "OutOfMemoryError: tried to allocate 2 GiB", "observed": None}
        return {"ended": True, "samples_per_s": 10.0, "observed": {}, "losses": [1.0]}

    result = fake(preset, tmp_path, monkeypatch, answer, caps=["8GiB"], strategies=["plain", "zero1", "zero2"])
    assert sorted(asked, key=str) == [("plain", 8.0), ("plain", None), ("zero1", 8.0), ("zero2", 8.0)]
    failed = [c for c in result["cases"] if not c["ended"]]
    assert [c["strategy"] for c in failed] == ["zero1"]
    assert "2 GiB" in failed[0]["error"]
    assert result["ok"] == (not failed[0]["is_chosen"])
    gpu.show(result)
    said = capfd.readouterr().err
    assert "30.0 µs for an operation of the network, 5.0 µs for a bare launch and 20.0 µs for a wait" in said
    assert "(the plan assumes 40, and 15 for a wait)" in said
    assert {p.name for p in tmp_path.glob("gpu-*.json")} == {
        "gpu-nvidia-h100-80gb-hbm3-8gib.json",
        "gpu-nvidia-h100-80gb-hbm3-uncapped.json",
    }
    # a second run with a filter leaves the other cases in the file
    fake(preset, tmp_path, monkeypatch, answer, caps=["8GiB"], strategies=["zero3"])
    written = json.loads((tmp_path / "gpu-nvidia-h100-80gb-hbm3-8gib.json").read_text(encoding="utf-8"))
    assert sorted(c["strategy"] for c in written["cases"]) == ["plain", "zero1", "zero2", "zero3"]


def test_the_cap_is_the_promise_that_the_engine_keeps(preset: str, tmp_path: Path, monkeypatch):
    promised = []

    def answer(job):
        promised.append((job["cap_gib"], job["config"]["memory"]["gpu_memory_gib"]))
        return {"ended": True, "samples_per_s": 10.0, "observed": {}, "losses": [1.0]}

    fake(preset, tmp_path, monkeypatch, answer, caps=["8GiB", "4GiB"], strategies=["plain"])
    assert promised == [(8.0, 8.0), (4.0, 4.0), (None, 80.0)]  # the reference has the whole card


def test_the_plans_choice_is_timed_compiled_as_well(preset: str, tmp_path: Path, monkeypatch, capfd):
    asked = []

    def answer(job):
        asked.append((job["config"]["memory"]["strategy"], job["compiled_too"]))
        compiled = {"samples_per_s": 14.0, "ratio": 1.4, "seconds": 77.0} if job["compiled_too"] else None
        return {"ended": True, "samples_per_s": 10.0, "observed": {}, "losses": [1.0], "compiled": compiled}

    result = fake(preset, tmp_path, monkeypatch, answer, caps=["8GiB"])
    (chosen,) = (c["strategy"] for c in result["cases"] if c["is_chosen"])
    assert not chosen.startswith("zero3")
    assert len(asked) > 1
    assert [strategy for strategy, compiled_too in asked if compiled_too] == [chosen]
    gpu.show(result)
    assert "14.0 samples/s with training.compile=regional (1.40×), after 77 s" in " ".join(
        capfd.readouterr().err.split()
    )


def test_the_plans_choices_alone(preset: str, tmp_path: Path, monkeypatch):
    def answer(job):
        return {"ended": True, "samples_per_s": 10.0, "observed": {}, "losses": [1.0]}

    result = fake(preset, tmp_path, monkeypatch, answer, caps=["8GiB", "4GiB"], chosen_only=True)
    assert [(c["cap_gib"], c["is_chosen"], c["is_reference"]) for c in result["cases"]] == [
        (8.0, True, False),
        (4.0, True, False),
    ]


def test_cases_for_which_no_time_is_left_are_named(preset: str, tmp_path: Path, monkeypatch):
    """Each takes 40 s of 100: the plan's choice and the reference come first, and two more would be one too many."""
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])

    def answer(job):
        clock[0] += 40
        return {"ended": True, "samples_per_s": 10.0, "observed": {}, "losses": [1.0], "compiled": None}

    told = fake(preset, tmp_path, monkeypatch, answer, caps=["8GiB"], seconds=100)
    assert [(c["is_chosen"], c["is_reference"]) for c in told["cases"]] == [(True, False), (False, True)]
    late = [s for s in told["not_fitting"] if "no time was left of 100 s" in s["why"]]
    assert late
    written = json.loads((tmp_path / "gpu-nvidia-h100-80gb-hbm3-8gib.json").read_text(encoding="utf-8"))
    assert {s["strategy"] for s in late} <= {s["strategy"] for s in written["not_fitting"]}


def test_the_command_fails_with_the_plans_own_choice(preset: str, tmp_path: Path, monkeypatch):
    def answer(job):
        return {"ended": False, "error": "no", "observed": None}

    result = fake(preset, tmp_path, monkeypatch, answer, caps=["8GiB"])
    assert sum(c["is_chosen"] for c in result["cases"]) == 1
    assert not result["ok"]
    asked = ["bench", "gpu", "--presets", preset, "--tokens", "8", "--caps", "8GiB", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, asked).exit_code == 1


def test_the_target_counts_cases_inside_its_memory():
    case = {"ended": True, "preset": "330m", "tokens": 64, "strategy": "zero2"}
    runs = [
        {**case, "cap_gib": None, "samples_per_s": 500.0},
        {**case, "cap_gib": 8.0, "samples_per_s": 119.0},
        {**case, "cap_gib": 4.0, "samples_per_s": 90.0},
        {**case, "cap_gib": 8.0, "tokens": 32, "samples_per_s": 200.0},
    ]
    assert gpu.target(runs)["reached"] == 119.0
    assert gpu.target(runs)["met"] is False
    assert gpu.target([*runs, {**case, "cap_gib": 8.0, "samples_per_s": 120.0}])["met"] is True


def test_a_process_that_fails_tells_why(preset: str):
    config = load_config(preset).model_dump(mode="json")
    job = {"what": "case", "config": config, "tokens": 8, "steps": 1, "cap_gib": 8.0, "compiled_too": False}
    seen = gpu.alone(job, 400)
    assert not seen["ended"]
    assert seen["error"].startswith("RedHeartError: without a GPU no memory can be capped")
    assert seen["observed"]["host_peak_gib"] > 0
    assert "Traceback" in seen["output"]
    assert "(--timeout)" in gpu.alone(job, 1)["error"]


@pytest.mark.parametrize("failing", ["while it compiles", "before"])
def test_what_was_measured_before_compiling_stays(failing: str, preset: str, tmp_path: Path, monkeypatch):
    measured = {name: [1.0, 1.0, 0.5, 0.5] for name in gpu_worker.FIGURES} | {"compiled": None}

    def measure_step(config, tokens, num_steps, before_compiling):
        if failing == "while it compiles":
            before_compiling(measured)
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(gpu_worker, "measure_step", measure_step)
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    config = load_config(preset).model_dump(mode="json")
    one = {"what": "case", "config": config, "tokens": 8, "steps": 2, "cap_gib": None, "compiled_too": True}
    job.write_text(json.dumps(one), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["gpu_worker", str(job), str(result)])
    if failing == "before":
        with pytest.raises(RuntimeError, match="no compiler"):
            gpu_worker.main()
        told = json.loads(result.read_text(encoding="utf-8"))
        assert (told["ended"], told["error"]) == (False, "RuntimeError: no compiler here")
        return
    gpu_worker.main()
    told = json.loads(result.read_text(encoding="utf-8"))
    assert (told["ended"], told["samples_per_s"]) == (True, 16.0)
    assert told["compiled"] == {"error": "RuntimeError: no compiler here"}


def test_a_case_that_compiles_for_too_long_keeps_what_was_measured(preset: str, tmp_path: Path, monkeypatch):
    def run(command, **_):
        Path(command[-1]).write_text('{"ended": true, "samples_per_s": 3.0}', encoding="utf-8")
        raise subprocess.TimeoutExpired(command, 7)

    monkeypatch.setattr(processes.subprocess, "run", run)
    told = gpu.alone({"what": "case"}, 7)
    assert (told["ended"], told["samples_per_s"]) == (True, 3.0)
    assert "after 7 s" in told["compiled"]["error"]


def test_unknown_strategies_are_refused():
    with pytest.raises(RedHeartError, match="choose from plain, gpu_8bit"):
        gpu.bench_gpu(strategies=["zero4"])


def test_an_operation_of_the_network_has_a_price():
    assert 1e-6 < operation(repeats=2) < 2e-3


def test_the_matrix_product_is_timed(monkeypatch: pytest.MonkeyPatch):
    """Three warm-ups of 9 s are left out; of 2, 4 and 7 s the middle one counts."""
    ends = iter(np.cumsum([0, *(x for seconds in (9, 9, 9, 2, 7, 4) for x in (seconds, 1))]).tolist())
    monkeypatch.setattr("redheart.bench.gpu_worker.time.perf_counter", lambda: next(ends))
    assert matmul(64, repeats=3)["tflop_per_s"] == pytest.approx(2 * 64**3 / 4 / 1e12)


def test_it_needs_neither_datasets_nor_pyarrow():
    code = (
        "import sys; sys.modules['datasets'] = sys.modules['pyarrow'] = None\n"
        "import redheart.cli, redheart.bench.gpu, redheart.bench.gpu_worker\n"
        "from redheart.train.engine.machinery import import_machinery; import_machinery(); print('imported')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=400
    )
    assert done.stdout.strip().endswith("imported"), done.stderr[-2000:]
