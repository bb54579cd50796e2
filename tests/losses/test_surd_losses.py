"""The losses of the SURD head and analyzer against their formulas, written out entry by entry."""

import math

import pytest
import torch

from redheart.losses.surd import density_cross_entropy, squared_shares, surd_probabilities


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


def test_densities_cost_the_cross_entropy_with_the_labels_level_a_mean_over_subsets():
    logits, target = draw(4, 8, 3), torch.tensor([[0.2], [1.0], [math.nan], [0.5]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.3], [0.0], [0.6]], dtype=torch.float64)
    logits[2] = math.nan
    logits.requires_grad_()
    total, count = density_cross_entropy(logits, target, weight, [0.3, 0.6])
    expected = 0.0
    for i, level in {0: 0, 1: 2, 3: 1}.items():
        for subset in logits[i].tolist():
            expected -= weight[i].item() / 8 * (subset[level] - math.log(sum(map(math.exp, subset))))
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert count.item() == pytest.approx(1.9)
    (gradient,) = torch.autograd.grad(total, logits)
    assert (gradient[2] == 0).all()
    assert gradient[[0, 1, 3]].abs().min() > 0
