"""A level: thirds where values differ, ties together, no level empty, whatever is rare."""

import itertools

import pytest
import torch

from redheart.causality.levels import LEVELS, level_edges, level_of
from redheart.schema import RedHeartError


def levels(values: torch.Tensor) -> torch.Tensor:
    return level_of(values, level_edges(values))


def test_distinct_values_are_cut_into_thirds():
    assert levels(torch.arange(9)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    shuffled = torch.randperm(3000, generator=torch.Generator().manual_seed(0)).double() / 7
    assert levels(shuffled).bincount().tolist() == [1000, 1000, 1000]


@pytest.mark.parametrize("share", [0.0005, 0.015, 0.2, 0.4, 0.9])
def test_yes_and_no_are_two_levels_however_rare_a_yes_is(share: float):
    values = (torch.arange(4000) < share * 4000).double()
    assert level_edges(values) == [0.5]
    assert torch.equal(levels(values), values.long())


@pytest.mark.parametrize("seed", range(20))
def test_no_level_is_empty_and_none_could_be_nearer_to_its_size(seed: int):
    """Against every way of cutting the distinct values in two places."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(6, generator=generator, dtype=torch.float64) ** 4
    values = torch.multinomial(chances, 500, replacement=True, generator=generator).double() / 5
    found, distinct = levels(values), values.unique()
    assert len(found.unique()) == min(LEVELS, len(distinct))
    for value in distinct:
        assert len(found[values == value].unique()) == 1
    assert (found[values.argsort()].diff() >= 0).all()
    if len(distinct) < LEVELS:
        return
    first = lambda cut: abs(int((values <= distinct[cut[0]]).sum()) - 500 / 3)  # noqa: E731
    cuts = list(itertools.combinations(range(len(distinct) - 1), 2))
    assert abs(int((found == 0).sum()) - 500 / 3) == pytest.approx(min(map(first, cuts)))


def test_few_values_and_none():
    assert level_edges(torch.full((5,), 0.3)) == []
    assert levels(torch.full((5,), 0.3)).tolist() == [0] * 5
    assert level_edges(torch.tensor([])) == []
    assert level_of(torch.tensor([-1.0, 9.0]), [0.25, 0.75]).tolist() == [0, 2]


def test_a_value_read_back_as_it_is_stored_keeps_its_level():
    values = torch.rand(999, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edges = level_edges(values)
    assert torch.equal(level_of(values.float(), edges), level_of(values, edges))


def test_a_nan_has_no_level():
    with pytest.raises(RedHeartError, match="not finite"):
        level_edges(torch.tensor([0.1, float("nan")]))
