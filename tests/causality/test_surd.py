"""SURD against the published code's values, analytic cases and its own identities."""

import itertools
import json
import math

import pytest
import torch

from redheart.causality.surd import joint_pmf, ladder, pointwise_shares, surd, surd_from_samples
from redheart.schema import RedHeartError
from tests.corpora import corpus


def pmf_of(cases: dict[tuple[int, ...], float]) -> torch.Tensor:
    """{(target, agent 1, …): p} -> [n_target, n_1, …]."""
    sizes = [max(key[i] for key in cases) + 1 for i in range(len(next(iter(cases))))]
    pmf = torch.zeros(sizes, dtype=torch.float64)
    for key, p in cases.items():
        pmf[key] += p
    return pmf


def uniform(function, num_agents: int) -> torch.Tensor:
    states = list(itertools.product((0, 1), repeat=num_agents))
    return pmf_of({(function(*s), *s): 1 / len(states) for s in states})


def random_pmf(sizes, seed=0):
    p = torch.rand(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return p / p.sum()


def test_xor_is_synergy_alone():
    result = surd(uniform(lambda a, b: a ^ b, 2))
    assert result.synergistic[(1, 2)] == pytest.approx(1, abs=1e-12)
    assert result.redundant[(1, 2)] + result.unique[1] + result.unique[2] == pytest.approx(0, abs=1e-12)


def test_what_one_agent_tells_is_no_synergy_whatever_rounding_makes_of_larger_subsets():
    """They tell as much as the agent, give or take the last digit."""
    pmf = torch.full((3, 3, 3, 3), 0.05 / 27, dtype=torch.float64)
    for state in range(3):
        pmf[state, state] = 0.9 / 27
    result = surd(pmf)
    assert result.unique[1] == pytest.approx(result.mutual_information, abs=1e-9)
    assert sum(result.synergistic.values()) == pytest.approx(0, abs=1e-9)
    for seed in range(40):
        agents = torch.rand(3, 500, generator=torch.Generator().manual_seed(seed))
        told = surd_from_samples(agents[0], agents, 3)
        assert sum(told.synergistic.values()) == pytest.approx(0, abs=1e-9)
        assert told.unique[1] + sum(told.redundant.values()) == pytest.approx(told.mutual_information, abs=1e-9)


def test_three_way_xor_is_synergy_of_all_three():
    result = surd(uniform(lambda a, b, c: a ^ b ^ c, 3))
    assert result.synergistic[(1, 2, 3)] == pytest.approx(1, abs=1e-12)
    assert result.mutual_information == pytest.approx(1, abs=1e-12)


def test_copy_is_unique_and_duplicate_is_redundant():
    assert surd(uniform(lambda a, b: a, 2)).unique == pytest.approx({1: 1.0, 2: 0.0}, abs=1e-12)
    duplicate = pmf_of({(0, 0, 0): 0.5, (1, 1, 1): 0.5})
    assert surd(duplicate).redundant[(1, 2)] == pytest.approx(1, abs=1e-12)


def test_and_gate():
    result = surd(uniform(lambda a, b: a & b, 2))  # I(T; A) = H(1/4); each input alone tells 0.3113 bits
    assert result.redundant[(1, 2)] == pytest.approx(0.311278, abs=1e-6)
    assert result.synergistic[(1, 2)] == pytest.approx(0.5, abs=1e-6)


def test_sum_of_two_bits():
    result = surd(uniform(lambda a, b: a + b, 2))
    assert result.redundant[(1, 2)] == pytest.approx(0.5, abs=1e-12)
    assert result.synergistic[(1, 2)] == pytest.approx(1.0, abs=1e-12)


def test_noisy_copy_leaks_the_noise():
    flip = 0.1
    pmf = pmf_of({(t, a): 0.5 * (flip if t != a else 1 - flip) for t in (0, 1) for a in (0, 1)})
    noise = -(flip * math.log2(flip) + (1 - flip) * math.log2(1 - flip))
    result = surd(pmf)
    assert result.leak == pytest.approx(noise, abs=1e-12)
    assert result.unique[1] == pytest.approx(1 - noise, abs=1e-12)


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2, 4), (2, 3, 2, 3), (3, 2, 2, 2, 2)])
def test_parts_sum_to_the_mutual_information(sizes):
    result = surd(random_pmf(sizes))
    parts = [*result.redundant.values(), *result.unique.values(), *result.synergistic.values()]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(result.mutual_information, abs=1e-12)


def test_a_sum_of_nearly_one_is_made_one():
    pmf = random_pmf((3, 2, 3))
    exact, near = surd(pmf), surd(pmf * (1 + 9e-7))
    for name in ("redundant", "unique", "synergistic", "leak", "mutual_information"):
        assert getattr(near, name) == pytest.approx(getattr(exact, name), abs=1e-12)
    with pytest.raises(RedHeartError, match="sum to one"):
        surd(pmf * (1 + 1.5e-6))


def test_every_state_climbs_to_all_that_the_agents_tell():
    pmf = random_pmf((3, 2, 3, 2))
    for t in range(3):
        rungs = list(ladder(pmf, t))
        assert rungs[-1].subset == (0, 1, 2)
        assert all(r.bits >= -1e-15 for r in rungs)


def test_pointwise_shares_of_a_known_case():
    xor = uniform(lambda a, b: a ^ b, 2)
    shares, leak = pointwise_shares(xor, 1, (0, 1))
    assert shares == pytest.approx([0, 0, 1])
    assert leak == pytest.approx(0)
    assert pointwise_shares(xor, 0, (0, 1)) == (None, None)


def test_samples_equal_their_histogram():
    generator = torch.Generator().manual_seed(1)
    agents = torch.randint(0, 3, (2, 500), generator=generator)
    target = (agents[0] + agents[1]) % 3
    codes = torch.cat([target[None], agents])
    assert surd_from_samples(target.float(), agents.float(), 3) == surd(joint_pmf(codes, [3, 3, 3]))


@pytest.mark.parametrize("bad", [torch.full((2, 2), 0.3), torch.tensor([[1.5, -0.5]]), torch.full((2,) * 6, 1 / 64)])
def test_what_is_no_distribution_is_refused(bad):
    with pytest.raises(RedHeartError):
        surd(bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_distribution_with_a_hole_is_refused(bad: float):
    pmf = torch.tensor([[0.5, bad], [0.25, 0.25]], dtype=torch.float64)
    with pytest.raises(RedHeartError, match="pmf: 1 of 4 values are not finite"):
        surd(pmf)
    with pytest.raises(RedHeartError, match="not finite"):
        pointwise_shares(pmf, 0, (0,))


@pytest.mark.parametrize(
    ("target", "agents", "bins"), [((4,), (2, 5), 3), ((0,), (2, 0), 3), ((4,), (4,), 3), ((4,), (2, 4), 0)]
)
def test_samples_that_do_not_fit_are_refused(target, agents, bins):
    with pytest.raises(RedHeartError, match="surd_from_samples takes"):
        surd_from_samples(torch.zeros(target), torch.zeros(agents), bins)


def test_published_code_on_exact_distributions():
    reference = json.loads((corpus("pid_reference") / "surd_reference_values.json").read_text())["cases"]
    assert len(reference) == 13
    for name, case in reference.items():
        rows = [(tuple(state), p) for state, p in case["pmf(sources...,target)"]]
        result = surd(pmf_of({(s[-1], *s[:-1]): p for s, p in rows}))
        single = {(k,): v for k, v in result.unique.items()}
        for key, bits in case["R_and_U"].items():
            agents = tuple(int(k) for k in key.split(","))
            assert {**single, **result.redundant}[agents] == pytest.approx(bits, abs=1.01e-6), (name, key)
        for key, bits in case["S"].items():
            assert result.synergistic[tuple(int(k) for k in key.split(","))] == pytest.approx(bits, abs=1.01e-6), name
        assert result.leak == pytest.approx(case["leak_fraction"], abs=1.01e-6), name
        assert result.mutual_information == pytest.approx(max(case["MI"].values()), abs=1.01e-6), name
