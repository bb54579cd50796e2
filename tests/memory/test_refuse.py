"""Before a run: what cannot fit is refused with a choice that fits. A measured step: predicted beside observed."""

import re

import pytest

from redheart.config import load_config
from redheart.memory import activations, budget, refuse
from redheart.memory.activations import MicroStep
from redheart.memory.plan import GIB
from redheart.schema import RedHeartError
from redheart.train.measure import measure_step
from tests.train.tiny import SETTINGS

SMALL = [
    *SETTINGS,
    "model.encoder_width=32",
    "model.ablate=[analyzers.emotion, analyzers.regret, analyzers.surd, heads.surd, aux.dsp, aux.kalman]",
    "training.precision=fp32",
]


@pytest.fixture
def machine(monkeypatch):
    """`machine(free GiB)`: a host with so much free, on which the activations of any network take 50 MB a sample."""

    def step(n):
        return MicroStep(50_000_000 * n, 50_000_000 * n, 50_000_000 * n, 200_000 * n, 10**9 * n, 10_000)

    def line(*_, **__):
        return activations.Activations(step(4), step(12), (4, 12))

    def host(free_gib):
        monkeypatch.setattr(budget, "free_host_gib", lambda: free_gib)
        monkeypatch.setattr(refuse, "resident", lambda: 500 << 20)  # this process may hold gigabytes of other tests
        monkeypatch.setattr("redheart.memory.plan.activations", line)
        monkeypatch.setattr(refuse, "measured", lambda config, micro, *_: step(micro))

    return host


def test_what_fits_is_accepted(machine):
    machine(64.0)
    config = load_config("330m", ["training.precision=fp32", "memory.host_memory_gib=64"])
    found = refuse.check_memory(config, 16, 4, 64)
    assert found.strategy == "zero2_offload_8bit"
    assert found.host_peak <= 64 * GIB
    assert found.host["activations"] == 16 * 50_000_000


def test_what_cannot_fit_is_refused_and_the_choice_named_fits(machine):
    machine(9.0)
    wanted = ["training.precision=fp32", "memory.strategy=zero2_offload", "training.micro_batch_size=64"]
    with pytest.raises(
        RedHeartError, match=r"there is host 9\.00 GiB \(free on this machine\): choose --set memory\.strategy="
    ) as error:
        refuse.check_memory(load_config("330m", wanted), 64, 1, 64)
    named = re.findall(r"--set (\S+)", str(error.value))
    assert len(named) == 3
    config = load_config("330m", [*wanted, *named])
    micro = config.training.micro_batch_size
    assert refuse.check_memory(config, micro, 64 // micro, 64).host_peak <= 9 * GIB


def test_where_nothing_fits_the_smallest_budget_is_named(machine):
    machine(2.0)
    with pytest.raises(
        RedHeartError,
        match=r"needs [0-9.]+ GiB on the host, there is host 2\.00 GiB .*smallest budget that works is --host-m",
    ):
        refuse.check_memory(load_config("330m"), 16, 4, 64)


def test_a_small_network_is_not_measured(monkeypatch):
    monkeypatch.setattr(budget, "free_host_gib", lambda: 64.0)
    monkeypatch.setattr(refuse, "measured", lambda *_: pytest.fail("measured"))
    assert refuse.check_memory(load_config("local", SMALL), 2, 4, 8).host["activations"] == 0


def test_measured_steps_stand_beside_the_prediction():
    result = measure_step(load_config("local", [*SMALL, "memory.strategy=plain"]), tokens=8, num_steps=3)
    assert set(result["predicted"]) == set(result["observed"]) == set(result["ratio"]) == {"host_peak_gib"}
    assert result["ratio"]["host_peak_gib"] == pytest.approx(
        result["predicted"]["host_peak_gib"] / result["observed"]["host_peak_gib"]
    )
    assert len(result["losses"]) == len(result["step_seconds"]) == 3
    assert result["losses"] == sorted(result["losses"], reverse=True)  # the same batches again
    marks = result["resident_gib"]
    assert next(iter(marks)) == "engine"
    assert list(marks)[-1] == "step 2"
    assert result["base_gib"] <= result["start_gib"]["host_peak_gib"] <= result["observed"]["host_peak_gib"]
    assert max(marks.values()) <= result["observed"]["host_peak_gib"] + 1e-3
    # gradients appear in the first backward pass, moments in the first step; a few MiB here, so a page or two of slack
    assert marks["engine"] <= marks["backward 0.3"] + 1e-3
    assert marks["backward 0.0"] <= marks["step 0"] + 1e-3
