"""Swapped modules answer bit for bit as resident ones, and no more than two of them are on the device at a time."""

import gc

import pytest
import torch

from redheart.config import load_config
from redheart.memory.swap import GIB, place
from redheart.model.build import build_model
from redheart.model.redheart import RedHeartModel, RedHeartOutput
from redheart.model.select import MODULES, ExecutionMode
from redheart.schema import RedHeartError
from redheart.tasks import task_losses
from tests.train.tiny import make_batch

SMALL = ["model.width=24", "model.heads=2", "model.layers=1", "model.task_width=16", "model.task_heads=2"]
SWAPPED = tuple(m for m in MODULES if m != "backbone")


def twins(mode: ExecutionMode, *settings: str) -> tuple[RedHeartModel, RedHeartModel]:
    """Two networks with the same weights."""
    config = load_config("local", [*SMALL, *settings])
    one, other = build_model(config, None), build_model(config, None)
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        model.set_mode(mode)
    return one, other


def ask(model: RedHeartModel, rows: int = 6, without: tuple[str, ...] = ()) -> RedHeartOutput:
    b = make_batch(range(rows))
    contrast = (b.contrast_features, b.contrast_mask, b.contrast_rows)
    return model(b.features, b.mask, *contrast, sample_keys=b.keys if model.training else None, without=without)


def tensors(outputs: RedHeartOutput) -> dict[str, torch.Tensor]:
    found = {n: v for n, v in outputs.items() if isinstance(v, torch.Tensor)}
    for label, by_module in outputs.readings.items():
        found |= {f"{label}/{module}": v for module, v in by_module.items()}
    return found


def assert_same(a: RedHeartOutput, b: RedHeartOutput) -> None:
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys()
    assert [n for n in x if not torch.equal(x[n], y[n])] == []


def bytes_of(model: RedHeartModel) -> dict[str, int]:
    modules = {m: model.get_submodule(m) for m in model.built}
    return {m: sum(t.numel() * t.element_size() for t in (*x.parameters(), *x.buffers())) for m, x in modules.items()}


@torch.no_grad()
def test_answers_are_bitwise_those_without_swap_and_two_modules_at_most_are_resident():
    plain, swapped = twins(ExecutionMode.EVALUATION)
    swap = place(swapped, "cpu", SWAPPED)
    for rows in (6, 3, 8):
        assert_same(ask(plain, rows), ask(swapped, rows))
    report, sizes = swap.report(), bytes_of(plain)
    largest, second = sorted((sizes[m] for m in SWAPPED), reverse=True)[:2]
    assert report.resident_gib * GIB == sizes["backbone"]
    assert sizes["backbone"] + largest < report.peak_gib * GIB <= sizes["backbone"] + largest + second
    assert report.moved_gib * GIB == pytest.approx(3 * sum(sizes[m] for m in SWAPPED))  # nothing is fetched twice
    assert report.fetches == 3 * len(SWAPPED)
    assert report.ahead == 2 * (len(SWAPPED) - 1)  # from the second pass on, all but the first to be called
    assert report.copy_s > 0
    assert "analyzers.emotion" in str(report)


@torch.no_grad()
def test_nothing_stays_on_the_device_and_the_weights_stay_whole():
    plain, swapped = twins(ExecutionMode.EVALUATION)
    swap = place(swapped, "cpu", SWAPPED)
    ask(swapped)
    ask(swapped)
    gc.collect()
    assert swap._visiting == 0
    state, expected = swapped.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()  # checkpoints and exports do not see it
    assert all(torch.equal(state[k], expected[k]) for k in expected)


@torch.no_grad()
def test_a_pass_that_leaves_modules_out_is_the_same_too():
    plain, swapped = twins(ExecutionMode.EVALUATION)
    place(swapped, "cpu", SWAPPED)
    for without in ((), ("analyzers.regret", "aux.dsp"), ("heads.surd",), ()):
        assert_same(ask(plain, without=without), ask(swapped, without=without))


@torch.inference_mode()
def test_inference_with_idle_modules_moves_only_what_is_asked_for():
    plain, swapped = twins(ExecutionMode.INFERENCE)
    wanted = ["heads.surd"]
    for model in (plain, swapped):
        model.set_mode(ExecutionMode.INFERENCE, wanted)
    swap = place(swapped, "cpu", ["heads.emotion", "heads.surd", "analyzers.regret"])
    assert_same(ask(plain), ask(swapped))
    sizes = bytes_of(plain)
    assert swap.report().moved_gib * GIB == sizes["heads.emotion"] + sizes["heads.surd"]
    resident = ("backbone", "heads.bentham", "heads.regret")  # the others are idle, and not brought in
    assert swap.report().resident_gib * GIB == sum(sizes[m] for m in resident)


@pytest.mark.parametrize("names", [SWAPPED, MODULES])
def test_training_gradients_are_bitwise_those_without_swap(names):
    plain, swapped = twins(ExecutionMode.TRAINING)
    swap = place(swapped, "cpu", names)
    config, batch = load_config("local").loss, make_batch(range(6))
    for model in (plain, swapped):
        losses = task_losses(ask(model), batch.labels, batch.weights, config)
        sum(value for value, _ in losses.values()).backward()
    pairs = list(zip(plain.named_parameters(), swapped.named_parameters(), strict=True))
    assert all(q.grad is not None for _, (_, q) in pairs)
    assert [n for (n, p), (_, q) in pairs if not torch.equal(p.grad, q.grad)] == []
    sizes = bytes_of(plain)
    moved = sum(sizes[m] for m in names)
    assert swap.report().moved_gib * GIB == 2 * moved  # for forward, and again for backward
    gc.collect()
    assert swap._visiting == 0
    largest, second = sorted((sizes[m] for m in names), reverse=True)[:2]
    assert swap._peak <= largest + second


def test_training_holds_no_activations_of_a_swapped_module_between_forward_and_backward():
    """Autograd keeps nothing of a swapped module but its inputs and outputs: the rest is computed again."""
    kept: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[-1] += x.numel()
        return x

    for names in ((), SWAPPED):
        model, _ = twins(ExecutionMode.TRAINING)
        place(model, "cpu", names)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ask(model)
    assert kept[1] < 0.6 * kept[0]


def test_what_cannot_be_swapped_is_refused_by_name():
    model, _ = twins(ExecutionMode.EVALUATION, "model.ablate=[aux.dsp]")
    with pytest.raises(RedHeartError, match=r"heads\.joy.*choose from backbone"):
        place(model, "cpu", ["heads.joy"])
    with pytest.raises(RedHeartError, match=r"aux\.dsp.*built without it"):
        place(model, "cpu", ["aux.dsp"])
