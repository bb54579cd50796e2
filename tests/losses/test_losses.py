"""Losses against torch and closed forms; what is not labelled never counts; a batch may be cut anywhere."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from redheart.losses.bentham import EDGE, hedonic, pair_logistic
from redheart.losses.combine import combine, factors
from redheart.losses.constant import best_constant
from redheart.losses.elementwise import cross_entropy, huber, squared, weighted
from redheart.losses.emotion import gate_balance, router_z, soft_focal
from redheart.losses.regret import matching_huber
from redheart.losses.surd import density_cross_entropy

LOSSES = {
    "squared": squared,
    "huber": partial(huber, delta=0.25),
    "matching_huber": partial(matching_huber, delta=0.25),
    "cross_entropy": cross_entropy,
    "soft_focal": partial(soft_focal, gamma=2.0),
    "hedonic": partial(hedonic, extreme_penalty=0.1),
    "pair_logistic": pair_logistic,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def case(rows=6, size=4, dtype=torch.float64):
    """Predictions, targets, and weights of which about a third are 0; [rows, size]."""
    prediction = 2 * torch.randn(rows, size, dtype=dtype)
    target = torch.rand(rows, size, dtype=dtype)
    weight = torch.tensor([1.0, 0.3, 0.0], dtype=dtype)[torch.randint(3, (rows, size))]
    return prediction.requires_grad_(), target, weight


def value_and_gradient(loss, prediction, target, weight):
    prediction = prediction.detach().clone().requires_grad_()
    total, count = loss(prediction, target, weight)
    return total.detach(), count, torch.autograd.grad(total, prediction)[0]


def test_focal_loss_without_focus_is_cross_entropy():
    x, t, w = case()
    assert torch.equal(soft_focal(x, t, w, 0.0)[0], F.binary_cross_entropy_with_logits(x, t, w, reduction="sum"))


def test_focal_loss_of_hard_targets_is_the_published_one():
    """(1 - p_t)^γ · -log p_t of Lin et al. (2017)."""
    x, t, _ = case()
    t = t.round()
    p_t = torch.where(t == 1, x.sigmoid(), 1 - x.sigmoid())
    for gamma in (0.5, 1.0, 2.0, 5.0):
        total, _ = soft_focal(x, t, torch.ones_like(x), gamma)
        torch.testing.assert_close(total, ((1 - p_t) ** gamma * -p_t.log()).sum())


def test_focal_loss_has_its_minimum_at_the_target():
    t = torch.tensor([[0.3]], dtype=torch.float64)
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)[:, None]
    losses = torch.stack([soft_focal(row[None], t, torch.ones_like(t), 2.0)[0] for row in x])
    assert x[losses.argmin()].sigmoid().item() == pytest.approx(0.3, abs=0.005)


@every_loss
def test_the_gradient_is_that_of_finite_differences(loss):
    x, t, w = case()
    assert torch.autograd.gradcheck(lambda p: loss(p, t, w)[0], x)


@every_loss
def test_the_count_is_the_sum_of_the_weights(loss):
    x, t, w = case()
    assert loss(x, t, w)[1] == w.sum()


@every_loss
def test_a_weight_scales_value_and_gradient(loss):
    x, t, w = case()
    total, _, gradient = value_and_gradient(loss, x, t, w)
    scaled, count, scaled_gradient = value_and_gradient(loss, x, t, 0.3 * w)
    torch.testing.assert_close(scaled, 0.3 * total)
    torch.testing.assert_close(scaled_gradient, 0.3 * gradient)
    torch.testing.assert_close(count, 0.3 * w.sum())


@every_loss
def test_what_is_not_labelled_moves_nothing(loss):
    x, t, w = case()
    null = w == 0
    assert null.any()
    assert not null.all()
    total, _, gradient = value_and_gradient(loss, x, t, w)
    other_x, other_t = torch.where(null, 50 * torch.randn_like(x), x), torch.where(null, -7.0, t)
    other_total, _, other_gradient = value_and_gradient(loss, other_x, other_t, w)
    assert torch.equal(total, other_total)
    assert torch.equal(gradient, other_gradient)
    assert torch.equal(gradient[null], torch.zeros_like(gradient[null]))
    assert (gradient[~null] != 0).all()


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["prediction", "target"])
def test_a_value_that_is_not_finite_and_not_labelled_is_not_counted(loss, bad, side):
    x, t, w = case()
    total, _ = loss(x, t, w)
    if side == "prediction":
        x = torch.where(w == 0, bad, x.detach())
    else:
        t = torch.where(w == 0, bad, t)
    assert torch.equal(loss(x, t, w)[0], total)


@every_loss
@pytest.mark.parametrize("side", ["prediction", "target"])
def test_a_nan_that_is_not_labelled_has_no_gradient(loss, side):
    x, t, w = case()
    _, _, gradient = value_and_gradient(loss, x, t, w)
    if side == "prediction":
        x = torch.where(w == 0, math.nan, x.detach())
    else:
        t = torch.where(w == 0, math.nan, t)
    assert torch.equal(value_and_gradient(loss, x, t, w)[2], gradient)


def test_a_weak_focus_has_a_gradient_where_the_answer_is_right():
    x = torch.zeros(1, 1, dtype=torch.float64)
    _, _, gradient = value_and_gradient(partial(soft_focal, gamma=0.5), x, torch.full_like(x, 0.5), torch.ones_like(x))
    assert gradient.isfinite().all()


@every_loss
def test_a_batch_without_any_label_gives_zero(loss):
    x, t, w = case()
    total, count, gradient = value_and_gradient(loss, x, t, 0 * w)
    assert total == 0
    assert count == 0
    assert not gradient.any()


@every_loss
def test_shapes_that_differ_are_refused(loss):
    x, t, w = case()
    for given in ((x[:, :1], t, w), (x, t[:, :1], w), (x, t[:1], w), (x, t, w[:, :1])):  # each would broadcast
        with pytest.raises(ValueError, match="differ in shape"):
            loss(*given)
    with pytest.raises(ValueError, match="differ in shape"):
        weighted(torch.ones(2, 3), torch.ones(2, 1))


def test_a_loss_that_is_not_finite_where_nothing_is_labelled_does_not_count():
    loss, weight = torch.tensor([[math.nan, 2.0, math.inf]]), torch.tensor([[0.0, 0.5, 0.0]])
    assert [x.item() for x in weighted(loss, weight)] == [1.0, 0.5]


@pytest.mark.parametrize("delta", [0.1, 0.25, 5.0])
def test_huber_is_the_one_of_torch(delta):
    x, t, w = case()
    expected = (F.huber_loss(x, t, reduction="none", delta=delta) * w).sum()
    torch.testing.assert_close(huber(x, t, w, delta)[0], expected)


def test_huber_is_quadratic_inside_and_linear_outside():
    t, w = torch.zeros(1, 1), torch.ones(1, 1)
    assert huber(torch.full((1, 1), 0.2), t, w, 0.25)[0].item() == pytest.approx(0.5 * 0.2**2)
    assert huber(torch.full((1, 1), 0.9), t, w, 0.25)[0].item() == pytest.approx(0.25 * (0.9 - 0.125))


@pytest.mark.parametrize("delta", [0.1, 0.25, 1.0])
def test_the_matching_huber_loss_slopes_as_the_cut_error_and_is_0_at_the_target(delta):
    x = torch.linspace(-12, 12, 481, dtype=torch.float64)[:, None]
    for t in (0.0, 0.05, 0.4, 1.0):
        target = torch.full_like(x, t)
        values = torch.cat([matching_huber(row[None], target[:1], torch.ones(1, 1), delta)[0].view(1) for row in x])
        _, _, slope = value_and_gradient(partial(matching_huber, delta=delta), x, target, torch.ones_like(x))
        torch.testing.assert_close(slope, (x.sigmoid() - t).clamp(-delta, delta))
        assert (slope.diff(dim=0) >= 0).all()  # convex
        integrals = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(slope[:, 0], x[:, 0])])
        torch.testing.assert_close(values - values[0], integrals, rtol=0, atol=2e-3)
        if 0 < t < 1:
            assert matching_huber(logit(t), target[:1], torch.ones(1, 1), delta)[0].item() == pytest.approx(
                0, abs=1e-12
            )
        assert values.min() >= -1e-12


def test_the_matching_huber_loss_is_the_same_under_autocast():
    x, t, w = (tensor.float() for tensor in case())
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_gradient(partial(matching_huber, delta=0.25), x, t, w)
    outside = value_and_gradient(partial(matching_huber, delta=0.25), x, t, w)
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[2], outside[2])


def test_the_matching_huber_loss_of_nan_is_nan_and_of_huge_answers_a_line():
    """A guard counts what is not finite; nothing may raise before it, or end a GPU's process."""
    x, t = torch.tensor([[math.nan, 60.0, -60.0, 60.0, -60.0]]), torch.tensor([[0.5, 0.0, 1.0, 1.0, 0.0]])
    total = matching_huber(x[:, :1], t[:, :1], torch.ones(1, 1), 0.25)[0]
    assert total.isnan()
    _, _, slope = value_and_gradient(partial(matching_huber, delta=0.25), x[:, 1:], t[:, 1:], torch.ones(1, 4))
    assert slope[0].tolist() == pytest.approx([0.25, -0.25, 0.0, 0.0], abs=1e-20)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    for i, wanted in ((1, 0.25 * 60), (2, 0.25 * 60), (3, 0.0), (4, 0.0)):
        far = matching_huber(x[:, i : i + 1], t[:, i : i + 1], torch.ones(1, 1), 0.25)[0].item()
        assert far == pytest.approx(wanted + (entropy if wanted else 0), abs=1e-5)


@pytest.mark.parametrize("share", [0.005, 0.02, 0.3, 0.7])
def test_the_matching_huber_loss_is_least_where_hubers_is_and_finds_a_rare_answer(share):
    target = (torch.arange(2000, dtype=torch.float64)[:, None] < 2000 * share).double()
    weight, delta = torch.ones_like(target), 0.25
    matching, hubers = partial(matching_huber, delta=delta), partial(huber, delta=delta)
    best = best_constant(matching, lambda p: torch.logit(p, eps=1e-9), target, weight, 0.0, 1.0)
    assert best.item() == pytest.approx(
        best_constant(hubers, lambda p: p, target, weight, 0.0, 1.0).item(), rel=1e-4, abs=1e-6
    )
    # a row that has it pulls with all of delta from there, however rare it is; Huber's loss pulls σ'(x) times as much
    _, _, slope = value_and_gradient(matching, logit(best.item()), target[:1], weight[:1])
    assert slope.item() == pytest.approx(-min(delta, 1 - best.item()))


def logit(p: float) -> torch.Tensor:
    return torch.logit(torch.tensor([[p]], dtype=torch.float64))


@pytest.mark.parametrize("p", [EDGE, 0.3, 1 - EDGE])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_inside_the_edges_the_hedonic_loss_is_the_squared_error(p, t):
    t = torch.tensor([[t]], dtype=torch.float64)
    total, _ = hedonic(logit(p), t, torch.ones_like(t), 1000.0)
    assert total.item() == pytest.approx((p - t.item()) ** 2, abs=1e-12)


@pytest.mark.parametrize(("p", "t", "beyond"), [(0.999, 0.5, 0.019), (0.004, 0.5, 0.016), (0.999, 0.99, 0.009)])
def test_beyond_an_edge_the_penalty_is_the_squared_distance_in_edges(p, t, beyond):
    t = torch.tensor([[t]], dtype=torch.float64)
    total, _ = hedonic(logit(p), t, torch.ones_like(t), 0.1)
    assert total.item() == pytest.approx((p - t.item()) ** 2 + 0.1 * (beyond / EDGE) ** 2)


@pytest.mark.parametrize(("p", "t"), [(0.999, 1.0), (0.999, 0.999), (0.001, 0.0)])
def test_an_extreme_value_that_the_target_asks_for_is_not_penalised(p, t):
    t = torch.tensor([[t]], dtype=torch.float64)
    assert hedonic(logit(p), t, torch.ones_like(t), 1000.0)[0].item() == pytest.approx((p - t.item()) ** 2, abs=1e-12)


def test_swapping_the_texts_of_a_pair_changes_nothing():
    x, t, w = case(size=1)
    t = t.round()
    total, _, gradient = value_and_gradient(pair_logistic, x, t, w)
    swapped, _, swapped_gradient = value_and_gradient(pair_logistic, -x, 1 - t, w)
    torch.testing.assert_close(swapped, total)
    torch.testing.assert_close(swapped_gradient, -gradient)


def test_a_pair_costs_the_log_odds_of_bradley_and_terry():
    gap, one = torch.tensor([[1.7]]), torch.ones(1, 1)
    assert pair_logistic(gap, one, one)[0].item() == pytest.approx(math.log1p(math.exp(-1.7)))
    assert pair_logistic(gap, 0 * one, one)[0].item() == pytest.approx(math.log1p(math.exp(1.7)))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_balance_is_zero_for_a_uniform_gate_and_n_minus_one_for_one_expert(n):
    assert gate_balance(torch.full((3, n), 1.5)) == pytest.approx(torch.zeros(3, 1), abs=1e-6)
    assert gate_balance(1000.0 * torch.eye(n)) == pytest.approx(torch.full((n, 1), n - 1.0), abs=1e-5)


def test_balance_does_not_see_a_shift_and_router_z_does():
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(gate_balance(x + 3), gate_balance(x))
    torch.testing.assert_close(router_z(x + 3), (torch.logsumexp(x, -1, keepdim=True) + 3).square())
    assert (gate_balance(x) > 0).all()


def parts_of(sizes):
    """A made-up step of 24 samples and two outputs: gradients of its mean loss when cut into parts of these sizes."""
    torch.manual_seed(1)
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    x, target = torch.randn(24, 5, dtype=torch.float64), torch.rand(24, 3, dtype=torch.float64)
    weights = {"a": torch.rand(24, 3, dtype=torch.float64).round(), "b": torch.rand(24, 3, dtype=torch.float64)}
    counts = {name: float(v.sum()) for name, v in weights.items()}
    total = 0.0
    for rows in torch.arange(24).split(sizes):
        y = x[rows] @ w
        sums = {
            "a": squared(y, target[rows], weights["a"][rows])[0],
            "b": cross_entropy(y, target[rows], weights["b"][rows])[0],
        }
        total = total + combine(sums, counts, {"a": 0.7, "b": 0.3}, len(sizes)) / len(sizes)  # the engine averages
    return total.detach(), torch.autograd.grad(total, w)[0]


@pytest.mark.parametrize("sizes", [[1] * 24, [3] * 8, [12, 12], [1, 2, 3, 18], [20, 4]])
def test_the_combined_loss_does_not_depend_on_how_the_batch_is_cut(sizes):
    whole, whole_gradient = parts_of([24])
    value, gradient = parts_of(sizes)
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-11, atol=1e-14)


def test_the_combined_loss_is_the_formula():
    sums = {"a": torch.tensor(3.0), "b": torch.tensor(-2.0)}
    total = combine(sums, {"a": 4.0, "b": 0.5}, {"a": 0.7, "b": 0.25}, 6)
    assert total.item() == pytest.approx(6 * (0.7 * 3 / 4 - 0.25 * 2 / 0.5))


def test_an_output_without_a_label_anywhere_adds_zero_but_stays_in_the_graph():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    total = combine({"a": a.sum(), "b": b.sum()}, {"a": 2.0, "b": 0.0}, {"a": 1.0, "b": 1.0}, 1)
    total.backward()
    assert total.item() == pytest.approx(1.0)
    assert torch.equal(b.grad, torch.zeros(2))
    assert torch.equal(a.grad, torch.full((2,), 0.5))


def test_a_scale_is_floored():
    assert factors({"a": 1.0, "b": 2.0, "c": 0.5}, {"a": 0.25, "b": 1e-9, "c": 0.0}, 0.01) == pytest.approx(
        {"a": 4.0, "b": 200.0, "c": 50.0}
    )


@pytest.mark.parametrize("edges", [(0.5,), (0.1, 0.9), ()])
def test_the_density_loss_is_the_cross_entropy_of_the_label_s_own_level(edges):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 8, 3, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1, math.nan], dtype=torch.float64)[:, None]
    weight = torch.tensor([1, 1, 0.3, 1, 1, 1, 0.3, 1, 0], dtype=torch.float64)[:, None]
    value, count = density_cross_entropy(logits, target, weight, edges)
    level = torch.tensor([sum(t >= e for e in edges) for t in target[:8, 0].tolist()])
    each = F.cross_entropy(logits[:8].flatten(0, 1), level.repeat_interleave(8), reduction="none").view(8, 8).mean(1)
    torch.testing.assert_close(value, (each * weight[:8, 0]).sum())
    assert count == weight.sum()
