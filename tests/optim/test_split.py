"""Weights split into a bfloat16 and a byte, and how near the 8-bit states stay to fp32's."""

import pytest
import torch

from redheart.optim import CPUAdamW8bit
from redheart.optim.state import BLOCK, REMAINDER
from redheart.schema import RedHeartError

LEFT = 8  # bits that a pair of a bfloat16 and a byte lacks of fp32's


def split(values: torch.Tensor) -> tuple[CPUAdamW8bit, torch.nn.Parameter]:
    p = torch.nn.Parameter(torch.zeros(values.shape, dtype=torch.bfloat16))
    optimizer = CPUAdamW8bit([p], master="split")
    optimizer.set_master_weights(p, values)
    return optimizer, p


def test_every_weight_of_16_significant_bits_survives_beside_its_nearest_bfloat16():
    """All 2^24 of them: every exponent, subnormals, both zeros, ties, carries; those beyond bfloat16's range are refused."""
    patterns = torch.arange(2**24, dtype=torch.int64)
    patterns = torch.where(patterns < 2**23, patterns, patterns - 2**24) << LEFT
    every = patterns.to(torch.int32).view(torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    every = every[every.abs() <= largest]
    assert every.numel() > 0.99 * 2**24
    optimizer, p = split(every)
    assert torch.equal(optimizer.master_weights(p).view(torch.int32), every.view(torch.int32))
    high = p.detach().double()
    assert torch.equal((high - every).abs(), (every.bfloat16().double() - every).abs())  # as near as torch's rounding
    assert optimizer.state[p][REMAINDER].unique().numel() == 256
    for beyond in (float("nan"), float("inf"), -float("inf"), 3.4e38):
        with pytest.raises(RedHeartError, match="not finite, or beyond"):
            optimizer.set_master_weights(p, torch.cat([every[:-1], torch.tensor([beyond])]))


def test_fp32_weights_are_rounded_to_the_nearest_pair():
    w = torch.randn(100_001, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-30, 30, 100_001)
    optimizer, p = split(w)
    kept = optimizer.master_weights(p)
    assert ((kept - w) / w).abs().max() <= 2.0**-16
    assert torch.equal((p.detach() - kept).abs(), (kept.bfloat16() - kept).abs())


def test_a_part_of_the_weights_can_be_set():
    n = 3 * BLOCK + 9
    w = torch.randn(n, generator=torch.Generator().manual_seed(0))
    optimizer, p = split(torch.zeros(n))
    for start, stop in ((0, 100), (100, 3 * BLOCK + 2), (3 * BLOCK + 2, n)):
        optimizer.set_master_weights(p, w[start:stop], start)
    whole, q = split(w)
    assert torch.equal(optimizer.master_weights(p), whole.master_weights(q))
    with pytest.raises(RedHeartError, match="at most 5 float32"):
        optimizer.set_master_weights(p, w[:6], n - 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_fp32_weights_but_for_the_rounding(dtype: torch.dtype):
    """Six orders of weights, one block and a bit; the gradients come as either type."""
    n = 5 * BLOCK + 77
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(n, generator=generator) * 10 ** torch.linspace(-3, 3, n)
    optimizer, p = split(start)
    q = torch.nn.Parameter(optimizer.master_weights(p))
    reference = CPUAdamW8bit([q], lr=1e-3)
    optimizer.param_groups[0]["lr"] = 1e-3
    for _ in range(20):
        g = torch.randn(n, generator=generator).to(dtype)
        p.grad, q.grad = g.to(torch.bfloat16), g.float()
        if dtype == torch.float32:
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(optimizer.moments(p), reference.moments(q), strict=True))
    size = torch.maximum(start.abs(), q.detach().abs()).clamp(min=0.02)  # on the way
    unit = 2.0 ** (torch.frexp(size).exponent - 1 - 15)
    assert ((optimizer.master_weights(p) - q.detach()).abs() / unit).max() < 8
    assert ((optimizer.master_weights(p) - q.detach()) / unit).mean().abs() < 0.2


def test_updates_far_below_the_last_place_arrive_on_average():
    """Of 1, 2^-15 is the last place: steps of 2^-19 would all be lost to the nearest."""
    n = 64 * BLOCK
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    optimizer = CPUAdamW8bit([p], lr=2.0**-19, weight_decay=0.0, master="split")
    for _ in range(64):
        p.grad = torch.ones(n, dtype=torch.bfloat16)
        optimizer.step()
    moved = optimizer.master_weights(p) - 1
    assert moved.mean().item() == pytest.approx(-64 * 2.0**-19, rel=0.02)
    assert (
        moved + 64 * 2.0**-19
    ).abs().max() <= 2 * 2.0**-15  # evenly in time: no weight is far from where it should be


def test_a_gradient_counts_times_the_scale():
    p, q = (torch.nn.Parameter(torch.ones(1000)) for _ in range(2))
    a, b = CPUAdamW8bit([p], lr=1e-2), CPUAdamW8bit([q], lr=1e-2)
    a.gradient_scale = 0.25
    for seed in range(5):
        g = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        p.grad, q.grad = g, g * 0.25
        a.step()
        b.step()
    assert torch.equal(p, q)


def test_a_state_dict_keeps_the_remainders_and_goes_on_bit_for_bit():
    n = 3 * BLOCK + 9
    generator = torch.Generator().manual_seed(2)
    optimizer, p = split(torch.randn(n, generator=generator))
    gradients = torch.randn(8, n, generator=generator).bfloat16()
    for g in gradients[:4]:
        p.grad = g
        optimizer.step()
    q = torch.nn.Parameter(p.detach().clone())
    other = CPUAdamW8bit([q], master="split")
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.master_weights(q), optimizer.master_weights(p))
    for g in gradients[4:]:
        p.grad = q.grad = g
        optimizer.step()
        other.step()
    assert torch.equal(other.master_weights(q), optimizer.master_weights(p))
    fp32 = CPUAdamW8bit([q])
    with pytest.raises(RedHeartError, match="float32 tensors"):
        fp32.step()


def quadratic(optimizer_of, decades: float, steps: int = 600, n: int = 4096) -> float:
    """Mean squared error where curvatures of `decades` lie side by side in every block, with noise of their own size."""
    generator = torch.Generator().manual_seed(3)
    curvature = 10 ** (-decades * torch.rand(n, generator=generator))
    x = torch.nn.Parameter(torch.randn(n, generator=generator))
    optimizer = optimizer_of([x])
    for _ in range(steps):
        x.grad = curvature * (x.detach() + torch.randn(n, generator=generator))
        optimizer.step()
    return x.detach().square().mean().item()


@pytest.mark.parametrize("decades", [4, 8])
def test_eight_decades_of_curvature_in_a_block_are_learned_as_by_fp32(decades: int):
    ours = quadratic(lambda p: CPUAdamW8bit(p, lr=1e-2, weight_decay=0.0), decades)
    assert ours <= 1.1 * quadratic(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0), decades)


@pytest.mark.parametrize("rows", [512, 32])
def test_the_path_of_a_small_network_is_fp32s(rows: int):
    """How far apart 50 steps end, of the way that fp32 states went: 0.066 with one scale for a block's first moments."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(512, 64, generator=generator), torch.randn(512, 8, generator=generator)
    batches = [torch.randint(0, 512, (rows,), generator=generator) for _ in range(50)]
    ends = []
    for optimizer_of in (torch.optim.AdamW, CPUAdamW8bit):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = torch.nn.Sequential(
                torch.nn.Linear(64, 256),
                torch.nn.Tanh(),
                torch.nn.Linear(256, 64),
                torch.nn.Tanh(),
                torch.nn.Linear(64, 8),
            )
        start = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
        optimizer = optimizer_of(network.parameters(), lr=1e-3, weight_decay=0.0)
        for batch in batches:
            optimizer.zero_grad()
            (network(x[batch]) - y[batch]).square().mean().backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    fp32, ours = ends
    assert (ours - fp32).norm() <= 0.035 * (fp32 - start).norm()
