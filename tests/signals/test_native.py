"""The compiled recursions: equal to their torch forms, exact adjoints, and a text that depends on nothing but itself."""

import contextlib
from pathlib import Path

import pytest
import torch

from redheart.schema import RedHeartError
from redheart.signals import native
from redheart.signals.dsp import CONTROLS, bank, envelope, oscillator
from redheart.signals.kalman import Measurement, contraction, kalman_filter, last_posterior

BOUNDS = dict(zip(CONTROLS, ((0.05, 4.0), (0.25, 16.0), (0.02, 1.0), (0.25, 16.0))))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the largest value


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(batch: int, steps: int) -> torch.Tensor:
    """Texts of all lengths; the first is whole, the last has a gap."""
    mask = torch.arange(steps)[None] < (torch.arange(batch)[:, None] % steps) + 1
    mask[0] = True
    mask[-1, steps // 2] = False
    mask[-1, -1] = True
    return mask


def system(batch: int, steps: int, size: int, rows: int, last: int) -> list[torch.Tensor]:
    noise = 0.3 * draw(size, size, seed=4)
    return [
        draw(batch, size, seed=1),
        draw(batch, size, seed=2).abs() + 0.1,
        contraction(draw(size, size, seed=3)),
        noise @ noise.mT + 0.01 * torch.eye(size).double(),
        draw(rows, size, seed=5),
        draw(batch, steps, rows, seed=6),
        draw(batch, steps, rows, seed=7).exp(),
        draw(last, size, seed=8),
        draw(batch, last, seed=9),
        draw(batch, last, seed=10).exp(),
    ]


def end(args: list[torch.Tensor], mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = (args[3] + args[3].mT) / 2  # the kernel knows that Q is symmetric, and its gradient is
    return last_posterior(*args[:3], half, Measurement(*args[4:7]), Measurement(*args[7:10]), mask)


def leaves(args, dtype: torch.dtype) -> list[torch.Tensor]:
    return [a.detach().to(dtype).requires_grad_() for a in args]


def answers(function, args, by_torch: bool = False) -> list[torch.Tensor]:
    """What a function gives, and the gradients of a fixed random sum of it."""
    with native.torch_form() if by_torch else contextlib.nullcontext():
        out = function(*args)
        out = out if isinstance(out, tuple) else (out,)
        total = sum((x * draw(*x.shape, seed=20 + i).to(x.dtype)).sum() for i, x in enumerate(out))
        grads = torch.autograd.grad(total, args, materialize_grads=True)
    return [*(x.detach() for x in out), *grads]


def agree(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if b.numel():
            assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max().clamp(min=1e-9), i


SHAPES = [(1, 1, 14, 14, 7), (3, 5, 4, 3, 2), (20, 13, 14, 14, 7), (9, 7, 14, 7, 0), (5, 6, 3, 0, 2), (2, 3, 2, 5, 3)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_filter_is_its_torch_form(shape, dtype):
    mask, args = masks(*shape[:2]), system(*shape)
    got = answers(lambda *a: end(list(a), mask), leaves(args, dtype))
    assert got[0].dtype == dtype
    agree(got, answers(lambda *a: end(list(a), mask), leaves(args, torch.float64), by_torch=True), TOLERANCE[dtype])


def test_the_filter_is_the_loop_over_its_steps():
    z, H, p = draw(2, 9, 3, seed=6), draw(3, 4, seed=5), draw(2, 9, 3, seed=7).exp()
    args = system(2, 9, 4, 3, 0)
    mean, covariance = end(leaves(args, torch.float64), torch.ones(2, 9, dtype=torch.bool))
    loop = kalman_filter(z, args[2], H, args[3], torch.diag_embed(1 / p), args[0], torch.diag_embed(args[1]))
    agree([mean, covariance], [loop.mean[:, -1], loop.covariance[:, -1]], 1e-10)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (3, 7), (5, 64)])
def test_the_bank_is_its_torch_form(batch, steps, dtype):
    mask, args = masks(batch, steps), [2 * draw(batch, steps, 7), draw(batch, 6, 7, seed=1)]
    run = lambda d, c: bank(d, mask, c, BOUNDS, 4.0)  # noqa: E731
    got = answers(run, leaves(args, dtype))
    agree(got, answers(run, leaves(args, torch.float64), by_torch=True), TOLERANCE[dtype] / 10)
    assert not got[0][~mask].any()


def test_the_bank_is_an_envelope_and_an_oscillator():
    drive, raw = draw(2, 30, 3), draw(2, 6, 3, seed=1)
    got = bank(drive.requires_grad_(), torch.ones(2, 30, dtype=torch.bool), raw, BOUNDS, 4.0).mT
    times = [low * (high / low) ** raw[:, i].sigmoid() for i, (low, high) in enumerate(BOUNDS.values())]
    x = drive.detach().tanh().mT
    loss = 1 - torch.exp(-1 / (4 * times[3]))
    swell, swing = envelope(x, times[0], times[1], 4.0), oscillator(x, times[2], times[3], 4.0)
    expected = raw[:, 4, :, None] * swell + (raw[:, 5] * loss)[..., None] * swing
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def matrices() -> list[torch.Tensor]:
    return [
        draw(5, 5),
        0.1 * draw(5, 5),
        torch.diag(torch.tensor([3.0, 3.0, 1.0])).double(),
        torch.zeros(3, 3).double(),
    ]


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("matrix", range(4))
def test_a_contraction_is_the_matrix_over_its_norm(matrix: int, by_torch: bool):
    weight = matrices()[matrix]
    norm = torch.linalg.matrix_norm(weight, 2)
    got = answers(contraction, leaves([weight], torch.float64), by_torch)
    assert torch.allclose(got[0], weight / norm.clamp(min=1), rtol=0, atol=1e-12)
    if norm <= 1:
        assert torch.equal(got[0], weight)
    if matrix != 2:  # two equal singular values: the mean of their gradients, not an arbitrary one
        oracle = answers(lambda w: w / torch.linalg.matrix_norm(w, 2).clamp(min=1), leaves([weight], torch.float64))
        assert torch.allclose(got[1], oracle[1], rtol=0, atol=1e-10)
    else:
        agree(got, answers(contraction, leaves([weight], torch.float64), by_torch=not by_torch), 1e-12)


def test_nearly_equal_singular_values_leave_no_growth_that_fp32_can_see():
    q, _ = torch.linalg.qr(draw(14, 14))
    for gap in (1e-2, 1e-4, 1e-6, 1e-8):
        weight = q @ torch.diag(2 - gap * torch.arange(14).double()) @ q.mT
        assert torch.linalg.matrix_norm(contraction(weight.requires_grad_()), 2) <= 1 + 6e-8


def test_gradcheck():
    args, mask = leaves(system(3, 4, 3, 2, 2), torch.float64), masks(3, 4)
    assert torch.autograd.gradcheck(lambda *a: end(list(a), mask), args)
    assert torch.autograd.gradcheck(contraction, leaves([draw(4, 4)], torch.float64))
    run = lambda d, c: bank(d, masks(2, 6), c, BOUNDS, 4.0)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves([draw(2, 6, 3), draw(2, 6, 3, seed=1)], torch.float64))


PER_TEXT = (0, 1, 5, 6, 8, 9)  # of the arguments


def rows_of(args: list[torch.Tensor], rows: slice) -> list[torch.Tensor]:
    return [a[rows] if i in PER_TEXT else a for i, a in enumerate(args)]


def longer(x: torch.Tensor, padding: int) -> torch.Tensor:
    """[B, T, n] with steps behind the last that hold anything."""
    return torch.cat([x, x.new_full((x.shape[0], padding, x.shape[2]), 3.0)], 1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_text_depends_on_nothing_but_itself_bit_for_bit(dtype):
    args, mask = system(19, 9, 14, 14, 7), masks(19, 9)
    drives, controls = draw(19, 9, 7), draw(19, 6, 7, seed=1)
    weights = draw(19, 14, seed=30).to(dtype), draw(19, 14, 14, seed=31).to(dtype), draw(19, 9, 7, seed=32).to(dtype)

    def run(rows: slice, padding: int = 0) -> list[torch.Tensor]:
        given = leaves(rows_of(args, rows), dtype)
        z, p = longer(given[5], padding), longer(given[6], padding)
        here = torch.nn.functional.pad(mask[rows], (0, padding))
        mean, covariance = end([*given[:5], z, p, *given[7:]], here)
        drive, control = leaves([drives[rows], controls[rows]], dtype)
        signals = bank(longer(drive, padding), here, control, BOUNDS, 4.0)[:, :9]
        w = [x[rows] for x in weights]
        total = (mean * w[0]).sum() + (covariance * w[1]).sum() + (signals * w[2]).sum()
        grads = torch.autograd.grad(total, [*(given[i] for i in PER_TEXT), drive, control])
        return [mean.detach(), covariance.detach(), signals.detach(), *grads]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = run(slice(0, 19))
        torch.set_num_threads(2)
        for rows, padding in ((slice(0, 19), 0), (slice(0, 19), 5), (slice(4, 5), 0), (slice(3, 19), 2)):
            assert all(torch.equal(a[rows], b) for a, b in zip(whole, run(rows, padding), strict=True)), (rows, padding)
    finally:
        torch.set_num_threads(threads)


def test_numbers_that_die_away_do_not_change_how_torch_computes():
    args = leaves(system(2, 64, 14, 14, 7), torch.float32)
    sum(x.sum() for x in end(args, masks(2, 64))).backward()
    assert (torch.tensor([1e-40]) * 1.0).item() > 0  # subnormal numbers are still there


def test_the_covariance_of_a_hard_system_stays_positive_definite_in_fp32():
    args = system(4, 512, 14, 14, 7)
    args[2] = contraction(3 * args[2] + draw(14, 14, seed=11))
    args[6] = 55 * torch.ones_like(args[6])  # R = e⁻⁴
    args[3] = 1e-4 * torch.eye(14).double()
    _, covariance = end(leaves(args, torch.float32), masks(4, 512))
    assert torch.linalg.eigvalsh(covariance.detach().double()).min() > 0
    exact = end(args, masks(4, 512))[1]
    agree([covariance.detach()], [exact], 1e-4)


def test_training_runs_the_kernels_and_inference_what_is_there(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.setattr(native, "is_built", lambda: False)
    assert not native.kernels_serve(x)
    assert native.kernels_serve(x.requires_grad_())
    with torch.no_grad():
        assert not native.kernels_serve(x)
        monkeypatch.setattr(native, "is_built", lambda: True)
        assert native.kernels_serve(x)
    assert not native.kernels_serve(torch.zeros(1, device="meta").requires_grad_())
    with native.torch_form():
        assert not native.kernels_serve(x)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "compiler no-such-compiler is missing: apt-get install g"),
        ("false", "not be compiled by `false"),
    ],
)
def test_what_cannot_be_compiled_says_why(tmp_path: Path, monkeypatch, compiler: str, message: str):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert not native.is_built()
    with pytest.raises(RedHeartError, match=message):
        native.library.__wrapped__()
    assert not native.is_built()


def test_compiled_graphs_hold_the_kernels():
    mask = masks(2, 5)
    args = leaves([*system(2, 5, 4, 3, 2), draw(2, 5, 7), draw(2, 6, 7, seed=1)], torch.float64)
    function = lambda *a: (*end(list(a[:10]), mask), bank(*a[10:11], mask, a[11], BOUNDS, 4.0))  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(answers(compiled, args), answers(function, args), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
