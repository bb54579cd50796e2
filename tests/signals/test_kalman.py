"""The Kalman filter against filterpy, the exact joint Gaussian, the stationary solution, and itself as a tree."""

import numpy as np
import pytest
import torch
from filterpy.kalman import KalmanFilter
from scipy.linalg import solve_discrete_are
from scipy.stats import multivariate_normal

from redheart.schema import RedHeartError
from redheart.signals.kalman import (
    FilterElement,
    combine,
    kalman_filter,
    predict_element,
    prior_element,
    reduce_elements,
    update_element,
)


def system(states: int, measured: int, steps: int, batch: int = 1, seed: int = 0):
    """A stable random system and measurements drawn from it, fp64: z, F, H, Q, R, x0, P0."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, _ = torch.linalg.qr(rand(states, states))
    F = 0.95 * q
    H = rand(measured, states)
    a, b = 0.3 * rand(states, states), 0.5 * rand(measured, measured)
    Q, R = a @ a.mT + 0.01 * torch.eye(states).double(), b @ b.mT + 0.1 * torch.eye(measured).double()
    x0, P0 = rand(batch, states), torch.eye(states).double().expand(batch, -1, -1)
    x = x0 + rand(batch, states)
    z = []
    for _ in range(steps):
        x = x @ F.mT + rand(batch, states) @ torch.linalg.cholesky(Q).mT
        z.append(x @ H.mT + rand(batch, measured) @ torch.linalg.cholesky(R).mT)
    return torch.stack(z, 1), F, H, Q, R, x0, P0


def error(got: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference relative to the largest value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1))


@pytest.mark.parametrize(("states", "measured"), [(1, 1), (2, 1), (4, 3), (14, 21)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_filterpy_agrees_over_200_steps(states, measured, dtype, tolerance):
    z, F, H, Q, R, x0, P0 = system(states, measured, 200)
    theirs = KalmanFilter(states, measured)
    theirs.x, theirs.P = x0[0].numpy()[:, None].copy(), P0[0].numpy().copy()
    theirs.F, theirs.H, theirs.Q, theirs.R = (a.numpy() for a in (F, H, Q, R))
    means, covariances, log_likelihood = [], [], 0.0
    for row in z[0].numpy():
        theirs.predict()
        theirs.update(row[:, None])
        means.append(theirs.x[:, 0].copy())
        covariances.append(theirs.P.copy())
        log_likelihood += theirs.log_likelihood
    ours = kalman_filter(*(a.to(dtype) for a in (z, F, H, Q, R, x0, P0)))
    assert ours.mean.dtype == dtype
    assert error(ours.mean[0], np.stack(means)) < tolerance
    assert error(ours.covariance[0], np.stack(covariances)) < tolerance
    assert abs(ours.log_likelihood.item() - log_likelihood) < tolerance * max(1, abs(log_likelihood))


def test_the_exact_joint_gaussian():
    steps, states, measured = 4, 3, 2
    z, F, H, Q, R, x0, P0 = (a.numpy() for a in system(states, measured, steps))
    mean_x, cov = [], np.zeros((steps * states, steps * states))
    marginal, m = P0[0], x0[0]
    for t in range(steps):
        m, marginal = F @ m, F @ marginal @ F.T + Q
        mean_x.append(m)
        block = marginal
        for s in range(t, steps):
            cov[s * states : (s + 1) * states, t * states : (t + 1) * states] = block
            cov[t * states : (t + 1) * states, s * states : (s + 1) * states] = block.T
            block = F @ block
    mean_x = np.concatenate(mean_x)
    big_h, big_r = np.kron(np.eye(steps), H), np.kron(np.eye(steps), R)
    cov_z = big_h @ cov @ big_h.T + big_r
    ours = kalman_filter(*map(torch.from_numpy, (z, F, H, Q, R, x0, P0)))
    flat = z[0].reshape(-1)
    assert ours.log_likelihood.item() == pytest.approx(
        multivariate_normal(big_h @ mean_x, cov_z).logpdf(flat), rel=1e-10
    )
    last = slice((steps - 1) * states, None)
    gain = cov[last] @ big_h.T @ np.linalg.inv(cov_z)
    assert error(ours.mean[0, -1], mean_x[last] + gain @ (flat - big_h @ mean_x)) < 1e-10
    assert error(ours.covariance[0, -1], cov[last, last] - gain @ big_h @ cov[:, last]) < 1e-10


def test_the_covariance_settles_where_the_riccati_equation_says():
    z, F, H, Q, R, x0, P0 = system(3, 2, 300)
    ours = kalman_filter(z, F, H, Q, R, x0, P0).covariance[0, -1]
    predicted = solve_discrete_are(F.mT.numpy(), H.mT.numpy(), Q.numpy(), R.numpy())
    assert error(F @ ours @ F.mT + Q, predicted) < 1e-9


def test_the_mean_normalised_innovation_squared_is_the_measurements_width():
    measured, batch, steps = 3, 64, 100
    z, F, H, Q, R, x0, P0 = system(4, measured, steps, batch)
    ours = kalman_filter(z, F, H, Q, R, x0, P0)
    before = torch.cat([x0[:, None], ours.mean[:, :-1]], 1) @ F.mT
    spread = torch.cat([P0[:, None], ours.covariance[:, :-1]], 1)
    s = H @ (F @ spread @ F.mT + Q) @ H.mT + R
    innovation = z - before @ H.mT
    nis = (innovation[..., None, :] @ torch.linalg.solve(s, innovation[..., None])).mean().item()
    # a mean of batch·steps χ²(measured): standard deviation √(2·measured / (batch·steps))
    assert nis == pytest.approx(measured, abs=4 * (2 * measured / (batch * steps)) ** 0.5)


def stress(steps: int) -> list[torch.Tensor]:
    """fp32: P₀ = 10·I, R = 1e-4·I, nearly no process noise, nearly equal rows of H, an F that only turns."""
    g = torch.Generator().manual_seed(0)
    F, _ = torch.linalg.qr(torch.randn(6, 6, generator=g))
    row = torch.randn(1, 6, generator=g)
    H = row + 1e-3 * torch.randn(4, 6, generator=g)
    z = torch.randn(2, steps, 4, generator=g)
    eye = torch.eye(6)
    return [z, F, H, 1e-6 * eye, 1e-4 * torch.eye(4), torch.zeros(2, 6), 10 * eye.expand(2, -1, -1)]


def test_the_covariance_stays_positive_definite_in_fp32():
    ours = kalman_filter(*stress(500))
    assert ours.covariance.dtype == torch.float32
    assert torch.linalg.eigvalsh(ours.covariance.double()).min() > 0
    assert ours.mean.isfinite().all()


def elements(z, F, H, Q, R) -> FilterElement:
    """One element per step: predict, then update."""
    information = H.mT @ torch.linalg.inv(R)
    shape = (*z.shape[:-1], *F.shape[-2:])
    update = update_element((information @ z[..., None])[..., 0], (information @ H).expand(shape))
    return combine(predict_element(F.expand(shape), Q.expand(shape)), update)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_tree_ends_where_the_loop_ends(steps, dtype, tolerance):
    z, F, H, Q, R, x0, P0 = (a.to(dtype) for a in system(14, 21, steps, batch=3))
    noise = R * (1 + torch.rand(3, steps, 1, 1, generator=torch.Generator().manual_seed(5)).to(dtype))  # R varies
    loop = kalman_filter(z, F, H, Q, noise, x0, P0)
    tree = combine(prior_element(x0, P0), reduce_elements(elements(z, F, H, Q, noise)))
    assert error(tree.b, loop.mean[:, -1]) < tolerance
    assert error(tree.C, loop.covariance[:, -1]) < tolerance


@pytest.mark.parametrize("steps", [64, 512])
def test_the_trees_covariance_stays_positive_definite(steps: int):
    z, F, H, Q, _, x0, P0 = stress(steps)
    tree = combine(
        prior_element(x0, P0), reduce_elements(elements(z, F, H, 1e-3 * torch.eye(6) + Q, 1e-2 * torch.eye(4)))
    )
    assert torch.linalg.eigvalsh(tree.C.double()).min() > 0
    assert tree.b.isfinite().all()


def test_combination_is_associative_and_padding_changes_nothing():
    z, F, H, Q, R, *_ = system(4, 3, 6, batch=2)
    steps = elements(z, F, H, Q, R)
    at = lambda t: FilterElement(steps.A[:, t], steps.b[:, t], steps.C[:, t], steps.eta[:, t], steps.J[:, t])  # noqa: E731
    left, right = combine(combine(at(0), at(1)), at(2)), combine(at(0), combine(at(1), at(2)))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(left, right, strict=True))
    one = update_element(torch.zeros(2, 5, 4).double(), torch.zeros(2, 5, 4, 4).double())
    padded = FilterElement(*(torch.cat([a, b], 1) for a, b in zip(steps, one, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(reduce_elements(steps), reduce_elements(padded), strict=True))


def test_gradcheck():
    z, F, H, Q, R, x0, P0 = system(2, 2, 3)
    L, N = torch.linalg.cholesky(Q), torch.linalg.cholesky(R)

    def loop(z, F, H, L, N, x0, P0):
        return tuple(kalman_filter(z, F, H, L @ L.mT, N @ N.mT, x0, P0 @ P0.mT))

    def tree(z, F, H, L, N, x0, P0):
        start = prior_element(x0, P0 @ P0.mT)
        return combine(start, reduce_elements(elements(z, F, H, L @ L.mT, N @ N.mT)))[1:3]

    leaves = [a.clone().requires_grad_() for a in (z, F, H, L, N, x0, P0)]
    assert torch.autograd.gradcheck(loop, leaves)
    assert torch.autograd.gradcheck(tree, leaves)


@pytest.mark.parametrize(
    ("place", "part"),
    [
        (0, (..., slice(1))), (1, (slice(2),)), (1, (..., slice(2))), (2, (slice(1),)), (2, (..., slice(2))), (3, (slice(1), slice(1))),
        (4, (slice(1), slice(1))), (5, (..., slice(2))), (6, (..., slice(1), slice(1))),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_named(place, part):
    given = list(system(3, 2, 4))
    given[place] = given[place][part]
    with pytest.raises(ValueError, match="do not fit"):
        kalman_filter(*given)


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(place: int, bad: float):
    given = [a.contiguous().clone() for a in system(3, 2, 4)]
    given[place].view(-1)[1] = bad
    with pytest.raises(RedHeartError, match=f"^{('z', 'F', 'H', 'Q', 'R', 'x0', 'P0')[place]}: 1 of .* not finite"):
        kalman_filter(*given)


def test_fp64_stays_whichever_argument_has_it_and_no_step_is_no_filter():
    z, *model = system(2, 1, 5)
    found = kalman_filter(z.float(), *model)
    assert {x.dtype for x in found} == {torch.float64}
    assert torch.equal(found.mean, kalman_filter(z.float().double(), *model).mean)
    with pytest.raises(ValueError, match="no measurement"):
        kalman_filter(z[:, :0], *model)
