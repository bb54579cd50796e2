"""The draw is the seed's, a case says how far a prediction lies off, and a small run is observed and predicted by the command's own way."""

import json
import threading
from pathlib import Path

import pytest

from redheart.bench import memory
from redheart.config import load_config

STEP = ("peak", "peak_with_gradients", "peak_rounded", "inputs", "flops", "kernels")  # of a MicroStep


def test_the_draw_is_the_seeds_and_every_configuration_is_sound():
    jobs = memory.draw(60, 3)
    assert jobs == memory.draw(60, 3)
    assert jobs[:20] == memory.draw(20, 3)
    assert jobs != memory.draw(60, 4)
    configs = [load_config("local", job["set"]) for job in jobs]
    assert {c.memory.strategy for c in configs} == set(memory.STRATEGIES)
    for job, config in zip(jobs, configs, strict=True):
        assert config.training.global_batch_size % (config.training.micro_batch_size * job["ranks"]) == 0
        assert config.memory.strategy != "plain" or job["ranks"] == 1


def test_errors_are_those_of_the_whole_and_of_what_came_after_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = {"set": ['memory.strategy="plain"'], "tokens": 8, "contrasts": 1.0, "ranks": 1}
    cases = [{**job, "observed_gib": observed, "base_gib": 1.0} for observed in (2.0, 4.0, 2.0)]
    (tmp_path / "before.json").write_text(json.dumps({"cases": cases}))
    predictions = iter((2.2, 3.0, 2.0))
    monkeypatch.setattr(memory, "planned", lambda job, base, step: {"host_peak_gib": next(predictions)})
    told = memory.bench_memory(1, 0, tmp_path / "out.json", tmp_path / "before.json")
    assert told["configurations"] == 3
    assert told["error"] == pytest.approx({"median": 0.1, "worst": 0.25, "lowest": -0.25})
    assert told["error_beyond"] == pytest.approx({"median": 0.2, "worst": 1 / 3, "lowest": -1 / 3})
    assert json.loads((tmp_path / "out.json").read_text()) == told
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_bench_that_was_interrupted_runs_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[dict] = []

    def observed(work, job, ranks, timeout_s):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(job)
        return {"observed_gib": 2.0, "base_gib": 1.0, "micro_step": dict.fromkeys(STEP, len(ran))}

    predicted: list[int] = []  # what a case that ran was predicted from; 0: measured again
    monkeypatch.setattr(memory, "on_ranks", observed)

    def planned(job, base, step):
        predicted.append(step.peak if step else 0)
        return {"host_peak_gib": 2.0}

    monkeypatch.setattr(memory, "planned", planned)
    with pytest.raises(KeyboardInterrupt):
        memory.bench_memory(4, 0, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["configurations"] == 2
    first, ran[:] = list(ran), []
    memory.bench_memory(4, 0, tmp_path / "out.json")
    assert [*first, *ran] == memory.draw(4, 0)
    assert predicted == [1, 2, 0, 0, 1, 2]
    assert json.loads((tmp_path / "out.json").read_text())["configurations"] == 4


def test_on_a_gpu_the_allocator_is_judged_and_a_case_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Side by side, in the order of the draw; each in a process of gpu_worker.py, whose answers are stood in for here."""
    seen = {"host_peak_gib": 3.0, "gpu_allocated_gib": 1.0, "gpu_reserved_gib": 1.25}
    jobs = memory.draw(6, 0, on_gpu=True)

    def alone(job: dict, timeout_s: int) -> dict:
        assert job["what"] == "memory"
        if job["set"] == jobs[2]["set"]:
            return {"ended": False, "error": "exit code 1", "output": "out of memory"}
        return {"ended": True, "observed": seen, "micro_step": dict.fromkeys(STEP, 1)}

    monkeypatch.setattr(memory, "has_gpu", lambda: True)
    monkeypatch.setattr(memory, "alone", alone)
    twice = {name: 2 * value for name, value in seen.items()}
    monkeypatch.setattr(memory, "planned", lambda job, base, step: twice if base == 0 else {})
    told = memory.bench_memory(6, 0, tmp_path / "out.json", at_once=3)
    assert [c["set"] for c in told["cases"]] == [job["set"] for i, job in enumerate(jobs) if i != 2]
    assert told["configurations"] == 5
    assert not told["ok"]
    assert [(f["set"], f["failed"]) for f in told["failed"]] == [(jobs[2]["set"], "exit code 1")]
    errors = {"median": 1.0, "worst": 1.0, "lowest": 1.0}
    assert {k: v for k, v in told.items() if k.startswith("error")} == dict.fromkeys(
        ("error", "error_beyond", "error_of_host_peak_gib", "error_of_gpu_allocated_gib"), errors
    )
    ran = [c["set"] for c in json.loads((tmp_path / "out.json").read_text())["cases"]]
    assert ran == [c["set"] for c in told["cases"]]


def test_a_case_of_a_gpu_is_predicted_as_one():
    job = {"set": ["memory.strategy=plain", "training.global_batch_size=2"], "tokens": 8, "contrasts": 1.0, "ranks": 1}
    on_cpu = memory.planned(job, 1.0)
    on_gpu = memory.planned(job | {"others": {}}, 0.0)
    assert on_cpu.keys() == {"host_peak_gib"}
    assert on_gpu.keys() == {"host_peak_gib", "gpu_allocated_gib", "gpu_reserved_gib"}
    assert 0 < on_gpu["gpu_allocated_gib"] < on_gpu["gpu_reserved_gib"] < 1


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_drawn_configuration_can_be_planned(on_gpu: bool):
    for job in memory.draw(40, 1, on_gpu):
        config = load_config("local", job["set"])
        assert job["ranks"] in ((1,) if on_gpu else (1, 2))
        assert on_gpu or config.memory.strategy != "gpu_8bit"


def test_nothing_more_begins_when_somebody_interrupts(monkeypatch: pytest.MonkeyPatch):
    begun, go = [], threading.Event()

    def alone(job: dict, timeout_s: int) -> dict:
        begun.append(job)
        if len(begun) > 1:
            go.wait(60)
        return {"ended": True, "observed": {"gpu_reserved_gib": 1.0}, "micro_step": dict.fromkeys(STEP, 1)}

    def planned(job, base, step):
        threading.Timer(0.2, go.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "has_gpu", lambda: True)
    monkeypatch.setattr(memory, "alone", alone)
    monkeypatch.setattr(memory, "planned", planned)
    with pytest.raises(KeyboardInterrupt):
        memory.bench_memory(40, 0, at_once=2)
    assert 2 <= len(begun) <= 4  # the first, and those that took their turn before the interrupt


def test_no_configuration_starts_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter((0.0, 3.0, 6.0, 11.0, 12.0))  # the end is set at the first
    monkeypatch.setattr(memory.time, "monotonic", lambda: next(clock))
    told = {"observed_gib": 2.0, "base_gib": 1.0, "micro_step": dict.fromkeys(STEP, 1)}
    monkeypatch.setattr(memory, "on_ranks", lambda work, job, ranks, timeout_s: told)
    monkeypatch.setattr(memory, "planned", lambda job, base, step: {"host_peak_gib": 2.0})
    found = memory.bench_memory(4, 0, tmp_path / "out.json", seconds=10)
    assert (found["configurations"], found["left_out"], found["ok"]) == (2, 2, True)


def test_where_every_configuration_fails_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "has_gpu", lambda: True)
    monkeypatch.setattr(memory, "alone", lambda job, timeout_s: {"ended": False, "error": "exit code 1"})
    found = memory.bench_memory(2, 0, tmp_path / "out.json")
    assert (found["configurations"], len(found["failed"]), found["ok"]) == (0, 2, False)
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert not (tmp_path / "out.png").exists()
