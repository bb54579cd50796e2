"""SURD above chance, and what tasks tell of one another."""

import json
import math

import numpy as np
import pytest
import torch

from redheart.causality.null import surd_above_null
from redheart.causality.surd import surd, surd_from_samples
from redheart.causality.synergy import gradient_cosines, informing
from redheart.schema import RedHeartError
from tests.corpora import corpus


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def terms(result) -> list[float]:
    return [*result.redundant.values(), *result.unique.values(), *result.synergistic.values()]


def test_the_published_energy_cascade():
    from scipy.io import loadmat

    root = corpus("surd")
    signals = torch.from_numpy(loadmat(root / "data" / "energy_cascade_signals.mat")["X"]).double()
    published = json.loads((root / "results" / "energy_cascade.json").read_text())["targets"]
    assert len(published) == 4
    for case in published.values():
        lag = case["lag"]
        result = surd_from_samples(signals[case["target"] - 1, lag:], signals[:, :-lag], case["nbins"])
        single = {(k,): v for k, v in result.unique.items()}
        key = lambda text: tuple(int(k) for k in text.split(","))  # noqa: E731
        assert {key(k): v for k, v in case["R_and_U"].items()} == pytest.approx(
            {**single, **result.redundant}, abs=1e-6
        )
        assert {key(k): v for k, v in case["S"].items()} == pytest.approx(result.synergistic, abs=1e-6)
        assert result.leak == pytest.approx(case["leak_fraction"], abs=1e-6)
        assert result.mutual_information == pytest.approx(case["MI"]["1,2,3,4"], abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_independent_data_tell_nothing_above_chance(seed: int):
    target, agents = noise(3000, seed=seed), noise(3, 3000, seed=100 + seed)
    assert surd_from_samples(target, agents, 5).mutual_information > 0.08  # the bias that has to go
    result = surd_above_null(target, agents, 5, seed=seed)
    assert max(terms(result)) <= 0.01
    assert result.mutual_information <= 0.01
    assert result.leak == pytest.approx(1, abs=0.01)


def test_what_is_told_stays():
    a, b, c = (noise(3, 3000, seed=1) > 0.5).float()
    copy = surd_above_null(a, torch.stack([a, b, c]), 2)
    assert copy.unique[1] == pytest.approx(1, abs=0.05)
    both = surd_above_null(a, torch.stack([a, a, c]), 2)
    assert both.redundant[(1, 2)] == pytest.approx(1, abs=0.05)
    xor = surd_above_null((a + b) % 2, torch.stack([a, b, c]), 2)
    assert xor.synergistic[(1, 2)] == pytest.approx(1, abs=0.05)
    for result in (copy, both, xor):
        assert sum(terms(result)) == pytest.approx(result.mutual_information, abs=1e-12)
        assert result.leak == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_name(bad: float):
    x, y = noise(2, 400, seed=4)
    broken = y.clone()
    broken[7] = bad
    with pytest.raises(RedHeartError, match=r"bentham: 1 of 400 values are not finite .*number 7"):
        informing("regret", x, {"emotion": x, "bentham": broken})
    with pytest.raises(RedHeartError, match="gradient of b"):
        gradient_cosines(["a", "b"], torch.stack([x, broken]) @ torch.stack([x, broken]).T)
    with pytest.raises(RedHeartError, match="agent 2: 1 of 400"):
        surd_from_samples(x, torch.stack([x, broken]), 3)
    with pytest.raises(RedHeartError, match="target: 1 of 400"):
        surd_from_samples(broken, torch.stack([x, y]), 3)


def test_agents_are_named():
    x, y, z = noise(3, 2000, seed=2)
    told = informing("regret", x + 0.05 * z, {"emotion": x, "bentham": y, "context": z}, seed=3)
    assert told.rows()[0][:2] == ("unique", "emotion")
    assert told.shares()["unique"] > 0.8
    assert sum(told.shares().values()) == pytest.approx(1)
    silent = informing("regret", noise(2000, seed=9), {"emotion": x, "bentham": y}, seed=3)
    assert silent.rows() == []
    assert silent.shares() == {"redundant": 0, "unique": 0, "synergistic": 0}
    with pytest.raises(ValueError, match="alike"):
        informing("regret", x, {"emotion": y[:5]})


@pytest.mark.parametrize(("names", "draws"), [("ab", 40), ("abc", 16)])
def test_intervals_hold_what_the_distribution_has(names: str, draws: int):
    """Of a known joint distribution's draws, with terms too small to be told from chance among them: nearly all of the time."""
    generator, numbers = torch.Generator().manual_seed(1), np.random.default_rng(1)
    told_by = numbers.dirichlet(np.full(3, 1.5), size=(3,) * len(names))  # p(target | agents)
    pmf = torch.from_numpy(
        np.moveaxis(told_by, -1, 0) * numbers.dirichlet(np.full(told_by.size // 3, 3.0)).reshape(told_by.shape[:-1])
    )
    true = surd(pmf)
    bits = np.array([*terms(true), true.mutual_information])
    held = []
    for _ in range(draws):
        drawn = torch.multinomial(pmf.flatten(), 800, True, generator=generator)
        target, *agents = torch.stack(torch.unravel_index(drawn, pmf.shape)).double()
        told = informing("regret", target, dict(zip(names, agents, strict=True)), repeats=10, resamples=80)
        found = [*told.terms(), ("", "", told.mutual_information)]
        assert told.intervals.keys() == {(kind, names) for kind, names, _ in found}
        ends = np.array([told.intervals[term[:2]] for term in found])
        assert (ends >= 0).all()
        assert all(low <= value <= high or value == 0 for (*_, value), (low, high) in zip(found, ends, strict=True))
        held.append((ends[:, 0] <= bits) & (bits <= ends[:, 1]))
    assert (bits > 1e-6).sum() >= 4
    of_each = np.mean(held, 0)[bits > 1e-6]
    assert 0.88 < of_each.mean() <= 1
    assert of_each.min() > 0.7


def test_nothing_told_of_a_target_leaves_all_of_it_open():
    """Also where no shuffle tells anything: constant agents, and exactly independent ones."""
    target = noise(1000, seed=3)
    assert surd_above_null(target, torch.zeros(2, 1000), 3).leak == 1
    told = informing("regret", target, {"emotion": torch.ones(1000), "bentham": torch.zeros(1000)})
    assert (told.leak, told.mutual_information) == (1, 0)
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).repeat(10, 1)
    assert surd_above_null(grid[:, 0], grid[:, 1][None], 3).leak == 1
    assert surd_above_null(torch.ones(50), noise(1, 50, seed=1), 3).leak == 0  # there is nothing to tell


@pytest.mark.parametrize("repeats", [0, 1])
def test_a_null_of_one_shuffle_has_no_spread(repeats: int):
    x = noise(100, seed=1)
    with pytest.raises(RedHeartError, match="two shuffles"):
        surd_above_null(x, x[None], 3, repeats=repeats)


def test_intervals_where_nothing_is_told():
    silent = informing("regret", noise(600, seed=9), {"emotion": noise(600, seed=8)}, resamples=60)
    assert silent.intervals["", ""][0] == 0


def test_cosines_of_known_gradients():
    gradients = torch.tensor([[1.0, 0], [1, 1], [-2, 0], [0, 0]])
    got = gradient_cosines(["a", "b", "c", "d"], gradients @ gradients.T)
    assert got == pytest.approx({("a", "b"): math.sqrt(0.5), ("a", "c"): -1.0, ("b", "c"): -math.sqrt(0.5)})
