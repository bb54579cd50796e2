"""Growth: the same function wider and deeper, copies that part as soon as they learn, and declared axes for every parameter."""

import math
import re
import statistics

import pytest
import torch

from redheart.config import load_config
from redheart.model.axes import Width, axes_of
from redheart.model.growth import (
    grow,
    grow_moment,
    grown_tensors,
    growth_plans,
    origins,
    relative_differences,
    tensors_of,
)
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.schema import RedHeartError
from tests.model.test_model import SMALL, inputs, loss_of, small

WIDE = {"width": 48, "heads": 4, "layers": 2, "task_width": 32, "task_heads": 4}
OFTEN = {"width": 72, "heads": 6, "layers": 2, "task_width": 32, "task_heads": 4}  # D ×3, K ×2
DEEP = {**SMALL, "layers": 5}
BOTH = {**WIDE, "layers": 3}


def sizes(values: dict[str, int], **more) -> RedHeartConfig:
    return RedHeartConfig(**values, **more)


def outputs_of(model: RedHeartModel, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Everything the network says about a few texts, some of them with a contrast."""
    features, mask, _ = inputs()
    features, rows = features.to(dtype), torch.tensor([0, 3, 6])
    with torch.no_grad():
        return tensors_of(model.eval()(features, mask, features.flip(-1)[rows], mask[rows], rows))


def moved(model: RedHeartModel) -> RedHeartModel:
    """The network with every weight away from its initial value, so that no gain is 1 and no offset 0 by chance."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("target", [WIDE, OFTEN, DEEP, BOTH], ids=["wide", "ratios 3 and 2", "deep", "both"])
@pytest.mark.parametrize("split", ["symmetric", "asymmetric"])
def test_the_grown_network_is_the_same_function(target, split):
    model = moved(small())
    differences = relative_differences(outputs_of(model), outputs_of(grow(model, sizes(target), split=split)))
    assert len(differences) == 41
    assert {"readings.preference.analyzers.bentham", "trajectory", "task_features", "utility_difference"} <= set(
        differences
    )
    assert max(differences.values()) <= 1e-10, max(differences, key=lambda n: differences[n])


def test_the_comparison_can_fail():
    model = moved(small())
    grown = grow(model, sizes(WIDE))
    grown.analyzers["emotion"].place.weight.data[40, 3] *= 1.01
    differences = relative_differences(outputs_of(model), outputs_of(grown))
    assert differences["trajectory"] > 1e-6
    assert differences["task_features"] <= 1e-10


def test_local_grows_to_base_in_fp32():
    model = moved(RedHeartModel(RedHeartConfig(**_sizes_of("local"))))
    # fresh queries are nearly alike, so that the utility foregone minus the one had would be smaller than its rounding
    model.analyzers["regret"].query.data *= 50
    grown = grow(model, load_config("base"))
    assert sum(p.numel() for p in grown.parameters()) == sum(p.numel() for p in _on_meta("base").parameters())
    mine, theirs = outputs_of(model, torch.float32), outputs_of(grown, torch.float32)
    exact = {name: x.float() for name, x in outputs_of(model.double()).items()}
    # the growth adds no more than rounding does to the network as it is; how much that is depends on the processor
    rounding, differences = relative_differences(exact, mine), relative_differences(exact, theirs)
    for name, difference in differences.items():
        assert difference <= max(5e-6, 5 * rounding[name]), name
    assert sorted(differences.values())[len(differences) // 2] < 5e-6  # most answers are well conditioned


def _sizes_of(preset: str) -> dict:
    values = load_config(preset).model.model_dump()
    del values["activation_checkpointing"]
    return values


def _on_meta(preset: str) -> RedHeartModel:
    with torch.device("meta"):
        return RedHeartModel(RedHeartConfig(**_sizes_of(preset)))


def test_330m_grows_to_1b3_with_exactly_its_parameters():
    small_one, large = _on_meta("330m"), _on_meta("1b3")
    state = small_one.state_dict()
    grown = {n: t.shape for n, t in _grown_on_meta(state, small_one.config, large)}
    assert grown == {n: t.shape for n, t in large.state_dict().items()}
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(1.32e9, rel=0.01)


def _grown_on_meta(state, source, target):
    """Shapes alone: the noise, which needs memory, is left out."""
    return grown_tensors(state.__getitem__, source, target, math.inf)


def test_copies_part_with_the_first_step():
    """With dropout off it is the noise alone that parts them: in weight or in gradient, all copies differ by a good share."""
    grown = grow(small(0.0), sizes(WIDE, dropout=0.0)).train()
    loss_of(grown, *inputs(), slice(0, 8)).backward()
    names = _grown_axes(grown)
    assert len(names) > 200
    for name in names:
        p = grown.get_parameter(name)
        assert (
            max(_distance_of_copies(grown, t, name) / t.abs().max().clamp(min=1e-12) for t in (p.detach(), p.grad))
            > 1e-2
        ), name
    torch.optim.AdamW(grown.parameters(), lr=1e-3).step()
    assert min(_distance_of_copies(grown, grown.get_parameter(name).detach(), name) for name in names) > 0


def test_without_noise_copies_stay_copies():
    grown = grow(small(0.0), sizes(WIDE, dropout=0.0), math.inf).train()
    loss_of(grown, *inputs(), slice(0, 8)).backward()
    torch.optim.SGD(grown.parameters(), lr=1e-3).step()
    assert max(_distance_of_copies(grown, grown.get_parameter(n).detach(), n) for n in _grown_axes(grown)) < 1e-9


@pytest.mark.parametrize("target", [WIDE, OFTEN], ids=["wide", "ratios 3 and 2"])
def test_gradients_of_a_network_grown_without_noise_are_the_grown_gradients(target):
    """So the moments, means of gradients and of their squares, grow in the same way."""
    model = moved(small(0.0)).train()
    grown = grow(model, sizes(target, dropout=0.0), math.inf).train()
    for network in (model, grown):
        loss_of(network, *inputs(), slice(0, 8)).backward()
    plans = growth_plans(model.config, grown)
    for name, p in grown.named_parameters():
        old = model.get_parameter(name).grad
        for power in (1, 2):
            found = grow_moment(old**power, p.shape, plans[name], power)
            scale = (p.grad**power).abs().max().clamp(min=1e-12)
            assert (found - p.grad**power).abs().max() / scale < 1e-7, (name, power)


@pytest.mark.parametrize("target", [WIDE, OFTEN, BOTH], ids=["wide", "ratios 3 and 2", "both"])
def test_asymmetric_moments_are_the_old_channels_and_nothing_else(target):
    """Nearly the gradient of the grown network: LayerNorm's centring shares out evenly what the copies take unevenly."""
    model = moved(small(0.0)).train()
    grown = grow(model, sizes(target, dropout=0.0), math.inf, split="asymmetric").train()
    for network in (model, grown):
        loss_of(network, *inputs(), slice(0, 8)).backward()
    plans, silent, alike = growth_plans(model.config, grown), 0, {}
    for name, p in grown.named_parameters():
        old = model.get_parameter(name).grad
        kept = grow_moment(torch.ones_like(old), p.shape, plans[name], 2, "asymmetric") > 0
        silent += int(not kept.all())
        for power in (1, 2):
            found = grow_moment(old**power, p.shape, plans[name], power, "asymmetric")
            assert not found[~kept].any()
            real = (p.grad**power)[kept]
            alike[name, power] = (found[kept] @ real / (found[kept].norm() * real.norm()).clamp(min=1e-30)).item()
    assert silent > 200
    assert statistics.median(alike.values()) > 1 - 1e-6
    assert min(alike.values()) > 0.8


def _grown_axes(model: RedHeartModel) -> list[str]:
    grown = {n for n, axes in axes_of(model) if any(a.kind in ("copy", "read", "match") for a in axes)}
    return [n for n, _ in model.named_parameters() if n in grown]


def _distance_of_copies(model: RedHeartModel, parameter: torch.Tensor, name: str) -> float:
    """The smallest distance between the two copies along any axis that was doubled."""
    found = []
    for axis, what in enumerate(dict(axes_of(model))[name]):
        if what.kind in ("copy", "read", "match"):
            pieces = parameter.split(what.segments or (parameter.shape[axis],), axis)
            found += [(a - b).abs().max().item() for a, b in (piece.chunk(2, axis) for piece in pieces)]
    return min(found)


def test_noise_has_its_share_and_cancels():
    model = moved(small())
    quiet, noisy = (grow(model, sizes(WIDE), snr).state_dict() for snr in (math.inf, 10.0))
    name = "backbone.layers.up_weight"
    noise = noisy[name] - quiet[name]
    assert (noise[..., :24] + noise[..., 24:]).abs().max() < 1e-15
    signal = quiet[name].square().mean().sqrt()
    assert 20 * math.log10(signal / noise.square().mean().sqrt()) == pytest.approx(10.0, abs=0.3)
    assert torch.equal(noisy["backbone.positions"], model.backbone.positions.repeat(1, 2))


def test_growth_is_a_function_of_its_seed_and_leaves_the_source_alone():
    model = small()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    first, again, other = (grow(model, sizes(BOTH), seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["backbone.cross.out_weight"], other["backbone.cross.out_weight"])
    grown = grow(model, sizes(DEEP))
    with torch.no_grad():
        for p in grown.parameters():
            p.zero_()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert grown.training == model.training


def test_a_new_layer_gets_gradients_and_old_layers_keep_their_order():
    assert origins(2, 5) == [(0, False), (0, True), (0, True), (1, False), (1, True)]
    model = small(0.0)
    grown = grow(model, sizes(DEEP, dropout=0.0)).train()
    loss_of(grown, *inputs(), slice(0, 8)).backward()
    old, new = model.backbone.layers, grown.backbone.layers
    for name in ("out_weight", "down_weight"):
        parameter = new.get_parameter(name)
        assert [i for i, layer in enumerate(parameter) if not layer.any()] == [
            i for i, (_, is_new) in enumerate(origins(2, 5)) if is_new
        ]
        assert all(layer.abs().max() > 0 for layer in parameter.grad)
    assert torch.equal(new.up_weight, old.up_weight[[0, 0, 0, 1, 1]])


@pytest.mark.parametrize("preset", ["local", "330m"])
def test_every_parameter_and_buffer_declares_what_growth_does_along_its_axes(preset):
    model = _on_meta(preset)
    declared = dict(axes_of(model))
    assert declared.keys() == model.state_dict().keys()
    for module in model.modules():  # nothing is declared that is not there
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        assert getattr(module, "axes", {}).keys() - own.keys() <= {"bias", "scale", "utility_scale"}


def test_a_parameter_without_declared_axes_is_an_error():
    model = small()
    model.heads["emotion"].mystery = torch.nn.Parameter(torch.ones(16))
    with pytest.raises(AssertionError, match=r"declares no growth axes for heads\.emotion\.mystery"):
        dict(axes_of(model))


def test_a_width_knows_products_from_concatenations():
    d, k = Width(24), Width(16)
    assert (4 * d).segments == (96,)
    assert (d + k + d).segments == (24, 16, 24)
    assert isinstance(5 * d // 2, Width)
    assert d + k == 40


def test_gradients_scale_by_the_copies_of_the_output():
    """Without noise, dL/dW' of a grown weight is dL/dW repeated and divided by the copies of its rows (what moments would need)."""
    model = small(0.0)
    grown = grow(model, sizes(WIDE, dropout=0.0), math.inf)
    for network in (model, grown.train()):
        loss_of(network, *inputs(), slice(0, 8)).backward()
    for name, copies in (
        ("backbone.layers.up_bias", 2),
        ("heads.regret.views.linears.2.bias", 2),
        ("heads.emotion.emotion.linears.1.weight", 1),
    ):
        old, new = (network.get_parameter(name).grad for network in (model, grown))
        expected = old.repeat([n // o for n, o in zip(new.shape, old.shape)]) / copies
        assert (new - expected).abs().max() <= 1e-10 * expected.abs().max(), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 36, "heads": 3}, "no multiple of 24"),
        ({"task_width": 24, "task_heads": 3}, "no multiple of 16"),
        ({"heads": 2}, "choose heads = 4"),
        ({"task_heads": 2}, "choose task_heads = 4"),
        ({"layers": 1}, "only adds layers"),
        ({"num_experts": 4}, "num_experts"),
        ({"encoder_width": 384}, "encoder_width"),
        ({"ablate": ["aux.dsp"]}, "model.ablate"),
        (SMALL, "nothing would grow"),
    ],
)
def test_what_growth_cannot_reach_is_named(change, words):
    with pytest.raises(RedHeartError, match=re.escape(words)):
        grow(small(), sizes({**WIDE, **change}))


@pytest.mark.parametrize(("before", "after"), [((16, 32), (32, 32)), ((16, 16), (32, 16))])
def test_growth_to_a_network_of_other_tensors_is_refused(before, after):
    """Where both widths are equal nothing is projected on the way into the fusion."""
    source, target = (
        sizes({"width": d, "heads": d // 8, "layers": 1, "task_width": k, "task_heads": k // 8})
        for d, k in (before, after)
    )
    with pytest.raises(RedHeartError, match=r"of_tokens.bias would come or go: .* equal"):
        grow(RedHeartModel(source), target)


def test_noise_that_would_drown_the_weights_is_refused():
    with pytest.raises(RedHeartError, match="above 0"):
        grow(small(), sizes(WIDE), -10.0)


def test_an_odd_hidden_width_is_refused_not_rounded():
    odd = RedHeartModel(RedHeartConfig(width=24, heads=2, layers=1, task_width=15, task_heads=3))
    with pytest.raises(RedHeartError, match="even widths"):
        grow(odd, RedHeartConfig(width=24, heads=2, layers=1, task_width=30, task_heads=6))


def test_an_ablated_network_grows_too():
    left_out = ["analyzers.surd", "aux.kalman"]
    torch.manual_seed(0)
    model = RedHeartModel(sizes(SMALL, ablate=left_out, num_experts=1)).double()
    grown = grow(model, sizes(WIDE, ablate=left_out, num_experts=1))
    assert max(relative_differences(outputs_of(model), outputs_of(grown)).values()) <= 1e-10
