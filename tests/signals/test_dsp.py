"""The recursive filters against scipy's, against a plain recursion, and against finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from redheart.schema import RedHeartError
from redheart.signals.dsp import envelope, oscillator

RATE = 50.0


def signal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(low, high, *shape, seed=0, dtype=torch.float64):
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (low * (high / low) ** u).to(dtype)  # evenly over the logarithm


def resonator(x, frequency, decay, rate=RATE):
    """scipy's answer for one series, in float64."""
    rho, omega = math.exp(-1 / (decay * rate)), 2 * math.pi * frequency / rate
    return lfilter([1, -rho * math.cos(omega)], [1, -2 * rho * math.cos(omega), rho**2], x)


def follower(x, attack, release, rate=RATE):
    e, out = 0.0, []
    for level in np.abs(x):
        alpha = math.exp(-1 / ((attack if level > e else release) * rate))
        e = alpha * e + (1 - alpha) * level
        out.append(e)
    return np.array(out)


def inputs(frames, dtype):
    """One of each kind, [4, T]: an impulse, a late impulse, a step, noise."""
    x = signal(4, frames, dtype=dtype)
    x[:3] = 0
    x[0, 0] = x[1, frames // 3] = 1
    x[2] = 1
    return x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("frames", [1, 2, 37, 512])
def test_oscillator_is_scipys_filter(frames, dtype, tolerance):
    x = inputs(frames, dtype)
    frequency, decay = (
        uniform(0.01, 200.0, 40, 1, seed=1, dtype=dtype),
        uniform(0.01, 1000.0, 40, 1, seed=2, dtype=dtype),
    )
    frequency[0], frequency[1], frequency[2] = 0.0, RATE / 2, -3.0
    y = oscillator(x.expand(40, 4, frames), frequency, decay, RATE)
    assert y.dtype == dtype
    for i in range(40):
        for j in range(4):
            expected = resonator(x[j].double().numpy(), frequency[i].item(), decay[i].item())
            scale = max(np.abs(expected).max(), 1e-3)
            assert np.abs(y[i, j].double().numpy() - expected).max() <= tolerance * scale, (i, j)


def test_a_sharp_resonance_far_from_a_strong_input_stays_exact_in_fp32():
    x = torch.full((512,), 1000.0)
    expected = resonator(x.double().numpy(), 24.9, 1000.0)
    assert np.abs(oscillator(x, 24.9, 1000.0, RATE).numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("tau", [0.02, 0.3, 20.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_envelope_of_equal_times_is_scipys_filter(tau, dtype, tolerance):
    x = signal(3, 400, dtype=dtype)
    alpha = math.exp(-1 / (tau * RATE))
    expected = lfilter([1 - alpha], [1, -alpha], x.double().abs().numpy())
    y = envelope(x, tau, torch.tensor(tau), RATE) if dtype == torch.float32 else envelope(x, tau, tau, RATE)
    assert y.dtype == dtype
    assert np.abs(y.double().numpy() - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_envelope_is_the_plain_recursion(dtype, tolerance):
    x = signal(20, 300, dtype=dtype)
    attack, release = uniform(0.001, 5.0, 20, seed=1, dtype=dtype), uniform(0.001, 5.0, 20, seed=2, dtype=dtype)
    y = envelope(x, attack, release, RATE).double().numpy()
    for i in range(20):
        expected = follower(x[i].double().numpy(), attack[i].item(), release[i].item())
        assert np.abs(y[i] - expected).max() <= tolerance * np.abs(expected).max(), i


def test_envelope_attacks_and_releases():
    x = torch.cat([torch.ones(50), torch.zeros(50)]).double()
    y = envelope(x, 0.1, 0.5, RATE)  # after one time constant: 1 - 1/e of the way up, 1/e of the way down
    assert y[4].item() == pytest.approx(1 - math.exp(-1), abs=1e-12)
    assert (y[49 + 25] / y[49]).item() == pytest.approx(math.exp(-1), abs=1e-12)


DECAYS = [1e-3, 1e-2, 1.0, 1e2, 1e4]


@pytest.mark.parametrize("rate", [1.0, 50.0, 400.0])
@pytest.mark.parametrize("decay", DECAYS)
def test_the_pole_is_inside_the_circle(decay, rate):
    impulse = torch.zeros(512)
    impulse[0] = 1
    y = oscillator(impulse, 0.0, torch.tensor(decay), rate)  # at 0 Hz it is ρ^k itself
    assert y[1] < 1
    expected = torch.exp(-torch.arange(512.0).double() / (torch.tensor(decay).double() * rate))
    assert (y - expected).abs().max() <= 1.2e-7
    assert envelope(torch.ones(1), torch.tensor(decay), torch.tensor(decay), rate) > 0  # 1 - α


@pytest.mark.parametrize("decay", DECAYS)
def test_bounded_input_gives_bounded_output(decay):
    frequency, frames = 3.0, 40_000
    k = torch.arange(frames)
    x = torch.cos(2 * math.pi * frequency / RATE * k.double()).sign().float()  # at the resonance: the worst there is
    rho = math.exp(-1 / (decay * RATE))
    y = oscillator(x, frequency, torch.tensor(decay), RATE)
    bound = (1 - rho**frames) / (1 - rho)  # Σ ρ^k
    assert y.abs().max() <= bound * (1 + 1e-6)
    assert y.abs().max() >= 0.3 * bound
    e = envelope(x[:4000], torch.tensor(decay), torch.tensor(1e4), RATE)
    assert bool((e >= 0).all() and (e <= 1).all())


def leaves(*tensors):
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def test_gradients_of_the_oscillator():
    args = leaves(signal(2, 3, 9), uniform(0.5, 20, 3, seed=1), uniform(0.02, 3, 2, 1, seed=2))
    assert torch.autograd.gradcheck(lambda x, f, d: oscillator(x, f, d, RATE), args)


def test_gradients_of_the_envelope():
    x, attack, release = leaves(signal(2, 3, 12), uniform(0.01, 0.1, 3, seed=1), uniform(0.02, 0.5, 2, 1, seed=2))
    e = envelope(x, attack, release, RATE)
    before = torch.cat([torch.zeros_like(e[..., :1]), e[..., :-1]], -1)
    assert (x.abs() - before).abs().min() > 1e-4  # no step of gradcheck crosses a tie
    assert 0.2 < (x.abs() > before).double().mean() < 0.8  # both branches are taken
    assert torch.autograd.gradcheck(lambda *a: envelope(*a, RATE), (x, attack, release))


@pytest.mark.parametrize("function", [envelope, oscillator])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_flow_in_low_precision(function, dtype):
    double = leaves(
        signal(4, 512, dtype=dtype).double(), *(torch.full((4,), v, dtype=dtype).double() for v in (2, 0.5))
    )
    args = tuple(a.detach().to(dtype).requires_grad_() for a in double)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*args, RATE)
    assert y.dtype == torch.float32
    expected = function(*double, RATE)
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    y.square().sum().backward()
    expected.square().sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, e in zip(args, double, strict=True):
        assert a.grad.dtype == dtype
        assert (a.grad - e.grad).abs().max() <= tolerance * e.grad.abs().max()


@pytest.mark.parametrize("function", [envelope, oscillator])
def test_parameters_broadcast(function):
    x = signal(2, 3, 4, 30)
    first, second = uniform(0.1, 2, 3, 1, seed=1), uniform(0.1, 2, 4, seed=2)
    y = function(x, first, second, RATE)
    assert y.shape == x.shape
    for i, j, k in np.ndindex(2, 3, 4):
        alone = function(x[i, j, k], first[j, 0].item(), second[k].item(), RATE)
        assert torch.allclose(y[i, j, k], alone, rtol=0, atol=1e-12)
    swapped = function(x.transpose(0, 2), first, second[:2], RATE)  # not contiguous
    assert torch.allclose(swapped[0], function(x[:, :, 0].transpose(0, 1), first, second[:2], RATE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [envelope, oscillator])
@pytest.mark.parametrize("shape", [(3,), (5, 2), (1, 1, 2)])
def test_shapes_that_do_not_broadcast_are_refused(function, shape):
    x, bad = signal(5, 2, 8), torch.ones(shape)
    if shape != (5, 2):
        with pytest.raises(ValueError, match="does not broadcast"):
            function(x, bad, 1.0, RATE)
        with pytest.raises(ValueError, match="does not broadcast"):
            function(x, 1.0, bad, RATE)
    else:
        assert function(x, bad, bad, RATE).shape == x.shape


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_name(bad):
    x = signal(2, 9)
    broken = x.clone()
    broken[1, 4] = bad
    for function, name in ((envelope, "attack_s"), (oscillator, "frequency_hz")):
        with pytest.raises(RedHeartError, match=r"x: 1 of 18 values are not finite .*number 13"):
            function(broken, 1.0, 1.0, RATE)
        with pytest.raises(RedHeartError, match=f"{name}: 1 of 2"):
            function(x, torch.tensor([1.0, bad]), 1.0, RATE)
        with pytest.raises(RedHeartError, match="frame_rate_hz"):
            function(x, 1.0, 1.0, bad)


@pytest.mark.parametrize("tau", [0.0, -0.1])
def test_a_time_constant_that_is_none_is_refused_by_name(tau):
    for function, name in ((envelope, "release_s"), (oscillator, "decay_s")):
        with pytest.raises(RedHeartError, match=f"{name} must be above zero"):
            function(signal(2, 9), 1.0, torch.tensor([1.0, tau]), RATE)
