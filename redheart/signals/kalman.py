"""Kalman filter of linear Gaussian states, twice: step by step, and as a tree of filter elements without a loop over time.

x_t = F x_{t-1} + N(0, Q), z_t = H x_t + N(0, R). S: width of the state, M: of a measurement, T: steps; `*` is any batch.
Everything is computed in fp32 at least (fp64 stays), outside autocast, and is differentiable.

Sources: Kalman (1960), with the Joseph form of the covariance (Bucy and Joseph 1968), which stays positive definite under
rounding; Särkkä and García-Fernández (2021), "Temporal Parallelization of Bayesian Smoothers", IEEE TAC 66(1), for the elements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from redheart.finite import check_finite


class FilterResult(NamedTuple):
    """Moments after the update of every step, and the log density of all measurements in nats."""

    mean: torch.Tensor  # [*, T, S]
    covariance: torch.Tensor  # [*, T, S, S]
    log_likelihood: torch.Tensor  # [*]


def kalman_filter(
    z: torch.Tensor,
    F: torch.Tensor,
    H: torch.Tensor,
    Q: torch.Tensor,
    R: torch.Tensor,
    x0: torch.Tensor,
    P0: torch.Tensor,
) -> FilterResult:
    """z [*, T, M]; x0 [*, S] and P0 [*, S, S] stand before the first prediction; predict, then update.

    F [S, S], H [M, S], Q [S, S] and R [M, M] may each vary: with the leading shape [*, T] (over the batch and over time) where they
    have one dimension more than P0, else with a shape that broadcasts to [*]. ValueError where the shapes do not fit, RedHeartError
    that names what is not finite (a NaN is no missing measurement). The loop over T costs about twenty small kernels a step.
    """
    check_finite({"z": z, "F": F, "H": H, "Q": Q, "R": R, "x0": x0, "P0": P0})
    dtype = torch.promote_types(z.dtype, torch.float32)
    z, F, H, Q, R, x, P = (a.to(dtype) for a in (z, F, H, Q, R, x0, P0))
    state, measured = x.shape[-1:], z.shape[-1:]
    wanted = (state + state, measured + state, state + state, measured + measured, state + state)
    if any(a.shape[-2:] != pair for a, pair in zip((F, H, Q, R, P), wanted, strict=True)):  # a 1 x 1 would broadcast
        given = zip(("z", "F", "H", "Q", "R", "x0", "P0"), (z, F, H, Q, R, x, P), strict=True)
        raise ValueError(f"widths of state and measurement do not fit: { ({n: tuple(a.shape) for n, a in given}) }")
    per_step = [a.dim() == P.dim() + 1 for a in (F, H, Q, R)]
    means, covariances, total = [], [], torch.zeros(z.shape[:-2], dtype=dtype, device=z.device)
    eye = torch.eye(x.shape[-1], dtype=dtype, device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        for t in range(z.shape[-2]):
            f, h, q, r = (a.select(-3, t) if timed else a for a, timed in zip((F, H, Q, R), per_step, strict=True))
            x, P = _apply(f, x), f @ P @ f.mT + q
            innovation = z.select(-2, t) - _apply(h, x)
            factor = torch.linalg.cholesky(h @ P @ h.mT + r)
            gain = torch.cholesky_solve(h @ P, factor).mT
            rest = eye - gain @ h
            x = x + _apply(gain, innovation)
            P = rest @ P @ rest.mT + gain @ r @ gain.mT
            P = (P + P.mT) / 2
            whitened = torch.linalg.solve_triangular(factor, innovation[..., None], upper=False)
            log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            total = total - 0.5 * (whitened.square().sum((-2, -1)) + log_det + z.shape[-1] * math.log(2 * math.pi))
            means.append(x)
            covariances.append(P)
    return FilterResult(torch.stack(means, -2), torch.stack(covariances, -3), total)


class FilterElement(NamedTuple):
    """What a stretch of time does: x_end | x_start ~ N(A x_start + b, C) given its measurements, and what those measurements
    say of x_start: an information vector eta and matrix J."""

    A: torch.Tensor  # [*, S, S]
    b: torch.Tensor  # [*, S]
    C: torch.Tensor  # [*, S, S]
    eta: torch.Tensor  # [*, S]
    J: torch.Tensor  # [*, S, S]


TIME = (-3, -2, -3, -2, -3)  # where the time axis of a stack of elements stands, field by field


def predict_element(F: torch.Tensor, Q: torch.Tensor) -> FilterElement:
    """One prediction, without a measurement; F, Q [*, S, S]."""
    zero = torch.zeros_like(F)
    return FilterElement(F, zero[..., 0], Q, zero[..., 0], zero)


def update_element(information_vector: torch.Tensor, information: torch.Tensor) -> FilterElement:
    """A measurement alone: HᵀR⁻¹z [*, S] and HᵀR⁻¹H [*, S, S]."""
    zero = torch.zeros_like(information)
    eye = torch.eye(information.shape[-1], dtype=information.dtype, device=information.device)
    return FilterElement(eye.expand_as(information), zero[..., 0], zero, information_vector, information)


def prior_element(mean: torch.Tensor, covariance: torch.Tensor) -> FilterElement:
    """A known start: combined with what follows, b and C are the posterior's moments; [*, S], [*, S, S]."""
    zero = torch.zeros_like(covariance)
    return FilterElement(zero, mean, covariance, zero[..., 0], zero)


def combine(first: FilterElement, second: FilterElement) -> FilterElement:
    """The two stretches as one (associative): Särkkä and García-Fernández (2021), eq. 15, lemma 8.

    With M = (I + C₁J₂)⁻¹, whose eigenvalues lie in (0, 1]: one batched inverse. An identity (A = I, all else 0) changes nothing.
    """
    a1, b1, c1, eta1, j1 = (_raised(x) for x in first)
    a2, b2, c2, eta2, j2 = (_raised(x) for x in second)
    with torch.autocast(a1.device.type, enabled=False):
        eye = torch.eye(a1.shape[-1], dtype=a1.dtype, device=a1.device)
        m = torch.linalg.inv(eye + c1 @ j2)
        forth, back = a2 @ m, a1.mT @ m.mT
        c, j = forth @ c1 @ a2.mT + c2, back @ j2 @ a1 + j1
        return FilterElement(
            forth @ a1,
            _apply(forth, b1 + _apply(c1, eta2)) + b2,
            (c + c.mT) / 2,
            _apply(back, eta2 - _apply(j2, b1)) + eta1,
            (j + j.mT) / 2,
        )


def reduce_elements(elements: FilterElement) -> FilterElement:
    """Elements of T neighbouring stretches (A [*, T, S, S], b [*, T, S], …) -> the one of them all.

    A tree of ⌈log₂ T⌉ levels, neighbours paired from the left, an odd last one carried up: T - 1 combinations of which each level's
    run at once. Identities behind the end (padding) change nothing.
    """
    steps = elements
    while steps.A.shape[-3] > 1:
        left, right, rest = (FilterElement(*part) for part in zip(*map(_halves, steps, TIME), strict=True))
        merged = combine(left, right)
        steps = FilterElement(*(torch.cat([m, r], axis) for m, r, axis in zip(merged, rest, TIME, strict=True)))
    return FilterElement(*(x.select(axis, 0) for x, axis in zip(steps, TIME, strict=True)))


def _halves(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps 0, 2, …; steps 1, 3, …; and what an odd number leaves over, along a negative `axis`."""
    pairs = x.shape[axis] // 2
    paired = x.narrow(axis, 0, 2 * pairs).unflatten(axis, (pairs, 2))
    return paired.select(axis, 0), paired.select(axis, 1), x.narrow(axis, 2 * pairs, x.shape[axis] - 2 * pairs)


def _apply(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _raised(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
