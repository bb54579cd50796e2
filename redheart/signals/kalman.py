"""Kalman filter of linear Gaussian states: step by step (`kalman_filter`), as a tree of filter elements without a loop over time, and
`last_posterior`, the end of many texts' filters, which on a CPU is one compiled pass over the steps (native.py), forward and backward.

x_t = F x_{t-1} + N(0, Q), z_t = H x_t + N(0, R). S: width of the state, M: of a measurement, T: steps; `*` is any batch.
Everything is computed in fp32 at least (fp64 stays), outside autocast, and is differentiable.

Sources: Kalman (1960), with the Joseph form of the covariance (Bucy and Joseph 1968), which stays positive definite under
rounding; Särkkä and García-Fernández (2021), "Temporal Parallelization of Bayesian Smoothers", IEEE TAC 66(1), for the elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from redheart.finite import check_finite
from redheart.signals import native


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
    have one dimension more than P0, else with a shape that broadcasts to [*]. ValueError where the shapes do not fit or T is 0,
    RedHeartError that names what is not finite (a NaN is no missing measurement). The loop over T costs about twenty small kernels a step.
    """
    check_finite({"z": z, "F": F, "H": H, "Q": Q, "R": R, "x0": x0, "P0": P0})
    dtype = functools.reduce(torch.promote_types, (a.dtype for a in (z, F, H, Q, R, x0, P0)), torch.float32)
    z, F, H, Q, R, x, P = (a.to(dtype) for a in (z, F, H, Q, R, x0, P0))
    state, measured = x.shape[-1:], z.shape[-1:]
    wanted = (state + state, measured + state, state + state, measured + measured, state + state)
    if any(a.shape[-2:] != pair for a, pair in zip((F, H, Q, R, P), wanted, strict=True)):  # a 1 x 1 would broadcast
        given = zip(("z", "F", "H", "Q", "R", "x0", "P0"), (z, F, H, Q, R, x, P), strict=True)
        raise ValueError(f"widths of state and measurement do not fit: { ({n: tuple(a.shape) for n, a in given}) }")
    if not z.shape[-2]:
        raise ValueError(f"there is no measurement to filter: z is {list(z.shape)}")
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
        m = torch.linalg.inv_ex(eye + c1 @ j2)[0]  # no look at its success, for which a GPU would wait
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


class Measurement(NamedTuple):
    """M readings with independent noise of a state [S]; none: M = 0."""

    H: torch.Tensor  # [M, S], of all texts
    z: torch.Tensor  # [*, M]
    precision: torch.Tensor  # [*, M], of the noise: at least 0

    def information(self) -> tuple[torch.Tensor, torch.Tensor]:
        """HᵀR⁻¹z [*, S] and HᵀR⁻¹H [*, S, S]."""
        return (self.precision * self.z) @ self.H, (self.H.mT * self.precision[..., None, :]) @ self.H


def last_posterior(
    mean: torch.Tensor,
    variance: torch.Tensor,
    F: torch.Tensor,
    Q: torch.Tensor,
    each: Measurement,
    last: Measurement,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [B, S] and covariance [B, S, S] behind the last step of every text.

    From a prior of independent components, mean and variance [B, S]: at every step where mask [B, T] is True a prediction by F and
    Q [S, S] and a measurement of `each` ([B, T, M]); elsewhere nothing; at the end a measurement of `last` ([B, L]). All of one
    dtype, fp32 or fp64. On a CPU rows are measured one by one, in the order of H; else by a tree of ⌈log₂ T⌉ levels.
    """
    if native.kernels_serve(mean, variance, F, Q, *each, *last):
        given = [x.contiguous() for x in (mean, variance, F, Q, *each, *last)]
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        return _filter(given, mask.contiguous(), keep)[:2]
    with torch.autocast(mean.device.type, enabled=False):
        shape = (*mask.shape, *F.shape)
        steps = combine(predict_element(F.expand(shape), Q.expand(shape)), update_element(*each.information()))
        matrix, row = mask[..., None, None], mask[..., None]
        eye = torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)
        steps = FilterElement(
            torch.where(matrix, steps.A, eye),
            torch.where(row, steps.b, 0.0),
            torch.where(matrix, steps.C, 0.0),
            torch.where(row, steps.eta, 0.0),
            torch.where(matrix, steps.J, 0.0),
        )
        end = combine(prior_element(mean, torch.diag_embed(variance)), reduce_elements(steps))
        end = combine(end, update_element(*last.information()))
    return end.b, end.C


SQUARINGS = (
    24  # the norm comes out too small by at most S / (2e · 2²⁴) of itself: below fp32's resolution for a state of 14
)


def contraction(weight: torch.Tensor) -> torch.Tensor:
    """weight [S, S] / max(1, ‖weight‖₂): what no repetition makes grow.

    Without an SVD: (WᵀW)^(2²⁴), scaled to trace 1 between its squarings in fp64, is the mean Π of the projections onto the largest
    singular value's directions, and ‖W‖₂² = tr(Π WᵀW). Of several equal ones the gradient is the mean of theirs. fp32 or fp64.
    """
    if native.kernels_serve(weight):
        return _contraction(weight.contiguous())[0]
    with torch.no_grad():
        power = weight.double().mT @ weight.double()
        tiny = torch.finfo(power.dtype).tiny  # for a matrix of zeros
        for _ in range(SQUARINGS):
            power = power / power.diagonal().sum().clamp(min=tiny)
            power = power @ power
        power = power / power.diagonal().sum().clamp(min=tiny)
    raised = weight.double()
    square = (power * (raised.mT @ raised)).sum()
    return (raised / square.clamp(min=1).sqrt()).to(weight.dtype)


@torch.library.custom_op("redheart::contraction", mutates_args=())
def _contraction(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = torch.empty_like(weight), torch.empty_like(weight), weight.new_empty(1)
    native.call("contraction", weight.dtype, weight, weight.shape[0], SQUARINGS, *out)
    return out


@torch.library.custom_op("redheart::contraction_backward", mutates_args=())
def _contraction_backward(
    grad: torch.Tensor, out: torch.Tensor, direction: torch.Tensor, norm: torch.Tensor
) -> torch.Tensor:
    to = torch.empty_like(grad)
    native.call("contraction_backward", grad.dtype, grad, out, direction, norm, grad.shape[0], to)
    return to


@_contraction.register_fake
def _(weight: torch.Tensor) -> Any:
    return torch.empty_like(weight), torch.empty_like(weight), weight.new_empty(1)


@_contraction_backward.register_fake
def _(grad: torch.Tensor, *_: torch.Tensor) -> Any:
    return torch.empty_like(grad)


def _remember_bound(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _adjoint_of_bound(ctx: Any, grad: torch.Tensor | None, *_: Any) -> torch.Tensor | None:
    return None if grad is None else _contraction_backward(grad.contiguous(), *ctx.saved_tensors)


_contraction.register_autograd(_adjoint_of_bound, setup_context=_remember_bound)


@torch.library.custom_op("redheart::kalman", mutates_args=())
def _filter(
    given: Sequence[torch.Tensor], mask: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`given`: mean, variance, F, Q, then H, z and precision of each step and of the last; `keep`: what a backward pass needs."""
    out = _outputs(given, mask, keep)
    native.call("kalman", given[0].dtype, *given, mask, *_counts(given, mask), *out)
    return out


def _outputs(given: Sequence[torch.Tensor], mask: torch.Tensor, keep: bool) -> Any:
    """Mean, covariance, and room for the moments behind every step, texts in groups of 64 bytes side by side."""
    mean = given[0]
    (batch, steps), size, lanes = mask.shape, mean.shape[-1], 64 // mean.element_size()
    moments = mean.new_empty((batch + lanes - 1) // lanes if keep else 0, steps + 1, size + size * size, lanes)
    return torch.empty_like(mean), mean.new_empty(batch, size, size), moments


def _counts(given: Sequence[torch.Tensor], mask: torch.Tensor) -> tuple[int, ...]:
    return (*mask.shape, given[0].shape[-1], given[4].shape[0], given[7].shape[0])


@torch.library.custom_op("redheart::kalman_backward", mutates_args=())
def _filter_backward(
    grads: Sequence[torch.Tensor], given: Sequence[torch.Tensor], mask: torch.Tensor, moments: torch.Tensor
) -> list[torch.Tensor]:
    out = [torch.empty_like(x) for x in given]
    but_q = (*given[:3], *given[4:])
    native.call("kalman_backward", given[0].dtype, *grads, *but_q, mask, moments, *_counts(given, mask), *out)
    return out


_filter.register_fake(_outputs)


@_filter_backward.register_fake
def _(grads: Any, given: Sequence[torch.Tensor], *_: Any) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in given]


def _remember_steps(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    given, mask, _ = inputs
    ctx.save_for_backward(*given, mask, output[2])


def _adjoint_of_steps(ctx: Any, mean: torch.Tensor | None, covariance: torch.Tensor | None, _: Any) -> Any:
    *given, mask, moments = ctx.saved_tensors  # asked for once: a recomputed pass gives them once
    if mean is None and covariance is None:
        return [None] * len(given), None, None
    first, size = given[0], given[0].shape[-1]
    mean = torch.zeros_like(first) if mean is None else mean
    covariance = first.new_zeros(first.shape[0], size, size) if covariance is None else covariance
    return _filter_backward([mean.contiguous(), covariance.contiguous()], given, mask, moments), None, None


_filter.register_autograd(_adjoint_of_steps, setup_context=_remember_steps)
