"""Losses against torch, their own limits, and the promise that nulls and the cutting of a batch change nothing."""

import pytest
import torch
from torch.nn import functional as F

from redheart.losses.bentham import EDGE, hedonic, pair_logistic
from redheart.losses.combine import combine, factors
from redheart.losses.elementwise import cross_entropy, huber, squared, weighted
from redheart.losses.emotion import gate_balance, router_z, soft_focal


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ONES = torch.ones(6, 7, dtype=torch.float64)


def test_focal_without_focus_is_cross_entropy():
    x, t = drawn(6, 7) * 6 - 3, drawn(6, 7, seed=1)
    assert soft_focal(x, t, ONES, 0.0)[0].item() == pytest.approx(
        F.binary_cross_entropy_with_logits(x, t, reduction="sum").item()
    )


def test_focal_looks_away_from_what_is_right_already():
    t = torch.tensor([[1.0]])
    right, wrong = (soft_focal(torch.tensor([[x]]), t, torch.ones(1, 1), 2.0)[0].item() for x in (4.0, -4.0))
    plain = [F.binary_cross_entropy_with_logits(torch.tensor([[x]]), t).item() for x in (4.0, -4.0)]
    assert right / plain[0] < 1e-3
    assert wrong / plain[1] > 0.9


def test_huber_and_squared_are_torchs():
    p, t = drawn(6, 7), drawn(6, 7, seed=1)
    assert huber(p, t, ONES, 0.25)[0].item() == pytest.approx(F.huber_loss(p, t, reduction="sum", delta=0.25).item())
    assert squared(p, t, ONES)[0].item() == pytest.approx(F.mse_loss(p, t, reduction="sum").item())


def test_the_extreme_penalty_strikes_only_beyond_edge_and_target():
    x = torch.logit(torch.tensor([[0.5, 0.97, 0.995, 0.995]], dtype=torch.float64))
    t = torch.tensor([[0.4, 0.5, 0.5, 1.0]], dtype=torch.float64)
    with_penalty = hedonic(x, t, torch.eye(4, dtype=torch.float64)[:1], 1.0)[0]
    assert with_penalty.item() == pytest.approx(0.01)
    for column, expected in ((1, 0.0), (2, (0.995 - (1 - EDGE)) ** 2 / EDGE**2), (3, 0.0)):
        w = torch.zeros(1, 4, dtype=torch.float64)
        w[0, column] = 1
        extra = hedonic(x, t, w, 1.0)[0] - hedonic(x, t, w, 0.0)[0]
        assert extra.item() == pytest.approx(expected, abs=1e-12)


def test_swapping_a_pair_and_its_answer_changes_nothing():
    d, t, w = drawn(5, 1) * 4 - 2, torch.tensor([[1.0], [0], [1], [0], [1]], dtype=torch.float64), torch.ones(5, 1)
    assert pair_logistic(d, t, w)[0].item() == pytest.approx(pair_logistic(-d, 1 - t, w)[0].item())


@pytest.mark.parametrize("loss", [squared, cross_entropy, lambda p, t, w: soft_focal(p, t, w, 2.0)])
def test_an_entry_without_a_label_enters_neither_value_nor_gradient(loss):
    p = drawn(3, 2).requires_grad_()
    t, w = drawn(3, 2, seed=1), torch.tensor([[1.0, 0], [0.3, 1], [0, 0]], dtype=torch.float64)
    value, count = loss(p, t, w)
    (gradient,) = torch.autograd.grad(value, p)
    other = t.clone()
    other[w == 0] = 0.123
    assert loss(p, other, w)[0].item() == value.item()
    assert count.item() == pytest.approx(2.3)
    assert (gradient[w == 0] == 0).all()
    assert (gradient[w > 0] != 0).all()


def test_a_nan_without_a_label_is_harmless_and_shapes_must_agree():
    assert weighted(torch.tensor([[float("nan"), 2.0]]), torch.tensor([[0.0, 1.0]]))[0].item() == 2.0
    with pytest.raises(ValueError, match="differ in shape"):
        weighted(torch.zeros(2, 2), torch.zeros(2, 1))


def test_gate_regularisers_have_their_known_limits():
    assert gate_balance(torch.zeros(3, 8)).flatten().tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    one_hot = torch.full((1, 8), -100.0)
    one_hot[0, 2] = 100
    assert gate_balance(one_hot).item() == pytest.approx(7.0)
    assert router_z(torch.zeros(1, 8)).item() == pytest.approx(torch.log(torch.tensor(8.0)).item() ** 2)


@pytest.mark.parametrize("cuts", [[8], [3, 5], [1] * 8])
def test_the_combined_loss_does_not_depend_on_how_the_batch_is_cut(cuts: list[int]):
    p, t, w = drawn(8, 7), drawn(8, 7, seed=1), (drawn(8, 7, seed=2) > 0.4).double()
    counts, scale = {"a": float(w.sum())}, factors({"a": 2.0}, {"a": 0.5}, 0.01)
    whole = 2.0 / 0.5 * ((p - t).square() * w).sum() / w.sum()
    parts = [squared(a, b, c)[0] for a, b, c in zip(p.split(cuts), t.split(cuts), w.split(cuts))]
    total = sum(combine({"a": s}, counts, scale, len(cuts)) for s in parts) / len(
        cuts
    )  # engines average over micro-batches
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)


def test_a_task_without_labels_adds_zero_and_still_touches_its_parameters():
    x = torch.tensor(3.0, requires_grad=True)
    total = combine({"a": x * 2}, {"a": 0.0}, {"a": 1.0}, 1)
    (gradient,) = torch.autograd.grad(total, x)
    assert total.item() == 0
    assert gradient.item() == 0


def test_a_tiny_constant_loss_is_floored():
    assert factors({"a": 1.0}, {"a": 1e-9}, 0.01) == {"a": 100.0}
