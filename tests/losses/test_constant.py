"""The best constant against what is known of it: a mean, a median, a label that only the grid meets, and the ends of the range."""

import pytest
import torch

from redheart.losses.constant import GRID, best_constant
from redheart.losses.elementwise import cross_entropy, squared, weighted


def labels(rows: int = 60, size: int = 3):
    """Targets in [0, 1], and weights of which some are 0 and the others differ."""
    generator = torch.Generator().manual_seed(3)
    target = torch.rand(rows, size, generator=generator, dtype=torch.float64)
    weight = torch.rand(rows, size, generator=generator, dtype=torch.float64)
    return target, weight * (weight > 0.3)


def absolute(prediction, target, weight):
    return weighted((prediction - target).abs(), weight)


@pytest.mark.parametrize(("loss", "raw"), [(squared, lambda p: p), (cross_entropy, torch.logit)])
def test_under_a_squared_error_or_a_cross_entropy_it_is_the_weighted_mean(loss, raw):
    target, weight = labels()
    mean = (target * weight).sum(0) / weight.sum(0)  # of 0 and 1 a logit is infinite
    assert torch.allclose(best_constant(loss, raw, target, weight, 1e-4, 1 - 1e-4), mean, rtol=0, atol=1e-7)


def test_under_an_absolute_error_it_is_the_weighted_median():
    target, weight = labels()
    found = best_constant(absolute, lambda p: p, target, weight, 0.0, 1.0)
    for k in range(3):
        order = target[:, k].argsort()
        reached = weight[order, k].cumsum(0) >= weight[:, k].sum() / 2
        assert found[k].item() == pytest.approx(target[order, k][reached][0].item(), abs=1e-9)


def test_a_label_of_the_histograms_is_met_however_narrow_its_kink():
    target = torch.tensor([[49 / GRID, 1 / GRID, 0.9975]], dtype=torch.float64)
    narrow = lambda p, t, w: weighted(-(-((p - t) * 1e8).abs()).exp(), w)  # noqa: E731
    assert GRID % 400 == 0
    found = best_constant(narrow, lambda p: p, target, torch.ones_like(target), 0.0, 1.0)
    assert torch.allclose(found, target, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.2, 0.6)])
def test_it_stays_in_its_range_and_without_labels_in_the_middle(low, high):
    target = torch.tensor([[2.0, -2.0, 0.5]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    found = best_constant(squared, lambda p: p, target, weight, low, high)
    assert found.tolist() == pytest.approx([high, low, (low + high) / 2], abs=1e-12)
    assert low <= found.min()
    assert found.max() <= high
