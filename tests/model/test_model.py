"""The network: every parameter earns a gradient, padding and batch mates change nothing, sizes are the design's."""

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from redheart.config import LossConfig, load_config
from redheart.model.axes import axes_of
from redheart.model.build import build_model
from redheart.model.dropout import DropoutMasks, SampleDropout
from redheart.model.growth import tensors_of
from redheart.model.heads.regret import expected_excess
from redheart.model.redheart import RedHeartConfig, RedHeartModel, parameter_counts
from redheart.schema import LABELS
from redheart.tasks import TASKS, task_losses

SMALL = {"width": 24, "heads": 2, "layers": 2, "task_width": 16, "task_heads": 2}


def small(dropout: float = 0.1, dtype: torch.dtype = torch.float64) -> RedHeartModel:
    torch.manual_seed(0)
    return RedHeartModel(RedHeartConfig(**SMALL, dropout=dropout)).to(dtype).train()


def inputs(rows: int = 8, tokens: int = 5, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(rows, tokens, 768, generator=generator, dtype=dtype)
    mask = torch.arange(tokens)[None] < torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    labels = {n: torch.rand(rows, lab.size, generator=generator, dtype=dtype) for n, lab in LABELS.items()}
    return features * mask[..., None], mask, labels


def loss_of(model, features, mask, labels, rows: slice) -> torch.Tensor:
    """Sum over the rows of all losses; every second row has a contrast."""
    longest = int(mask[rows].sum(1).max())  # padded to its own longest row, as a micro-batch is
    x, m = features[rows, :longest], mask[rows, :longest]
    with_contrast = torch.arange(0, len(x), 2)
    if rows.start and rows.start % 2:
        with_contrast = torch.arange(1, len(x), 2)
    keys = torch.arange(100, 108)[rows]
    flipped = x.flip(-1)[with_contrast]
    outputs = model(x, m, flipped, m[with_contrast], with_contrast, keys)
    ones = {n: torch.ones_like(v[rows]) for n, v in labels.items()}
    losses = task_losses(outputs, {n: v[rows] for n, v in labels.items()}, ones, LossConfig())
    return sum(value for value, _ in losses.values())


def gradients(cuts: list[slice], dropout: float = 0.1, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    model = small(dropout)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert model.backbone.layers.gradient_checkpointing
    features, mask, labels = inputs()
    for rows in cuts:
        loss_of(model, features, mask, labels, rows).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_every_parameter_gets_a_gradient():
    found = gradients([slice(0, 8)])
    largest: dict[str, float] = {}
    for name, gradient in found.items():
        assert gradient is not None, name
        module = ".".join(name.split(".")[:2])
        largest[module] = max(largest.get(module, 0.0), gradient.norm().item())
    axes = dict(axes_of(small()))
    for name, gradient in found.items():  # of what is stacked, every part
        stacked = sum(axis.kind in ("fixed", "depth", "adds") for axis in axes[name][: max(1, gradient.dim() - 1)])
        least = (
            gradient.flatten(0, max(stacked - 1, 0)).flatten(1).norm(dim=1).min()
            if gradient.dim() > 1
            else gradient.norm()
        )
        assert least > 1e-10 * largest[".".join(name.split(".")[:2])], name


@pytest.mark.parametrize("size", [1, 3])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut_even_with_dropout(size: int):
    whole = gradients([slice(0, 8)])
    cut = gradients([slice(a, min(a + size, 8)) for a in range(0, 8, size)])
    for name in whole:
        assert (whole[name] - cut[name]).abs().max() <= 1e-10 * whole[name].abs().max().clamp(min=1e-3), name


def test_recomputed_layers_give_the_same_gradients():
    plain, recomputed = gradients([slice(0, 8)]), gradients([slice(0, 8)], checkpointing=True)
    assert all(torch.allclose(plain[n], recomputed[n], rtol=1e-12, atol=1e-14) for n in plain)


def test_padding_and_batch_mates_change_nothing():
    model = small().eval()
    features, mask, _ = inputs()
    together = model(features, mask)
    for row in range(8):
        length = int(mask[row].sum())
        alone = model(features[row : row + 1, :length], mask[row : row + 1, :length])
        answers = ("emotion_logits", "emotion_fine_logits", "vad_raw", "bentham_logits", "utility", "regret_logits")
        for name in (*answers, "regret_views", "surd_logits", "emotion_covariance"):
            assert torch.allclose(together[name][row], alone[name][0], rtol=1e-9, atol=1e-10), name


def test_regret_views_ascend_and_surd_shares_sum_to_one():
    outputs = small().eval()(*inputs()[:2])
    views, surd = outputs.regret_views, TASKS["surd"].predict(outputs)
    assert (views[:, 1:] > views[:, :-1]).all()
    assert views.min() >= 0
    assert views.max() < 1
    assert surd[:, :3].sum(-1).tolist() == pytest.approx([1.0] * 8, abs=1e-6)


@pytest.mark.parametrize(("mean", "spread"), [(-1.0, 0.3), (0.0, 1.0), (0.7, 0.2), (-0.2, 2.0)])
def test_expected_excess_is_the_integral(mean: float, spread: float):
    expected, _ = quad(lambda x: x * norm.pdf(x, mean, spread), 0, mean + 12 * spread if mean + 12 * spread > 0 else 1)
    got = expected_excess(torch.tensor(mean, dtype=torch.float64), torch.tensor(spread, dtype=torch.float64)).item()
    assert got == pytest.approx(expected, abs=1e-8)


def test_saving_and_loading_is_bitwise(tmp_path):
    model = small(dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    features, mask, _ = inputs(dtype=torch.float32)
    loaded = RedHeartModel.from_pretrained(tmp_path).eval()
    mine, theirs = model(features, mask), loaded(features, mask)
    assert set(mine) == set(theirs)
    tensors = [n for n in mine if isinstance(mine[n], torch.Tensor)]
    assert len(tensors) >= 19
    assert all(torch.equal(mine[n], theirs[n]) for n in tensors)
    assert all(torch.equal(a, theirs.readings[n][m]) for n, r in mine.readings.items() for m, a in r.items())


def test_auto_model_and_auto_config_know_the_network(tmp_path):
    from transformers import AutoConfig, AutoModel

    model = small(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RedHeartConfig)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, RedHeartModel)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_bf16_answers_are_near_those_in_fp32():
    model = small(dtype=torch.float32).eval()
    features, mask, _ = inputs(dtype=torch.float32)
    exact = model(features, mask)
    rounded = model.bfloat16()(features.bfloat16(), mask)
    for name in ("emotion_logits", "bentham_logits", "regret_logits", "surd_logits", "utility"):
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - exact[name]).abs().max() < 0.06 * exact[name].abs().max() + 0.06, name


def test_sizes_are_the_designs():
    with torch.device("meta"):
        counts = parameter_counts(build_model(load_config("330m"), None))
    design = {"backbone": 50e6, "heads.emotion": 22e6, "heads.bentham": 20e6, "heads.regret": 22e6, "heads.surd": 16e6}
    design |= {"analyzers.emotion": 50e6, "analyzers.bentham": 45e6, "analyzers.regret": 50e6, "analyzers.surd": 25e6}
    design |= {"aux.dsp": 10e6, "aux.kalman": 5e6, "aux.utility": 15e6}
    assert set(counts) == set(design)
    for name, size in design.items():
        assert counts[name] == pytest.approx(size, rel=0.02), name


def test_base_is_local_twice_as_wide():
    local, base = load_config("local").model, load_config("base").model
    assert (base.width, base.heads, base.task_width, base.task_heads) == tuple(
        2 * v for v in (local.width, local.heads, local.task_width, local.task_heads)
    )
    assert (base.layers, base.num_experts, base.encoder_width) == (local.layers, local.num_experts, local.encoder_width)


def test_dropout_is_a_function_of_the_sample_and_drops_its_share():
    model = torch.nn.Sequential(SampleDropout(50, 0.2), SampleDropout(50, 0.2))
    draw, keys, x = DropoutMasks(model).draw, torch.arange(2000), torch.ones(2000, 3, 50)
    masks = draw(keys, torch.float32)
    whole = model[0](x, masks)
    assert (whole == 0).double().mean().item() == pytest.approx(0.2, abs=0.005)
    assert whole.mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(whole[:, 0], whole[:, 2])
    picked = torch.tensor([1999, 4, 77])
    assert torch.equal(model[0](x[:3], draw(keys[picked], torch.float32)), whole[picked])
    assert not torch.equal(model[1](x, masks), whole)
    rows = torch.corrcoef((whole[:200, 0] == 0).double())
    assert (rows - torch.eye(200)).abs().mean() < 0.15  # as independent rows of 50 are (expected 0.113)
    assert model[0](x, None) is x
    with pytest.raises(ValueError, match="sample_keys"):
        draw(None, torch.float32)


def test_every_site_of_the_network_draws_its_own_mask():
    """Two layers that follow one another, or any two: what both drop is what independent masks do."""
    model = small(dropout=0.5)
    drawn = model.dropout_masks.draw(torch.arange(64), torch.float64)
    by_width: dict[int, list[torch.Tensor]] = {}
    for module in model.modules():
        if isinstance(module, SampleDropout):
            own = drawn[:, module.column : module.column + module.count * module.width]
            by_width.setdefault(module.width, []).extend(own.split(module.width, 1))
    for width, masks in by_width.items():
        signs = torch.stack(masks).flatten(1) - 1
        cosines = (signs @ signs.T / signs.shape[1]).triu(1)
        assert cosines.abs().max() < 6 / (64 * width) ** 0.5, width


def test_every_dropout_of_the_network_is_used_where_its_columns_are():
    """Dropping everything at one site changes an answer; at no site does it change none."""
    model, (features, mask, _) = small(dropout=0.5), inputs(rows=4)
    ones = torch.ones(4, sum(m.count * m.width for m in model.modules() if isinstance(m, SampleDropout)))
    rows = torch.tensor([0, 2])

    def answers(masks: torch.Tensor) -> torch.Tensor:
        model.dropout_masks.draw = lambda keys, dtype: masks[[0, 1, 2, 3, 0, 2]].to(dtype)
        with torch.no_grad():
            outputs = model(features, mask, features.flip(-1)[rows], mask[rows], rows, torch.arange(4))
        return torch.cat([x.flatten() for x in tensors_of(outputs).values()])

    plain = answers(ones)
    for module in model.modules():
        if isinstance(module, SampleDropout):
            for site in range(module.count):
                masks, start = ones.clone(), module.column + site * module.width
                masks[:, start : start + module.width] = 0
                assert not torch.equal(answers(masks), plain), (module.site, site)
