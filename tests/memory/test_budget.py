"""The promise of so many GiB: kept on a GPU by the allocator's cap, on the host by looking; planned within from the start."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from redheart.cli import app
from redheart.config import load_config
from redheart.memory import budget, refuse
from redheart.memory.activations import Activations, MicroStep
from redheart.memory.budget import CONTEXT, Bound, budget_of, limit_gpu, over_host_memory, shards_in_memory
from redheart.memory.plan import Card, Request, predict
from redheart.memory.states import Parameters
from redheart.schema import RedHeartError
from redheart.train.engine import make_engine
from tests.train.tiny import SETTINGS

GIB = 2**30
CONFIG = load_config("330m")


def promising(gpu: float = 8, host: float = 16):
    return load_config("330m", [f"memory.gpu_memory_gib={gpu}", f"memory.host_memory_gib={host}"])


@pytest.fixture
def card(monkeypatch):
    """`card(total, free, reserved)` in GiB: a GPU whose free memory is what CUDA says once the context is there; fractions set."""
    fractions = []

    def there(total: float, free: float = 0, reserved: float = 0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), int(total * GIB)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(reserved * GIB))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(total * GIB))
        )
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, d: fractions.append((f, d.index)))
        return fractions

    return there


def test_the_context_is_counted_once(card):
    """An idle card of 8 GiB has 7.4 left beside the context of who asks: all of the promise is still there for a plan with a context."""
    card(total=8, free=8 - CONTEXT / GIB)
    assert budget_of(promising(gpu=24)).gpu == Bound(pytest.approx(8.0), "free on this GPU")
    card(total=8, free=3, reserved=2)  # another process has some; what torch has reserved here is ours
    assert budget.free_gpu_gib() == pytest.approx(5 + CONTEXT / GIB)
    card(total=8, free=7.9)  # a context smaller than the constant does not make a card larger
    assert budget.free_gpu_gib() == pytest.approx(8)


@pytest.mark.parametrize(
    ("options", "free", "gpu", "host"),
    [
        ({}, 80, "memory.gpu_memory_gib", "memory.host_memory_gib"),
        ({}, 3, "free on this GPU", "memory.host_memory_gib"),
        ({"gpu_memory": "40GiB"}, 3, "--gpu-memory", "memory.host_memory_gib"),
        ({"host_memory": "64"}, 80, "memory.gpu_memory_gib", "--host-memory"),
    ],
)
def test_the_smaller_bound_wins_and_is_named(card, monkeypatch, options, free, gpu, host):
    card(total=80, free=free - CONTEXT / GIB)
    monkeypatch.setattr(budget, "free_host_gib", lambda: 100.0)
    found = budget_of(promising(), **options)
    assert found.gpu.by == gpu
    assert found.gpu.gib == pytest.approx({"memory.gpu_memory_gib": 8, "free on this GPU": 3, "--gpu-memory": 40}[gpu])
    assert (found.host.by, found.host.gib) == (host, 16 if host.startswith("memory") else 64)
    assert gpu in str(found)
    assert host in str(found)


def test_what_is_free_on_the_host_counts_where_the_run_is(monkeypatch):
    monkeypatch.setattr(budget, "free_host_gib", lambda: 5.0)
    assert budget_of(CONFIG, on_cpu=True).host == Bound(5.0, "free on this machine")
    assert budget_of(CONFIG, on_cpu=True).gpu is None
    # a plan for another machine, from one without a GPU: nobody knows what is free there
    assert budget_of(CONFIG).host == Bound(16.0, "memory.host_memory_gib")


def test_plan_says_which_bound_won(monkeypatch):
    monkeypatch.setattr(budget, "free_host_gib", lambda: 100.0)  # whatever else runs here
    step = MicroStep(10**8, 10**8, 10**8, 10**6, 10**9, 10)
    monkeypatch.setattr("redheart.memory.plan.activations", lambda *_: Activations(step, step, (4, 12)))
    asked = ["plan", "--preset", "local", "--tokens", "8", "--cpu"]
    done = CliRunner().invoke(app, [*asked, "--set", "memory.host_memory_gib=1.5", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["budget"] == {"host_gib": 1.5, "host_bound": "memory.host_memory_gib"}
    assert all(c["fits"] == (c["host_peak_gib"] <= 1.5) for c in told["candidates"])
    assert "memory.host_memory_gib" in CliRunner().invoke(app, asked).stderr


@pytest.mark.parametrize(("promise", "total", "left"), [(8, 80, 8), (8, 8, 8), (24, 8, None), (1, 80, 1)])
def test_the_allocator_gets_the_promise_less_the_context(card, promise, total, left):
    fractions = card(total=total)
    limit_gpu(promising(gpu=promise))
    fraction, index = fractions.pop()
    assert index == 0
    assert fraction * total * GIB == pytest.approx(total * GIB if left is None else left * GIB - CONTEXT)


def test_a_promise_smaller_than_a_context_is_refused(card):
    card(total=8)
    with pytest.raises(RedHeartError, match=r"memory\.gpu_memory_gib = 0\.4 .*context"):
        limit_gpu(promising(gpu=0.4))


def test_every_engine_is_made_under_the_promise(card, monkeypatch):
    """Before the network is built: nothing is allocated without the cap."""
    fractions = card(total=80)

    class Built(Exception):
        pass

    def build(place):
        assert len(fractions) == 1
        raise Built

    with pytest.raises(Built):
        make_engine(build, load_config("local", [*SETTINGS, "memory.strategy=plain"]), 1, 8)


def test_an_engine_that_does_not_fit_is_one_line():
    def build(place):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    with pytest.raises(RedHeartError, match=r"out of memory while plain sets up \(CUDA error: out of memory\)"):
        make_engine(build, load_config("local", [*SETTINGS, "memory.strategy=plain"]), 1, 8)


def test_another_failure_of_an_engines_start_keeps_its_words():
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_engine(
            lambda place: torch.zeros(2, 3) @ torch.zeros(2),  # type: ignore[arg-type]
            load_config("local", [*SETTINGS, "memory.strategy=plain"]),
            1,
            8,
        )


def test_a_run_is_refused_for_its_promise_whatever_the_machine_has(monkeypatch):
    monkeypatch.setattr(budget, "free_host_gib", lambda: 1000.0)
    monkeypatch.setattr(refuse, "resident", lambda: 500 << 20)
    small = load_config("local", [*SETTINGS, "memory.host_memory_gib=0.3", "training.precision=fp32"])
    with pytest.raises(
        RedHeartError, match=r"needs .* on the host, there is host 0\.30 GiB \(memory\.host_memory_gib\)"
    ):
        refuse.check_memory(small, 2, 4, 8)
    refuse.check_memory(load_config("local", [*SETTINGS, "training.precision=fp32"]), 2, 4, 8)


def test_the_host_is_looked_at_on_logging_steps(monkeypatch):
    config = load_config("local", ["memory.host_memory_gib=2", "training.log_every=5"])
    monkeypatch.setattr(budget, "resident", lambda: int(2.5 * GIB))
    assert [over_host_memory(config, step) is None for step in (1, 4, 5)] == [True, True, False]
    assert "memory.host_memory_gib=3)" in over_host_memory(config, 5)  # a promise that it would keep
    # two ranks of a node together, and two nodes apart
    monkeypatch.setattr(budget, "sum_over_ranks", lambda values: [2 * v for v in values])
    monkeypatch.setattr(budget, "world_size", lambda: 2)
    monkeypatch.setattr(budget, "resident", lambda: int(1.5 * GIB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "holds 3.00 GiB" in over_host_memory(config, 5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert over_host_memory(config, 5) is None


def test_pages_of_shards_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system takes them back when it needs them. Two files of 24 MiB are mapped and read, one of them a shard."""
    before = shards_in_memory()
    maps = []
    for name in ("train-00000.arrow", "other.bin"):
        (tmp_path / name).write_bytes(bytes(24 * 2**20))
        maps.append(np.memmap(tmp_path / name, mode="r"))
        assert maps[-1].sum() == 0
    assert shards_in_memory() - before == 24 * 2**20
    config = load_config("local", ["memory.host_memory_gib=2", "training.log_every=5"])
    monkeypatch.setattr(budget, "resident", lambda: int(2.02 * GIB))
    monkeypatch.setattr(budget, "shards_in_memory", lambda: int(0.01 * GIB))
    assert "holds 2.01 GiB" in over_host_memory(config, 5)
    monkeypatch.setattr(budget, "shards_in_memory", lambda: int(0.03 * GIB))
    assert over_host_memory(config, 5) is None


def test_a_peak_leaves_out_the_files_that_a_save_maps(tmp_path: Path):
    """In a process of its own, whose peak can be reset; other memory that is taken meanwhile counts."""
    asked = """
import sys, torch
from redheart.memory.budget import resident, resident_peak, without
MIB = 2**20
before = resident_peak()
with without(256 * MIB):
    torch.from_file(sys.argv[1], shared=True, size=64 * MIB, dtype=torch.float32).fill_(1.0)
assert resident_peak() - before < 32 * MIB, (before, resident_peak())
start = resident()
with without(256 * MIB):
    torch.from_file(sys.argv[1], shared=True, size=64 * MIB, dtype=torch.float32).fill_(1.0), torch.ones(64 * MIB)
assert abs(resident_peak() - start - 256 * MIB) < 32 * MIB, (start, resident_peak())
"""
    file = tmp_path / "masters"
    file.write_bytes(b"")
    os.truncate(file, 256 * 2**20)
    subprocess.run([sys.executable, "-c", asked, str(file)], check=True, timeout=120)


def test_times_in_fp32_are_those_without_tf32():
    """TF32 is off, so an fp32 product is not assumed to be as fast as with it."""
    step, small = MicroStep(10**6, 10**6, 10**6, 10**3, 10**9, 10), Parameters(((1000,), (10,)))
    times = {
        precision: predict(
            Request(load_config("local", [f"training.precision={precision}"]), "zero2", 4, 4, False, step, small)
        ).times_s["compute"]
        for precision in ("bf16", "fp32")
    }
    assert times["fp32"] / times["bf16"] == pytest.approx(Card().flops / Card().fp32_flops)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nsys.argv = ['redheart', '--help']\nfrom redheart.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules\n"
        "import os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    bare = {k: v for k, v in os.environ.items() if not k.startswith("PYTORCH")}
    for variables, expected in (
        ({}, "expandable_segments:True,pinned_max_cached_size_mb:32"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None"),  # the user's, under its older name
    ):
        done = subprocess.run([sys.executable, "-c", code], env={**bare, **variables}, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == expected
