"""Out of memory: the run goes on with a smaller micro-batch and is the run that had it from the start."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from redheart.config import RunConfig, load_config
from redheart.data.order import global_batch
from redheart.data.stream import SampleStream
from redheart.model.build import build_model
from redheart.ranks import OutOfMemory, together
from redheart.schema import Batch, RedHeartError
from redheart.tasks import task_weights
from redheart.train.checkpoint import read_progress
from redheart.train.engine import PlainEngine
from redheart.train.oom import Rehearsals
from redheart.train.stages import open_window
from redheart.train.start import train as start
from redheart.train.trainer import Trainer
from tests.runs import losses, train
from tests.train.oom_run import install
from tests.train.tiny import make_batch

STEPS = 4
SETTINGS = [
    "training.log_samples=true",
    "training.log_every=1",
    "training.evaluate_every=100",
    f"training.max_steps={STEPS}",
    "training.global_batch_size=16",
]
SMALL = ["model.width=24", "model.heads=2", "model.layers=1", "model.task_width=16", "model.task_heads=2"]


def sample_ids(run: Path, num_ranks: int = 1) -> dict[int, list[str]]:
    """step -> the samples that all ranks together trained on, in order; a step may be logged once."""
    found: dict[int, list[str]] = {}
    for rank in range(num_ranks):
        lines = [json.loads(line) for line in (run / f"samples-rank{rank}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(STEPS))
        for line in lines:
            found.setdefault(line["step"], []).extend(line["ids"])
    return found


def expected_ids(data: Path, config: RunConfig) -> dict[int, list[str]]:
    stream, size = SampleStream(data, "train"), config.training.global_batch_size
    numbers = [global_batch(stream.index, config.training.seed, s, size) for s in range(STEPS)]
    return {s: list(stream.batch(n, np.zeros_like(n)).ids) for s, n in enumerate(numbers)}


def last_progress(run: Path):
    return read_progress(run / "checkpoints" / f"step-{STEPS:08d}")


def local(*settings: str) -> RunConfig:
    return load_config("local", [*SMALL, *SETTINGS, "memory.strategy=plain", *settings])


@pytest.mark.parametrize("where", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
def test_one_process_goes_on_as_the_run_with_the_smaller_micro_batch(data, tmp_path, monkeypatch, where):
    start(local("training.micro_batch_size=4"), data, tmp_path / "small")
    install(where, 0, 3, 5, monkeypatch.setattr)
    result = start(local("training.micro_batch_size=16"), data, tmp_path / "shrunk")

    assert losses(tmp_path / "shrunk") == pytest.approx(losses(tmp_path / "small"), rel=1e-5)
    assert sample_ids(tmp_path / "shrunk") == expected_ids(data, local())
    saved = last_progress(tmp_path / "shrunk")
    assert saved == result.state
    assert saved.micro_batch_size == 4
    told = [
        (e["step"], e["micro_batch_size_before"], e["micro_batch_size"], e["gradient_accumulation_steps"])
        for e in saved.out_of_memory
    ]
    assert told == [(3, 16, 8, 2), (3, 8, 4, 4)]
    assert "injected" in saved.out_of_memory[0]["reason"]
    assert not (tmp_path / "shrunk" / "rebuild.tmp").exists()


@pytest.mark.parametrize("where", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
def test_two_ranks_shrink_together_where_one_runs_out(data: Path, tmp_path: Path, where: str):
    settings = [x for s in (*SMALL, *SETTINGS, "training.evaluate_every=100") for x in ("--set", s)]
    train(data, tmp_path / "small", STEPS, *settings, "--set", "training.micro_batch_size=4", ranks=2)
    # backward holds ZeRO's collectives: there the first step's rehearsal is what runs out
    step = 3 if where == "forward" else 0
    through = ["tests.train.oom_run", where, "1", str(step), "5"]
    settings += ["--set", "training.micro_batch_size=8"]
    done = train(data, tmp_path / "shrunk", STEPS, *settings, ranks=2, through=through)

    assert losses(tmp_path / "shrunk") == pytest.approx(losses(tmp_path / "small"), rel=1e-5)
    assert sample_ids(tmp_path / "shrunk", 2) == expected_ids(data, local())
    saved = last_progress(tmp_path / "shrunk")
    assert saved.micro_batch_size == 4
    assert [(e["step"], e["micro_batch_size"], e["gradient_accumulation_steps"]) for e in saved.out_of_memory] == [
        (step, 4, 2)
    ]
    assert f"out of memory at step {step}" in done.stderr
    settings = json.loads((tmp_path / "shrunk" / "ds_config.json").read_text())
    assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]) == (4, 2)


def test_a_single_sample_that_does_not_fit_ends_the_run_with_what_to_change(data, tmp_path, monkeypatch):
    install("forward", 0, 0, 0, monkeypatch.setattr)
    with pytest.raises(RedHeartError, match="activation_checkpointing=true"):
        start(local("training.micro_batch_size=2"), data, tmp_path / "run")


def test_the_optimizer_step_is_not_tried_twice(data, tmp_path, monkeypatch):
    def run_out(self):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(PlainEngine, "step", run_out)
    with pytest.raises(RedHeartError, match=r"optimizer's step .*memory\.strategy"):
        start(local(), data, tmp_path / "run")


def test_a_resumed_run_keeps_the_smaller_micro_batch_until_it_is_told_another(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        install("forward", 0, 1, 8, patch.setattr)
        start(local("training.micro_batch_size=16", "training.checkpoint_every=2"), data, tmp_path / "run")
    step_2 = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    again = start(local("training.micro_batch_size=16"), data, tmp_path / "run", resume=step_2)
    assert again.state.micro_batch_size == 8
    assert len(again.state.out_of_memory) == 1
    other = start(local("training.micro_batch_size=10"), data, tmp_path / "run", resume=step_2)
    assert other.state.micro_batch_size == 8  # the largest divisor of 16 up to 10
    told = start(local("training.micro_batch_size=2"), data, tmp_path / "run", resume=step_2)
    assert told.state.micro_batch_size == 2


def test_the_evaluation_runs_out_together_too(data, tmp_path, monkeypatch):
    from redheart.evaluation import evaluate as room

    forward = room.forward

    def limited(model, batch, without=()):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("injected")
        return forward(model, batch, without)

    monkeypatch.setattr(room, "forward", limited)
    result = start(local("training.micro_batch_size=8", "training.max_steps=1"), data, tmp_path / "run")
    assert result.state.micro_batch_size == 2
    assert [e["step"] for e in result.state.out_of_memory] == [0, 0]
    assert result.state.initial_dev_loss is not None


def test_an_error_that_is_not_about_memory_passes_untouched():
    with pytest.raises(RuntimeError, match="shapes"), together():
        raise RuntimeError("shapes differ")
    with pytest.raises(OutOfMemory, match="allocate"), together():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")


def test_a_rehearsal_takes_the_memory_of_a_backward_pass_and_leaves_no_trace(monkeypatch):
    """No gradient stays, no hook of an engine fires, every parameter's gradient is computed, and a shape is rehearsed once."""
    config = load_config("local", [*SMALL, "memory.strategy=zero2_offload"])
    model = build_model(config, None)

    class TwoRanks:
        world_size, device, dtype, forward_has_collectives = 2, torch.device("cpu"), torch.float32, False

    engine = TwoRanks()
    engine.model = model
    fired, seen = [], set()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
        parameter.register_hook(lambda _, name=name: seen.add(name))
    batches: list[Batch] = [make_batch(range(4)), make_batch(range(4, 6))]
    rehearsals = Rehearsals(config)
    assert rehearsals.wanted(engine, batches)
    window = open_window(batches, False, rehearsals.wanted(engine, batches))
    rehearsals.run(engine, window, task_weights(config.loss), config.loss)
    assert fired == []
    assert seen == {name for name, _ in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert not rehearsals.wanted(engine, batches)
    assert rehearsals.wanted(engine, [make_batch(range(5))])


def test_a_run_that_outgrows_its_promise_of_host_memory_ends_with_a_checkpoint(data, tmp_path, monkeypatch):
    """And goes on from it, with a larger promise, as if nothing had been."""
    held, step = {"gib": 1.0}, Trainer._step
    monkeypatch.setattr("redheart.memory.budget.resident", lambda: int(held["gib"] * 2**30))
    monkeypatch.setattr(
        "redheart.memory.refuse.resident", lambda: 2**29
    )  # this process may hold gigabytes of other tests

    def growing(self, stop):
        held["gib"] += 1
        return step(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", growing)
        with pytest.raises(RedHeartError, match=r"holds 3\.00 GiB of host memory.*--resume"):
            start(local("memory.host_memory_gib=2.5"), data, tmp_path / "run")
    held["gib"] = 1.0
    result = start(local("memory.host_memory_gib=16"), data, tmp_path / "run", resume="last")
    assert result.state.step == STEPS
    assert sample_ids(tmp_path / "run") == expected_ids(data, local())  # every step once: it went on at step 2
