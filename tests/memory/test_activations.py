"""Measured activations: torch's MemTracker is the oracle on a small network, real memory on the CPU a second; lines are lines."""

from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from redheart.config import load_config
from redheart.memory import activations as room
from redheart.memory.activations import Watch, activations, measure, measured

TINY = [
    "model.width=24",
    "model.heads=1",
    "model.layers=2",
    "model.task_width=16",
    "model.task_heads=1",
    "model.encoder_width=32",
    # fewer modules, fewer operations to fake: a test is a test of the ruler, not of the network
    "model.ablate=[analyzers.emotion, analyzers.bentham, analyzers.regret, analyzers.surd, heads.bentham, heads.surd, aux.dsp, aux.kalman]",
]


def tiny():
    return load_config("local", TINY)


def watched(step, known):
    watch = Watch()
    watch.know(known)
    with watch:
        step()
    return watch


def test_the_watch_agrees_with_torchs_tracker_and_flop_counter():
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))
        x = torch.empty(32, 64)

        def step():
            model(x).square().mean().backward()

        mine = watched(step, [x, *model.parameters()])
        for p in model.parameters():
            p.grad = None
        tracker = MemTracker()
        tracker.track_external(model, x)
        with tracker:
            step()
        for p in model.parameters():
            p.grad = None
        with FlopCounterMode(display=False) as flops:
            step()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    before = sum(p.numel() * 4 for p in model.parameters()) + x.numel() * 4
    assert mine.peak == theirs["Total"] - before
    assert mine.flops == flops.get_total_flops()


def test_dropped_gradients_do_not_count_and_kept_ones_do():
    with FakeTensorMode():
        model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
        x = torch.empty(1, 128)
        watch = Watch()
        watch.know([x, *model.parameters()])
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(watch.drop_gradient)
        with watch:
            model(x).sum().backward()
    one = 128 * 128 * 4
    assert one <= watch.peak < 2 * one
    assert 4 * one <= watch.peak_with_gradients < 5 * one
    assert watch.now < one


def test_micro_batches_lie_on_a_line():
    config = tiny()
    line = room.Activations(*(measure(config, n, 16, False, torch.float32) for n in (4, 12)), (4, 12))
    between, beyond = (measure(config, n, 16, False, torch.float32) for n in (8, 24))
    for n, seen in ((8, between), (24, beyond)):
        told = line.at(n)
        assert told.peak == pytest.approx(seen.peak, rel=0.02)
        assert told.flops == seen.flops
        assert told.inputs == seen.inputs
        assert told.kernels == seen.kernels


def test_recomputing_takes_less_memory_and_more_flops():
    config = load_config("local", [*TINY, "model.layers=8"])
    kept, recomputed = (measure(config, 8, 32, checkpointing, torch.float32) for checkpointing in (False, True))
    assert recomputed.peak < kept.peak
    assert recomputed.flops > kept.flops


def test_half_precision_takes_about_half():
    config = tiny()
    full, half = (measure(config, 8, 32, False, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 0.45 < half.peak / full.peak < 0.75  # losses stay in fp32
    assert half.inputs < full.inputs


def test_measurements_are_kept_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = tiny()
    first = activations(config, 8, False, torch.float32, sizes=(1, 2))
    assert len(list(tmp_path.rglob("*.json"))) == 1
    monkeypatch.setattr(room, "measure", lambda *_: pytest.fail("measured again"))
    again = activations(config, 8, False, torch.float32, sizes=(1, 2))
    assert asdict(first) == asdict(again)


def test_one_size_is_read_from_the_line_where_it_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = tiny()
    line = activations(config, 8, False, torch.float32)
    monkeypatch.setattr(room, "measure", lambda *_: pytest.fail("measured again"))
    assert measured(config, 7, 8, False, False) == line.at(7)
