"""The scaling model by its properties, and one point written out by hand."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from redheart.bench.scaling import predicted_step
from redheart.cli import app
from redheart.config import load_config
from redheart.memory import scaling
from redheart.memory.activations import MicroStep
from redheart.memory.launches import UPDATE, WAITS
from redheart.memory.plan import GIB, Candidate, Card, Plan, parameters_of
from redheart.memory.scaling import LATENCY_S, Efficiency, efficiency
from redheart.memory.states import REDUCE_BUCKET

CONFIG = load_config("330m", ["training.global_batch_size=512"])
PARAMETERS = parameters_of(CONFIG)
FLOPS = 45e9  # of a sample


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    monkeypatch.setattr(scaling, "parameters_of", lambda config: PARAMETERS)


def plan_of(strategy="zero2_offload_8bit", micro=16, nodes=1, gpus=1, card=None) -> Plan:
    """A plan with one candidate whose micro-step is a line written down."""
    card = card or Card()
    accumulation = 512 // nodes // gpus // micro
    times = {"compute": accumulation * micro * FLOPS / card.flops, "launches": accumulation * 10_000 * card.operation_s}
    step = MicroStep(0, 0, 0, 0, int(micro * FLOPS), 10_000)
    one = Candidate(strategy, micro, accumulation, False, step, {}, {}, GIB, GIB, times, 1.0, True)
    return Plan("330m", 64, 8 * GIB, 32 * GIB, nodes, gpus, int(FLOPS), card, [one])


def told(**more) -> Efficiency:
    options = {k: more.pop(k) for k in ("network_gbit", "step_seconds", "nodes") if k in more}
    found = efficiency(CONFIG, plan_of(**more), **options)
    assert found is not None
    return found


def test_one_node_is_efficient_and_has_no_network():
    for strategy in ("zero2", "zero2_offload_8bit", "zero3_offload_8bit"):
        for gpus in (1, 4):
            found = told(strategy=strategy, gpus=gpus)
            for curve in (found.weak, found.strong):
                assert (curve[0].nodes, curve[0].network_s, curve[0].efficiency) == (1, 0.0, 1.0)


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "zero3_offload_8bit"])
def test_efficiency_falls_with_the_nodes_where_the_network_binds(strategy):
    for curve in (told(strategy=strategy, network_gbit=1.0).weak, told(strategy=strategy, network_gbit=1.0).strong):
        values = [p.efficiency for p in curve]
        assert values == sorted(values, reverse=True)
        assert values[-1] < values[0]


def test_efficiency_rises_with_the_bandwidth_and_the_network_part_falls():
    curves = [told(network_gbit=g) for g in (1.0, 10.0, 100.0, 1000.0)]
    for slow, fast in pairwise(curves):
        for which in ("weak", "strong"):
            for a, b in zip(getattr(slow, which)[1:], getattr(fast, which)[1:], strict=True):
                assert b.efficiency > a.efficiency
                assert b.network_s < a.network_s


def test_an_endless_network_leaves_what_is_shared():
    """Computing stays and only the optimizer's part shrinks: weak efficiency from 1 to (compute + update) ÷ compute."""
    found = told(network_gbit=1e9, nodes=(2, 8))
    tensors = PARAMETERS.count
    launches = (32 * (10_000 + 4 * tensors) + 3 * tensors + UPDATE) * 40e-6
    compute = max(512 * FLOPS / 20e12, launches) + WAITS * 15e-6
    assert all(1 <= p.efficiency < found.weak[0].step_s / compute for p in found.weak)


def test_a_point_by_hand():
    """ZeRO-2 in bf16: gradients at each of 32 micro-steps, then the weights, 2 bytes each; half of them leave a rank of two."""
    found = told(strategy="zero2", network_gbit=8.0, nodes=(2,))
    n = PARAMETERS.total
    bytes_sent = (2 + 31) * (2 * n // 2)
    assert found.weak[1].network_s == pytest.approx(bytes_sent / 1e9 + 32 * -(-n // REDUCE_BUCKET) * LATENCY_S)
    launches = (32 * (10_000 + 4 * PARAMETERS.count) + UPDATE) * 40e-6
    compute = max(512 * FLOPS / 20e12, launches) + WAITS * 15e-6
    assert found.weak[0].step_s == pytest.approx(compute + 32 * n / 250e9, rel=1e-3)
    assert found.weak[1].step_s == pytest.approx(compute + 16 * n / 250e9 + found.weak[1].network_s, rel=1e-3)


def test_a_measured_step_replaces_the_estimate():
    found = told(step_seconds=3.0)
    assert found.one_node_step == "measured"
    assert found.weak[0].step_s == pytest.approx(3.0)
    assert found.strong[0].step_s == pytest.approx(3.0)
    estimate = told()
    assert found.weak[1].network_s == estimate.weak[1].network_s
    for curve, other in (
        (found.weak, estimate.weak),
        (found.strong, estimate.strong),
    ):  # what is inside a node is scaled alike
        for measured, estimated in zip(curve, other, strict=True):
            factor = (measured.step_s - measured.network_s) / (estimated.step_s - estimated.network_s)
            assert factor == pytest.approx(3.0 / estimate.weak[0].step_s)


def test_the_default_network_is_the_plans_and_the_plans_nodes_are_a_point():
    found = told(nodes=(2, 8, 64))
    assert found.network_gbit == pytest.approx(24.0)
    assert told(gpus=4).network_gbit == pytest.approx(96.0)
    assert [p.nodes for p in told(gpus=1, micro=4, **{"nodes": (2, 8)}).weak] == [1, 2, 8]
    four = efficiency(CONFIG, plan_of(nodes=4))
    assert four is not None
    assert [p.nodes for p in four.weak] == [1, 2, 4, 8, 64]
    assert four.samples_per_node == 128


def test_nodes_that_cannot_share_the_batch_are_left_out_of_strong_scaling():
    found = told(nodes=(3, 512, 1024))
    assert [p.nodes for p in found.weak] == [1, 3, 512, 1024]
    assert [p.nodes for p in found.strong] == [1, 512]


def test_plain_is_passed_over():
    base = plan_of()
    plain = replace(base.candidates[0], strategy="plain", times_s={"compute": 0.1, "launches": 0.1})
    both = efficiency(CONFIG, replace(base, candidates=[plain, *base.candidates]))
    assert both is not None
    assert both.strategy == "zero2_offload_8bit"
    assert efficiency(CONFIG, replace(base, candidates=[plain])) is None


def test_the_bench_predicts_with_the_same_bytes():
    """Two ranks at 1 GB/s: half of 4 GB twice."""
    assert predicted_step(1.0, 4e9, 2, 1e9) == pytest.approx(5.0)
    assert predicted_step(1.0, 4e9, 1, 1e9) == 1.0
    assert predicted_step(1.0, 4e9, 2, 2e9) < predicted_step(1.0, 4e9, 2, 1e9)


def test_the_plan_command_tells_the_efficiency(monkeypatch):
    monkeypatch.setattr("redheart.memory.plan.plan", lambda *given: plan_of(nodes=given[3], gpus=given[4]))
    words = [
        "plan",
        "--preset",
        "330m",
        "--set",
        "training.global_batch_size=512",
        "--gpu-memory",
        "8",
        "--host-memory",
        "32",
    ]
    done = CliRunner().invoke(app, [*words, "--nodes", "2", "--network-gbit", "10", "--step-seconds", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["efficiency"]
    assert [p["nodes"] for p in found["weak"]] == [1, 2, 8, 64]
    assert found["weak"][0] == {"nodes": 1, "step_s": pytest.approx(2.0), "network_s": 0.0, "efficiency": 1.0}
    assert (found["network_gbit"], found["one_node_step"], found["samples_per_node"]) == (10.0, "measured", 256)
    assert CliRunner().invoke(app, words).exit_code == 0
