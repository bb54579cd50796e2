"""The losses of the SURD head and analyzer against their formulas, written out entry by entry."""

import math

import pytest
import torch

from redheart.losses.surd import density_cross_entropy, expected_level, levels, squared_shares, surd_probabilities


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_three_shares_sum_to_one_and_the_leak_is_apart():
    p = surd_probabilities(torch.tensor([[math.log(2), math.log(3), math.log(5), math.log(4)], [0, 0, 0, 0]]))
    assert p.flatten().tolist() == pytest.approx([0.2, 0.3, 0.5, 0.8, 1 / 3, 1 / 3, 1 / 3, 0.5])


def test_shares_are_judged_entry_by_entry_and_every_logit_of_a_labelled_row_counts():
    logits, target = draw(5, 4), draw(5, 4, seed=1).sigmoid()
    weight = torch.tensor([[1.0, 0, 0, 0], [0.3, 0.3, 0.3, 1], [0, 0, 0, 0], [0, 0, 0, 0.5], [0, 1, 1, 0]]).double()
    logits[2], target[weight == 0] = math.nan, math.nan
    logits.requires_grad_()
    total, count = squared_shares(logits, target, weight)
    expected = 0.0
    for i in range(5):
        e = [math.exp(x) for x in logits[i, :3].tolist()]
        shares = [x / sum(e) for x in e] + [1 / (1 + math.exp(-logits[i, 3].item()))]
        for k in range(4):
            if weight[i, k] > 0:
                expected += weight[i, k].item() * (shares[k] - target[i, k].item()) ** 2
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert count.item() == pytest.approx(weight.sum().item())
    (gradient,) = torch.autograd.grad(total, logits)
    assert (gradient[2] == 0).all()
    assert (gradient[0, :3] != 0).all()  # of the softmax of a row with one label


@pytest.mark.parametrize("num_levels", [2, 3, 5])
def test_a_soft_level_lies_between_its_neighbours_and_keeps_its_value(num_levels):
    target = torch.linspace(0, 1, 41, dtype=torch.float64)[:, None]
    soft = levels(target, num_levels)
    assert soft.shape == (41, num_levels)
    assert torch.allclose(soft.sum(1), torch.ones(41).double())
    assert ((soft > 0).sum(1) <= 2).all()
    centres = torch.arange(num_levels).double() / (num_levels - 1)
    assert torch.allclose(soft @ centres, target[:, 0])
    assert torch.equal(levels(centres[:, None], num_levels), torch.eye(num_levels).double())


def test_the_expected_level_is_the_mean_under_the_density_given_all_sources():
    logits = draw(6, 4, 3)
    p = logits[:, 3].exp() / logits[:, 3].exp().sum(1, keepdim=True)
    found = expected_level(logits)
    assert found.shape == (6, 1)
    assert torch.allclose(found[:, 0], 0.5 * p[:, 1] + p[:, 2])


def test_densities_cost_the_cross_entropy_with_the_soft_level_a_mean_over_subsets():
    logits, target = draw(4, 8, 3), torch.tensor([[0.2], [1.0], [math.nan], [0.5]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.3], [0.0], [0.6]], dtype=torch.float64)
    logits[2] = math.nan
    logits.requires_grad_()
    total, count = density_cross_entropy(logits, target, weight)
    soft = {0: (0.6, 0.4, 0), 1: (0, 0, 1), 3: (0, 1, 0)}
    expected = 0.0
    for i, shares in soft.items():
        for subset in logits[i].tolist():
            norm = math.log(sum(map(math.exp, subset)))
            expected -= weight[i].item() / 8 * sum(q * (x - norm) for q, x in zip(shares, subset, strict=True))
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert count.item() == pytest.approx(1.9)
    (gradient,) = torch.autograd.grad(total, logits)
    assert (gradient[2] == 0).all()
    assert gradient[[0, 1, 3]].abs().min() > 0
