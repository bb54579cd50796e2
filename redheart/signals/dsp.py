"""Two recursive filters as layers: an envelope follower (attack and release) and a damped oscillator (one complex pole).

Signals are x [..., T], time last, in frames of 1 / `frame_rate_hz` seconds; time constants are in seconds and greater than
zero, frequencies in Hz (any real number: they alias at the frame rate). Both filters start from rest. A time constant τ
is the time in which a state falls to 1/e: the factor per frame is exp(-1 / (τ · rate)), in (0, 1) for every τ > 0, so
that both are stable whatever a network learns for τ. Parameters broadcast to the leading shape of x, a Python number
included; gradients flow to the signal and to every parameter. float64 stays float64; everything else is computed in, and
returned as, float32. `envelope` and `oscillator` look at what they are given and refuse what is not finite, and time constants that
are not above zero, by RedHeartError; `follow` and `ring` are the same without a look, so that nothing waits for a GPU. `bank` is both for
every signal of a batch of texts (the network's): on a CPU one compiled pass over the frames (native.py), forward and backward.

Source: Zölzer (ed., 2011), "DAFX: Digital Audio Effects", 2nd ed., chapter 4 (the peak follower with attack and release)
and chapter 2 (the two-pole resonator, of which the oscillator is the real part of the complex one-pole form).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from redheart.finite import check_finite
from redheart.schema import RedHeartError
from redheart.signals import native

Parameter = torch.Tensor | float


def envelope(x: torch.Tensor, attack_s: Parameter, release_s: Parameter, frame_rate_hz: float) -> torch.Tensor:
    """The envelope of x [..., T] -> [..., T]: `follow`, where the formula stands, of values that are looked at first.

    RedHeartError that names what is not finite or no time constant (seconds, above zero); ValueError for shapes that do not broadcast.
    """
    _check(x, {"frame_rate_hz": frame_rate_hz, "attack_s": attack_s, "release_s": release_s})
    return follow(x, attack_s, release_s, frame_rate_hz)


def oscillator(x: torch.Tensor, frequency_hz: Parameter, decay_s: Parameter, frame_rate_hz: float) -> torch.Tensor:
    """What a damped oscillator makes of x [..., T] -> [..., T]: `ring`, where the formula stands, of values that are looked at first.

    RedHeartError that names what is not finite or no decay (seconds, above zero); ValueError for shapes that do not broadcast.
    """
    check_finite({"frequency_hz": torch.as_tensor(frequency_hz)})
    _check(x, {"frame_rate_hz": frame_rate_hz, "decay_s": decay_s})
    return ring(x, frequency_hz, decay_s, frame_rate_hz)


def _check(x: torch.Tensor, positive: Mapping[str, Parameter]) -> None:
    values = {name: torch.as_tensor(value) for name, value in positive.items()}
    check_finite({"x": x, **values})
    for name, value in values.items():
        if not bool((value > 0).all()):
            raise RedHeartError(f"{name} must be above zero: the smallest is {value.min().item():g}")


def follow(x: torch.Tensor, attack_s: Parameter, release_s: Parameter, frame_rate_hz: float) -> torch.Tensor:
    """The envelope of a signal, which rises with time constant `attack_s` and falls with `release_s`.

    e_t = α e_{t-1} + (1 - α) |x_t|, e_{-1} = 0, α = exp(-1 / (τ · rate)), τ = attack_s where |x_t| > e_{t-1}, else release_s.

    x [..., T] -> [..., T], in [0, max |x|]; attack_s and release_s broadcast to [...]. ValueError where they do not.

    Cost: the choice of τ makes the recursion nonlinear, so it runs frame by frame: three elementwise kernels over [...]
    per frame forward and one backward, all else over [..., T] at once. It is bound by the launches: about 3 T of them
    forward, T backward. Kept for the backward pass: |x|, e and one byte, each [..., T]. No second derivatives.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    lead = x.shape[:-1]
    gains = [  # 1 - α, not α: beside 1 a long time constant has no digits left in float32
        -torch.expm1(-1.0 / (_parameter(tau, x, dtype, lead, name) * frame_rate_hz)).expand(lead)
        for name, tau in (("attack_s", attack_s), ("release_s", release_s))
    ]
    return _Envelope.apply(x.to(dtype).abs().movedim(-1, 0), *gains).movedim(0, -1)


def ring(x: torch.Tensor, frequency_hz: Parameter, decay_s: Parameter, frame_rate_hz: float) -> torch.Tensor:
    """The response of a damped oscillator at rest that x pushes: Re s_t, s_t = ρ e^{iω} s_{t-1} + x_t.

    ρ = exp(-1 / (decay_s · rate)), ω = 2π frequency_hz / rate. x [..., T] -> [..., T]; frequency_hz and decay_s broadcast
    to [...] (ValueError where they do not); |output| ≤ max |x| / (1 - ρ).

    The recursion is linear, so there is no loop: a causal convolution with the impulse response ρ^k cos(ωk), k < T, by
    zero-padded real FFTs, O(T log T) per series; the response is made and transformed in the parameters' own shape. All
    of it runs in float64, whatever comes in: in float32 the phase ωk alone is wrong by 1e-4 at k = 512, and a transform
    leaks 1e-6 of a strong input into a sharp resonance elsewhere.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    frames, lead = x.shape[-1], x.shape[:-1]
    frequency, decay = (
        _parameter(value, x, torch.float64, lead, name)[..., None]
        for name, value in (("frequency_hz", frequency_hz), ("decay_s", decay_s))
    )
    k = torch.arange(frames, dtype=torch.float64, device=x.device)
    turns = frequency / frame_rate_hz * k
    turns = turns - turns.detach().round()
    response = torch.exp(-k / (decay * frame_rate_hz)) * torch.cos(2 * math.pi * turns)
    size = 1 << max(2 * frames - 2, 0).bit_length()  # a power of two ≥ 2 T - 1: nothing wraps around
    spectrum = torch.fft.rfft(x.double(), n=size) * torch.fft.rfft(response, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :frames].to(dtype)


CONTROLS = ("attack_s", "release_s", "frequency_hz", "decay_s", "swell", "swing")


def bank(
    drive: torch.Tensor,
    mask: torch.Tensor,
    controls: torch.Tensor,
    bounds: Mapping[str, tuple[float, float]],
    frame_rate_hz: float,
) -> torch.Tensor:
    """What the controls of each text make of its drives: drive [B, T, C], mask [B, T], controls [B, 6, C] -> signals [B, T, C].

    swell · follow(x) + swing · (1 - ρ) · ring(x) of x = tanh(drive), 0 where the mask is False, as the result is: 1 - ρ, so that a
    steady drive stays of order one. Controls stand in the order of CONTROLS; the first four are logits of where they lie between
    their `bounds` (low, high), evenly over the logarithm. drive and controls: both fp32, or both fp64. All in fp64 on a CPU.
    """
    assert tuple(bounds) == CONTROLS[:4]
    assert controls.shape == (drive.shape[0], len(CONTROLS), drive.shape[-1])
    if native.kernels_serve(drive, controls):
        flat = [edge for pair in bounds.values() for edge in pair]
        return _bank(drive.contiguous(), mask.contiguous(), controls.contiguous(), flat, frame_rate_hz)
    *parameters, swell, swing = controls.unbind(1)
    attack, release, frequency, decay = (
        low * (high / low) ** torch.sigmoid(raw) for (low, high), raw in zip(bounds.values(), parameters, strict=True)
    )
    x = (torch.tanh(drive) * mask[..., None]).transpose(1, 2)
    loss = -torch.expm1(-1 / (decay * frame_rate_hz))
    swells, swings = follow(x, attack, release, frame_rate_hz), ring(x, frequency, decay, frame_rate_hz)
    signals = swell[..., None] * swells + (swing * loss)[..., None] * swings
    return signals.transpose(1, 2) * mask[..., None]  # filters ring on behind the last token


@torch.library.custom_op("redheart::bank", mutates_args=())
def _bank(
    drive: torch.Tensor, mask: torch.Tensor, controls: torch.Tensor, bounds: Sequence[float], frame_rate_hz: float
) -> torch.Tensor:
    out = torch.empty_like(drive)
    edges = (ctypes.c_double * len(bounds))(*bounds)
    native.call("bank", drive.dtype, drive, mask, controls, edges, frame_rate_hz, *drive.shape, out)
    return out


@torch.library.custom_op("redheart::bank_backward", mutates_args=())
def _bank_backward(
    grad: torch.Tensor,
    drive: torch.Tensor,
    mask: torch.Tensor,
    controls: torch.Tensor,
    bounds: Sequence[float],
    frame_rate_hz: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(drive), torch.empty_like(controls)
    edges = (ctypes.c_double * len(bounds))(*bounds)
    native.call("bank_backward", drive.dtype, grad, drive, mask, controls, edges, frame_rate_hz, *drive.shape, *out)
    return out


@_bank.register_fake
def _(drive: torch.Tensor, mask: torch.Tensor, controls: torch.Tensor, bounds: Any, frame_rate_hz: float) -> Any:
    return torch.empty_like(drive)


@_bank_backward.register_fake
def _(grad: torch.Tensor, drive: torch.Tensor, mask: torch.Tensor, controls: torch.Tensor, *_: Any) -> Any:
    return torch.empty_like(drive), torch.empty_like(controls)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.bounds, ctx.rate = inputs
    ctx.save_for_backward(*tensors)


def _adjoint(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    drive, controls = _bank_backward(grad.contiguous(), *ctx.saved_tensors, ctx.bounds, ctx.rate)
    return drive, None, controls, None, None


_bank.register_autograd(_adjoint, setup_context=_remember)


def _parameter(value: Parameter, x: torch.Tensor, dtype: torch.dtype, lead: torch.Size, name: str) -> torch.Tensor:
    """`value` as a tensor of its own shape, which broadcasts to `lead`."""
    if not isinstance(value, torch.Tensor):
        return torch.full((), value, dtype=dtype, device=x.device)
    try:
        fits = torch.broadcast_shapes(value.shape, lead) == lead
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} of shape {list(value.shape)} does not broadcast to {list(lead)}, x without its time axis"
        )
    return value.to(dtype)


class _Envelope(torch.autograd.Function):
    """level [T, ...] ≥ 0, gains 1 - α of attack and of release [...] -> envelope [T, ...]."""

    @staticmethod
    def forward(ctx: Any, level: torch.Tensor, attack: torch.Tensor, release: torch.Tensor) -> torch.Tensor:
        level, attack, release = level.contiguous(), attack.contiguous(), release.contiguous()
        follower = torch.empty_like(level)
        rising = torch.empty(level.shape, dtype=torch.bool, device=level.device)
        state = torch.zeros_like(attack)
        for now, up, out in zip(level.unbind(), rising.unbind(), follower.unbind(), strict=True):
            torch.gt(now, state, out=up)
            torch.lerp(state, now, torch.where(up, attack, release), out=out)
            state = out
        ctx.save_for_backward(level, attack, release, rising, follower)
        return follower

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        level, attack, release, rising, follower = ctx.saved_tensors
        gain = torch.where(rising, attack, release)
        total = grad.clone(memory_format=torch.contiguous_format)  # G_t = g_t + α_{t+1} G_{t+1}
        rows, factors = total.unbind(), (1 - gain).unbind()
        for t in range(len(rows) - 2, -1, -1):
            rows[t].addcmul_(factors[t + 1], rows[t + 1])
        before = torch.cat([torch.zeros_like(follower[:1]), follower[:-1]])
        grad_gain = total * (level - before)
        return total * gain, torch.where(rising, grad_gain, 0.0).sum(0), torch.where(rising, 0.0, grad_gain).sum(0)
