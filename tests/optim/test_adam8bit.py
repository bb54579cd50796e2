"""The 8-bit optimizer: near fp32 AdamW, right on average, the same on any number of threads, bitwise after a resume."""

import copy
from itertools import combinations

import pytest
import torch

from redheart.optim import CPUAdamW8bit, adam8bit
from redheart.optim.adam8bit import kernel
from redheart.optim.state import BLOCK, MASTERS, STATES
from redheart.schema import RedHeartError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameter(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values.clone())


def run(optimizer, p, gradients) -> None:
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_the_first_step_is_adamws(n: int):
    start, g = noise(n), noise(n, seed=1)
    p, q = parameter(start), parameter(start)
    run(CPUAdamW8bit([p], lr=1e-3), p, [g])
    run(torch.optim.AdamW([q], lr=1e-3, weight_decay=0.01), q, [g])
    assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)


def test_moments_keep_their_relative_error_and_their_mean():
    n = 256 * 400
    magnitude = 10 ** (-3 * torch.rand(n, generator=torch.Generator().manual_seed(3)))  # three decades in every block
    g = magnitude * noise(n).sign()
    p = parameter(torch.zeros(n))
    optimizer = CPUAdamW8bit([p])
    run(optimizer, p, [g])
    m, v = optimizer.moments(p)
    error_m, error_r = m / (0.1 * g) - 1, (v / 0.001).sqrt() / g.abs() - 1
    for low, high in ((1e-1, 1), (1e-2, 1e-1), (1.1e-3, 1e-2)):
        rows = (magnitude >= low) & (magnitude < high)
        assert error_r[rows].abs().max() <= 1 / 16 + 1e-3  # ten octaves leave four bits of mantissa
        assert error_m[rows].abs().max() <= 1 / 16 + 1 / 64  # and one step of the ratio, which is 3.2 of at most 4
        assert abs(error_m[rows].mean()) < 2e-3  # stochastic rounding has no bias
        assert abs(error_r[rows].mean()) < 1e-3


def test_a_slow_decay_is_not_frozen_by_rounding():
    n = 4096
    p = parameter(torch.zeros(n))
    optimizer = CPUAdamW8bit([p], lr=0.0)
    run(optimizer, p, [torch.ones(n)] + [torch.zeros(n)] * 400)
    _, v = optimizer.moments(p)
    assert v.sqrt().mean().item() == pytest.approx((0.001 * 0.999**400) ** 0.5, rel=0.02)


@pytest.mark.parametrize("gradient", [0.49, 0.7, 1.01, 1.3, 1.9])
@pytest.mark.parametrize("n", [1, BLOCK])
def test_a_slow_growth_is_not_cut_off_at_a_power_of_two(gradient: float, n: int):
    """By less than a code a step; in a block whose every second element gets no gradient the codes are coarsest."""
    g = torch.full((n,), gradient)
    g[1::2] = 0.0
    ours, theirs = parameter(torch.zeros(n)), parameter(torch.zeros(n))
    optimizer = CPUAdamW8bit([ours], lr=1e-3, weight_decay=0.0)
    oracle = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    for _ in range(1500):
        run(optimizer, ours, [g])
        run(oracle, theirs, [g])
    m, v = optimizer.moments(ours)
    kept = oracle.state[theirs]
    assert m[::2].mean().item() == pytest.approx(kept["exp_avg"][0].item(), rel=0.05)
    assert v[::2].mean().item() == pytest.approx(kept["exp_avg_sq"][0].item(), rel=0.1)
    assert ours[::2].mean().item() == pytest.approx(theirs[0].item(), rel=0.04)


@pytest.mark.parametrize("live", [1, BLOCK // 2, BLOCK])
def test_noisy_gradients_step_as_far_as_adamws_whatever_their_scale(live: int):
    ratios = []
    for scale in (0.3, 0.55, 0.7, 0.9, 1.1, 1.3):
        ours, theirs = parameter(torch.zeros(4 * BLOCK)), parameter(torch.zeros(4 * BLOCK))
        optimizer = CPUAdamW8bit([ours], lr=1e-3, weight_decay=0.0)
        oracle = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
        mask = (torch.arange(4 * BLOCK) % BLOCK < live) * scale
        walked = torch.zeros(2)
        for i in range(600):
            g = noise(4 * BLOCK, seed=i) * mask
            before = ours.detach().clone(), theirs.detach().clone()
            run(optimizer, ours, [g])
            run(oracle, theirs, [g])
            walked += torch.stack([(ours - before[0]).abs().sum(), (theirs - before[1]).abs().sum()]).detach()
        ratios.append((walked[0] / walked[1]).item())
    assert min(ratios) > 0.9
    assert max(ratios) < 1.1


def test_threads_do_not_change_a_bit_and_neither_does_a_resume():
    n = 40_000  # enough for the kernel to share blocks out
    gradients = [noise(n, seed=s) for s in range(12)]
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        p = parameter(noise(n, seed=99))
        optimizer = CPUAdamW8bit([p], lr=1e-2, seed=5)
        run(optimizer, p, gradients)
        torch.set_num_threads(before)
        results.append(p.detach().clone())
    assert torch.equal(*results)
    p = parameter(noise(n, seed=99))
    first = CPUAdamW8bit([p], lr=1e-2, seed=5)
    run(first, p, gradients[:5])
    q = parameter(p.detach())
    second = CPUAdamW8bit([q], lr=1e-2, seed=5)
    second.load_state_dict(first.state_dict())
    assert second.state[q]["exp_avg_8bit"].dtype == torch.int8
    run(second, q, gradients[5:])
    assert torch.equal(q.detach(), results[0])
    other = parameter(noise(n, seed=99))
    run(CPUAdamW8bit([other], lr=1e-2, seed=6), other, gradients)
    assert not torch.equal(other.detach(), results[0])


def test_any_seed_of_a_run_is_one_of_the_noise():
    """The largest that training.seed may be, too, and one as a clock gives them; what they draw differs."""
    ends = []
    for seed in (0, 1764350000000000000, 2**63 - 1):
        p = parameter(noise(600))
        run(CPUAdamW8bit([p], lr=1e-2, seed=seed), p, [noise(600, seed=s) for s in range(3)])
        ends.append(p.detach())
    assert not any(torch.equal(a, b) for a, b in combinations(ends, 2))


def test_a_gradient_that_is_not_finite_changes_nothing():
    p, q = parameter(noise(600)), parameter(noise(600, seed=1))
    optimizer = CPUAdamW8bit([p, q])
    run(optimizer, p, [noise(600, seed=2)])
    states = {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
    before = p.detach().clone()
    for bad in (float("nan"), float("inf"), float("-inf")):
        p.grad, q.grad = noise(600, seed=3), noise(600, seed=4)
        q.grad[599] = bad
        with pytest.raises(FloatingPointError):
            optimizer.step()
        assert torch.equal(p, before)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in states.items())
        assert optimizer.state[p]["step"] == 1


def test_hard_blocks():
    """All zero; denormal; one huge outlier, nine decades above the others of its block: nothing explodes, nothing is lost."""
    n = 4 * BLOCK
    g = torch.zeros(n)
    g[BLOCK : 2 * BLOCK] = 1e-40
    g[2 * BLOCK : 3 * BLOCK] = 1e-3
    g[2 * BLOCK] = 1e6
    g[3 * BLOCK :] = noise(BLOCK)
    p = parameter(torch.zeros(n))
    optimizer = CPUAdamW8bit([p], lr=1e-3, weight_decay=0.0)
    run(optimizer, p, [g] * 30)
    assert p.isfinite().all()
    assert (p[:BLOCK] == 0).all()
    assert p.abs().max() < 30 * 1e-3 * 2.5
    m, v = optimizer.moments(p)
    outlier, others = m[2 * BLOCK].item(), m[2 * BLOCK + 1 : 3 * BLOCK]
    assert outlier == pytest.approx(1e6 * (1 - 0.9**30), rel=0.3)
    assert others.mean().item() == pytest.approx(1e-3 * (1 - 0.9**30), rel=0.05)
    assert (v[2 * BLOCK :] > 0).all()  # a second moment never rounds to zero


def test_gradients_without_a_square_in_fp32_are_none_alone_and_small_beside_others():
    """A step over a second moment of 0 would explode."""
    p, g = parameter(torch.zeros(2 * BLOCK)), torch.full((2 * BLOCK,), 1e-23)
    g[0] = 1e-10
    optimizer = CPUAdamW8bit([p], weight_decay=0.0)
    run(optimizer, p, [g] * 5)
    m, v = optimizer.moments(p)
    assert (v[:BLOCK] > 0).all()
    assert (m[BLOCK:] == 0).all()
    assert (v[BLOCK:] == 0).all()
    assert p[1:].abs().max() < 1e-15


@pytest.mark.parametrize("lr", [1e-3, 0.0])
def test_the_16_bit_copy_is_the_parameter_rounded(lr: float):
    p = parameter(noise(1000))
    copy = torch.zeros(1000, dtype=torch.bfloat16)
    optimizer = CPUAdamW8bit([p], lr=lr)
    p.grad = noise(1000, seed=1)
    optimizer.step(copies={p: copy})
    assert torch.equal(copy, p.detach().bfloat16())


def test_states_take_two_bytes_an_element():
    p = parameter(noise(1 << 16))
    optimizer = CPUAdamW8bit([p])
    run(optimizer, p, [noise(1 << 16)])
    size = sum(v.numel() * v.element_size() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
    assert size / p.numel() <= 2.05


def test_it_reaches_what_fp32_adamw_reaches_on_a_badly_conditioned_quadratic():
    n = 2048
    curvature = torch.logspace(-3, 1, n)
    ends = []
    for make in (
        lambda p: CPUAdamW8bit([p], lr=1e-2, weight_decay=0.0),
        lambda p: torch.optim.AdamW([p], lr=1e-2, weight_decay=0.0),
    ):
        p = parameter(noise(n, seed=7))
        optimizer, g = make(p), torch.Generator().manual_seed(0)
        for _ in range(600):
            p.grad = curvature * (p.detach() + 0.1 * torch.randn(n, generator=g))
            optimizer.step()
        ends.append(float((0.5 * curvature * p.detach().square()).sum()))
    assert ends[0] == pytest.approx(ends[1], rel=0.1)


def distance_walked(optimizer_of, start: torch.Tensor, gradient_at, steps: int = 200) -> torch.Tensor:
    p = parameter(start)
    optimizer = optimizer_of([p])
    for i in range(steps):
        p.grad = gradient_at(i)
        optimizer.step()
    return p.detach() - start


def test_sparse_gradients_move_parameters_as_far_as_fp32_states_do():
    """One element in fifty has a gradient, another one every step, as the rows of an embedding do."""
    n = 256 * 64

    def gradient(i: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(i)
        return torch.randn(n, generator=draw) * (torch.rand(n, generator=draw) < 0.02)

    start = noise(n)
    ours = distance_walked(lambda p: CPUAdamW8bit(p, lr=1e-3, weight_decay=0.0), start, gradient)
    fp32 = distance_walked(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0), start, gradient)
    assert (ours - fp32).norm() < 0.12 * fp32.norm()  # 0.074: rounding noise, element by element
    assert float(ours.norm()) == pytest.approx(float(fp32.norm()), rel=0.02)
    never = fp32 == 0
    assert never.any()
    assert torch.equal(ours == 0, never)  # an element that never had a gradient has not moved


def test_gradients_over_ten_decades_move_parameters_as_far_as_fp32_states_do():
    """From block to block the gradients' size covers ten decades, within a block two: Adam's step depends on neither."""
    n = 256 * 100
    size = 10 ** torch.linspace(-8, 2, n // 256).repeat_interleave(256)
    size *= 10 ** (-2 * torch.rand(n, generator=torch.Generator().manual_seed(5)))

    def gradient(i: int) -> torch.Tensor:
        return size * (1 + noise(n, seed=i))

    def settings(p):
        return {"params": p, "lr": 1e-3, "weight_decay": 0.0, "eps": 1e-20}

    start = torch.zeros(n)
    ours = distance_walked(lambda p: CPUAdamW8bit(**settings(p)), start, gradient)
    fp32 = distance_walked(lambda p: torch.optim.AdamW(**settings(p)), start, gradient)
    assert (ours - fp32).norm() < 0.1 * fp32.norm()  # 0.056: rounding noise, element by element
    by_block = ours.view(-1, 256).mean(1) / fp32.view(-1, 256).mean(1)
    assert (by_block - 1).abs().max() < 0.05  # no decade lags behind


def test_what_it_cannot_hold_is_refused():
    half = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    half.grad = torch.zeros_like(half)
    with pytest.raises(RedHeartError, match="float32 tensors in host memory"):
        CPUAdamW8bit([half]).step()
    turned = parameter(torch.zeros(4, 3))
    turned.grad = torch.zeros(3, 4).T
    with pytest.raises(RedHeartError, match="contiguous"):
        CPUAdamW8bit([turned]).step()
    with pytest.raises(RedHeartError, match="out of range"):
        CPUAdamW8bit([parameter(torch.zeros(2))], lr=-1)


def test_all_finite_looks_everywhere():
    x = torch.zeros(10001)
    assert kernel().all_finite(x.data_ptr(), 10001, False)
    for place in (0, 5000, 10000):
        y = x.clone()
        y[place] = float("nan")
        assert not kernel().all_finite(y.data_ptr(), 10001, False)
        z = y.bfloat16()
        assert not kernel().all_finite(z.data_ptr(), 10001, True)
        z[place] = 3e38
        assert kernel().all_finite(z.data_ptr(), 10001, True)


def states(optimizer: CPUAdamW8bit, p: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: optimizer.state[p][name].clone() for name in STATES}


@pytest.mark.parametrize("n", [256 * 7, 1000])
def test_moments_survive_codes_bit_for_bit(n: int):
    """set_moments(moments()) keeps every moment, whatever scale a block's history has given it, and the run goes on as before."""
    gradients = [noise(n, seed=s) * 10 ** (4 * noise(n, seed=100 + s)) for s in range(20)]
    p = parameter(noise(n))
    optimizer = CPUAdamW8bit([p], lr=1e-2, seed=3)
    run(optimizer, p, gradients[:10])
    m, v = optimizer.moments(p)
    assert (v > 0).all()
    q = parameter(p.detach())
    other = CPUAdamW8bit([q], lr=1e-2, seed=3)
    other.set_moments(q, m, v)
    other.state[q]["step"] = 10
    assert all(torch.equal(a, b) for a, b in zip(other.moments(q), (m, v), strict=True))
    first = states(other, q)
    other.set_moments(q, *other.moments(q))
    assert all(torch.equal(first[name], x) for name, x in states(other, q).items())
    run(optimizer, p, gradients[10:])
    run(other, q, gradients[10:])
    assert torch.equal(p, q)


def test_moments_are_coded_to_the_nearest_and_never_to_a_second_moment_of_zero():
    n = 5 * BLOCK
    p = parameter(torch.zeros(n))
    optimizer = CPUAdamW8bit([p])
    magnitude = 10 ** (-4 * torch.rand(n, generator=torch.Generator().manual_seed(0)))
    m, v = magnitude * noise(n).sign(), magnitude.square()
    m[:BLOCK], v[:BLOCK] = 0, 0
    m[BLOCK], v[BLOCK] = 1e-30, 1e-40
    optimizer.set_moments(p, m, v)
    coded_m, coded_v = optimizer.moments(p)
    for rows, bits in ((slice(BLOCK + 1, 2 * BLOCK), 3), (slice(2 * BLOCK, None), 4)):  # beside a zero all 32 octaves
        assert (coded_v[rows].sqrt() / magnitude[rows] - 1).abs().max() <= 0.5**bits / 2 + 1e-6  # half a step
        assert (coded_m[rows] / m[rows] - 1).abs().max() <= 1 / 120
    assert (coded_m[:BLOCK] == 0).all()
    assert (coded_v[:BLOCK] == 0).all()
    assert coded_v[BLOCK] > 0
    assert "step" not in optimizer.state[p]
    with pytest.raises(RedHeartError, match="negative"):
        optimizer.set_moments(p, m, -v)
    with pytest.raises(RedHeartError, match="finite float32"):
        optimizer.set_moments(p, m / 0, v)


def test_an_unchecked_gradient_that_is_not_finite_spoils_no_block():
    n = 3 * BLOCK + 5
    p = parameter(noise(n))
    optimizer = CPUAdamW8bit([p])
    run(optimizer, p, [noise(n, seed=1)])
    before, old = p.detach().clone(), states(optimizer, p)
    for place in (BLOCK + 3, n - 1):
        p.data.copy_(before)
        p.grad = noise(n, seed=2)
        p.grad[place] = float("nan") if place < n - 1 else float("inf")
        with pytest.raises(FloatingPointError, match="1 blocks"):
            optimizer.step(check_finite=False)
        block = slice(place // BLOCK * BLOCK, min(n, place // BLOCK * BLOCK + BLOCK))
        assert torch.equal(p[block], before[block])
        assert torch.equal(optimizer.state[p][STATES[1]][block], old[STATES[1]][block])
        assert not torch.equal(p[:BLOCK], before[:BLOCK])
        assert p.isfinite().all()
        old = states(optimizer, p)


@pytest.mark.parametrize("place", [3, BLOCK + 2])
def test_a_block_that_is_left_leaves_its_copy_too(place):
    n = BLOCK + 5
    p, kept = parameter(noise(n)), torch.full((n,), 7.0, dtype=torch.bfloat16)
    p.grad = noise(n, seed=1)
    p.grad[place] = float("inf")
    with pytest.raises(FloatingPointError, match="1 blocks"):
        CPUAdamW8bit([p]).step(copies={p: kept}, check_finite=False)
    left = slice(0, BLOCK) if place < BLOCK else slice(BLOCK, n)
    other = slice(BLOCK, n) if place < BLOCK else slice(0, BLOCK)
    assert (kept[left] == 7).all()
    assert torch.equal(kept[other], p.detach()[other].bfloat16())


def test_a_state_dict_goes_through_a_file_without_pickled_code(tmp_path):
    p, q = parameter(noise(700)), parameter(noise(700))
    a, b = CPUAdamW8bit([p], seed=1), CPUAdamW8bit([q], seed=1)
    run(a, p, [noise(700, seed=s) for s in range(3)])
    torch.save(a.state_dict(), tmp_path / "state.pt")
    b.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    q.data.copy_(p.data)
    for optimizer, x in ((a, p), (b, q)):
        run(optimizer, x, [noise(700, seed=9)])
    assert torch.equal(p, q)
    assert all(torch.equal(x, states(b, q)[name]) for name, x in states(a, p).items())


def test_codes_of_another_version_are_refused():
    p = parameter(noise(300))
    optimizer = CPUAdamW8bit([p])
    run(optimizer, p, [noise(300, seed=1)])
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["codes"]
    with pytest.raises(RedHeartError, match="another version"):
        CPUAdamW8bit([p]).load_state_dict(saved)


def test_weight_decay_is_decoupled_and_a_learning_rate_of_zero_moves_nothing():
    p = parameter(noise(600))
    start = p.detach().clone()
    run(CPUAdamW8bit([p], lr=0.01, weight_decay=0.5), p, [torch.zeros(600)] * 2)
    assert torch.allclose(p, start * (1 - 0.01 * 0.5) ** 2, rtol=1e-6)
    p = parameter(start)
    optimizer = CPUAdamW8bit([p], lr=0.0, weight_decay=0.5)
    run(optimizer, p, [noise(600, seed=1)] * 2)
    assert torch.equal(p, start)
    assert (optimizer.moments(p)[1] > 0).all()


def test_a_huge_step_count_needs_no_bias_correction():
    p = parameter(torch.zeros(512))
    optimizer = CPUAdamW8bit([p], lr=1.0, weight_decay=0.0, betas=(0.0, 0.5))
    optimizer.set_moments(p, torch.zeros(512), torch.ones(512))
    optimizer.state[p]["step"] = 2**40
    run(optimizer, p, [torch.ones(512)])
    assert torch.allclose(p.detach(), -torch.ones(512))
    assert optimizer.state[p]["step"] == 2**40 + 1


def test_noise_differs_between_steps_blocks_and_parameters():
    """The codes of equal values, rounded up or down by noise alone."""
    n, value = 64 * BLOCK, 1.06
    p, q = parameter(torch.zeros(n)), parameter(torch.zeros(n))
    optimizer = CPUAdamW8bit([p, q], betas=(0.0, 0.0), lr=0.0)
    p.grad = q.grad = torch.full((n,), value)
    rounded = []
    for _ in range(2):
        optimizer.step()
        rounded += [optimizer.moments(x)[0].view(64, BLOCK) > value for x in (p, q)]
    up = torch.cat(rounded).float()  # 4 x 64 blocks, each its own rotation of an even spread
    assert up.mean().item() == pytest.approx((value - 1) * 64 - 3, abs=0.005)  # one value leaves six bits of mantissa
    centred = up - up.mean()
    correlation = (centred @ centred.T) / centred.square().sum(1).mean()
    off = correlation[~torch.eye(256, dtype=torch.bool)]
    assert off.mean().abs() < 0.01
    assert len({tuple(row.tolist()) for row in up}) > 100


def test_a_gradient_whose_square_overflows_is_survived():
    n = 2 * BLOCK
    p = parameter(torch.zeros(n))
    optimizer = CPUAdamW8bit([p], lr=1e-3, weight_decay=0.0)
    g = noise(n, seed=1)
    g[5] = 1e30
    run(optimizer, p, [g, g])
    assert p.isfinite().all()
    assert all(x.isfinite().all() for x in optimizer.moments(p))
    assert p[5].item() == pytest.approx(-2e-3, rel=0.2)


@pytest.mark.slow  # compiles the kernel three times
def test_one_source_gives_the_same_bits_at_every_vector_width():
    """16 lanes (AVX-512's), 8 and 4 (the portable loops) of the very same source, compiled for this processor."""
    n = 5000
    for master, dtype in MASTERS.items():
        ends = []
        for lanes in (4, 8, 16):
            p = parameter(noise(n).to(dtype))
            copies = {p: torch.zeros(n, dtype=torch.bfloat16)} if master == "fp32" else {}
            optimizer = CPUAdamW8bit([p], lr=1e-2, seed=1, master=master)
            optimizer._kernel = kernel(lanes)
            assert optimizer._kernel.lanes == lanes
            for s in range(5):
                p.grad = (noise(n, seed=s) * 10 ** (3 * noise(n, seed=50 + s))).to(dtype)
                optimizer.step(copies=copies)
            ends.append((optimizer.master_weights(p), *copies.values(), *states(optimizer, p).values()))
        for other in ends[1:]:
            assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_moments_are_set_in_whole_blocks_or_to_the_end():
    n = 3 * BLOCK + 40
    p = parameter(torch.zeros(n))
    optimizer = CPUAdamW8bit([p])
    m, v = noise(n), noise(n, seed=1).square()
    optimizer.set_moments(p, m, v)
    whole = optimizer.moments(p)
    other = CPUAdamW8bit([p])
    for start, stop in ((2 * BLOCK, n), (0, BLOCK), (BLOCK, 2 * BLOCK)):  # in any order, piece by piece
        other.set_moments(p, m[start:stop], v[start:stop], start)
    assert all(torch.equal(a, b) for a, b in zip(other.moments(p), whole, strict=True))
    for start, size in ((0, 100), (BLOCK, BLOCK + 1), (10, BLOCK), (10, n - 10), (BLOCK, n), (0, n + BLOCK)):
        with pytest.raises(RedHeartError, match="moments must be"):
            other.set_moments(p, torch.zeros(size), torch.zeros(size), start)
    with pytest.raises(RedHeartError, match="moments must be"):
        other.set_moments(p, m, v[:BLOCK])
    assert all(torch.equal(a, b) for a, b in zip(other.moments(p), whole, strict=True))


def test_one_moment_that_is_not_finite_among_many_is_refused():
    p = parameter(noise(600))
    optimizer = CPUAdamW8bit([p])
    m, v = noise(600), noise(600, seed=1).square()
    for place, bad in ((0, float("nan")), (599, float("inf"))):
        for which in range(2):
            given = [m.clone(), v.clone()]
            given[which][place] = bad
            with pytest.raises(RedHeartError, match="finite float32"):
                optimizer.set_moments(p, *given)
    assert not optimizer.state[p]


@pytest.mark.parametrize(
    "copy",
    [
        torch.zeros(600), torch.zeros(599, dtype=torch.bfloat16), torch.zeros(601, dtype=torch.bfloat16),
        torch.zeros(1200, dtype=torch.bfloat16)[::2], torch.zeros(600, dtype=torch.bfloat16, device="meta"),
    ],
)  # fmt: skip
def test_a_copy_that_does_not_fit_is_refused_and_nothing_is_written(copy):
    p = parameter(noise(600))
    p.grad = noise(600, seed=1)
    with pytest.raises(RedHeartError, match="600 elements here"):
        CPUAdamW8bit([p]).step(copies={p: copy})
    assert torch.equal(p, noise(600))


def test_one_group_of_another_version_is_enough_to_refuse():
    p, q = parameter(noise(300)), parameter(noise(300))
    optimizer = CPUAdamW8bit([{"params": [p]}, {"params": [q]}])
    p.grad = q.grad = noise(300, seed=1)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][1]["codes"] = 1
    with pytest.raises(RedHeartError, match="another version"):
        optimizer.load_state_dict(saved)


def test_what_is_loaded_last_counts():
    p = parameter(noise(300))
    optimizer, kept = CPUAdamW8bit([p]), []
    for seed in (1, 2):
        run(optimizer, p, [noise(300, seed=seed)])
        kept.append((copy.deepcopy(optimizer.state_dict()), states(optimizer, p)))
    for saved, expected in (kept[0], kept[1], kept[0]):
        optimizer.load_state_dict(saved)
        assert all(torch.equal(x, expected[name]) for name, x in states(optimizer, p).items())
        assert not optimizer._optimizer_load_state_dict_pre_hooks
        assert not optimizer._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_a_step_in_stretches_is_the_step_and_each_is_told_of_once_it_is_finished(
    master: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(adam8bit, "STRETCH", 2 * BLOCK)
    n = 5 * BLOCK + 77
    draw = torch.Generator().manual_seed(0)
    w, gradients = torch.randn(n, generator=draw), [torch.randn(n, generator=draw) for _ in range(3)]
    kept = []
    for in_stretches in (False, True):
        p = torch.nn.Parameter(w.clone() if master == "fp32" else torch.zeros(n, dtype=torch.bfloat16))
        optimizer = CPUAdamW8bit([p], lr=0.1, master=master, seed=3)
        if master == "split":
            optimizer.set_master_weights(p, w)
        high = torch.zeros(n, dtype=torch.bfloat16)
        copies, written = ({p: high}, high) if master == "fp32" else ({}, p.detach())
        told: list[tuple[int, int, torch.Tensor]] = []
        for gradient in gradients:
            before = written.clone()
            p.grad = gradient.to(p.dtype)
            told.clear()

            def note(start: int, stop: int) -> None:
                told.append((start, stop, written.clone()))  # noqa: B023

            optimizer.step(copies=copies, on_written=note if in_stretches else None)
            for start, stop, seen in told:
                assert torch.equal(seen[:stop], written[:stop])
                assert torch.equal(seen[stop:], before[stop:])
                assert not torch.equal(seen[start:stop], before[start:stop])
        assert [(a, b) for a, b, _ in told] == [(0, 512), (512, 1024), (1024, n)] * in_stretches
        kept.append([optimizer.master_weights(p), written, *optimizer.state[p].values()])
    for whole, parts in zip(*kept, strict=True):
        assert torch.equal(whole, parts) if isinstance(whole, torch.Tensor) else whole == parts
