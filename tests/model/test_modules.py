"""Analyzers, DSP simulator, Kalman filter, fusion: what they compute, and that each of them is heard."""

import math

import pytest
import torch
from torch import nn

from redheart.config import LossConfig, load_config
from redheart.model.analyzers import SUBSETS, VAD_SCALE, EmotionAnalyzer, pointwise_ladder
from redheart.model.axes import Width
from redheart.model.backbone import Backbone, EncoderStack, TaskPooling
from redheart.model.build import build_model
from redheart.model.dropout import DropoutMasks, SampleDropout, mix_bits
from redheart.model.dynamics import TOKEN_RATE_HZ, KalmanFusion
from redheart.model.layers import (
    Attention,
    BranchAttention,
    QueryStack,
    Residual,
    ResidualChain,
    attention_bias,
    query_layer,
)
from redheart.model.moe import DenseMixture, inert
from redheart.model.outputs import ANSWER_FIELDS
from redheart.model.parts import PARTS, units
from redheart.model.redheart import RedHeartConfig, RedHeartModel, RedHeartOutput
from redheart.model.select import FEEDS, MODULES, ExecutionMode, select
from redheart.schema import LABELS, RedHeartError
from redheart.signals.kalman import kalman_filter
from redheart.tasks import TASKS, task_losses

SMALL = {"width": 24, "heads": 2, "layers": 1, "task_width": 16, "task_heads": 2, "dropout": 0.0}
REMOVABLE = [m for m in MODULES if m != "backbone"]


@pytest.fixture(scope="module")
def network() -> RedHeartModel:
    torch.manual_seed(0)
    made = RedHeartModel(RedHeartConfig(**SMALL)).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # away from where initial values happen to agree
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, 6, 768, generator=generator, dtype=torch.float64)
    mask = torch.arange(6)[None] < torch.tensor([[6], [3], [1], [5]])
    return features * mask[..., None], mask


def ask(network, batch, without=()) -> RedHeartOutput:
    x, mask = batch
    with torch.no_grad():
        return network(x, mask, x[:2].flip(-1), mask[:2], torch.tensor([0, 3]), without=without)


def predictions(outputs) -> dict[str, torch.Tensor]:
    found = {name: task.predict(outputs) for name, task in TASKS.items()}
    return {name: p for name, p in found.items() if p is not None}


@pytest.mark.parametrize("module", REMOVABLE)
def test_removing_a_module_changes_the_answers_it_feeds_and_no_other(network, batch, module: str):
    whole, without = predictions(ask(network, batch)), predictions(ask(network, batch, [module]))
    heirs = {module}  # the module, and whatever takes readings from it
    for _ in MODULES:
        heirs |= {m for m, sources in FEEDS.items() if heirs & set(sources)}
    for name, task in TASKS.items():
        if task.module == module and not task.final:
            assert name not in without
        elif name in without:
            changed = not torch.allclose(whole[name], without[name], rtol=1e-9, atol=1e-12)
            fed = bool(heirs & {task.module}) and (
                name != "preference" or module in ("heads.bentham", "analyzers.bentham", "aux.utility")
            )
            assert changed == fed, name


@pytest.mark.parametrize("module", REMOVABLE)
def test_a_network_built_without_a_module_trains(module: str):
    torch.manual_seed(0)
    network = RedHeartModel(RedHeartConfig(**SMALL, ablate=[module])).train()
    x = torch.randn(3, 4, 768)
    mask = torch.ones(3, 4, dtype=torch.bool)
    outputs = network(x, mask, x[:1].flip(-1), mask[:1], torch.tensor([1]), torch.arange(3))
    labels = {n: torch.rand(3, label.size) for n, label in LABELS.items()}
    losses = task_losses(outputs, labels, {n: torch.ones_like(v) for n, v in labels.items()}, LossConfig())
    assert not any(name.startswith(module + "/") for name in losses)
    sum(value for value, _ in losses.values()).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    assert module not in network.built


def test_every_module_that_reads_a_label_says_so_in_the_table():
    assert {part.name for part in PARTS} | {"backbone", "aux.utility"} == set(MODULES)
    assert {m for s in FEEDS.values() for m in s} | set(FEEDS) <= set(MODULES)


def test_the_fusion_shifts_answers_by_their_units(network, batch):
    before = ask(network, batch)
    with torch.no_grad():
        network.aux["utility"].shift.bias.add_(1.0)
    try:
        after = ask(network, batch)
    finally:
        with torch.no_grad():
            network.aux["utility"].shift.bias.sub_(1.0)
    for label, unit in units().items():
        if label != "preference":  # which fusion gives as a sum
            moved = after[ANSWER_FIELDS[label]] - before[ANSWER_FIELDS[label]]
            torch.testing.assert_close(moved, torch.full_like(moved, unit))
    assert units()["vad"] == VAD_SCALE != units()["regret"] == 1


def test_selection_by_mode():
    assert select(ExecutionMode.TRAINING).trained == MODULES
    assert select(ExecutionMode.EVALUATION).trained == ()
    only = select(ExecutionMode.INFERENCE, wanted=["heads.surd"])
    assert only.resident == ("backbone", "heads.emotion", "heads.bentham", "heads.regret", "heads.surd")
    assert "aux.dsp" in select(ExecutionMode.INFERENCE, wanted=["aux.kalman"]).resident
    with pytest.raises(RedHeartError, match=r"name them in model.ablate"):
        select(ExecutionMode.TRAINING, wanted=[m for m in MODULES if m != "aux.dsp"])
    assert "aux.dsp" not in select(ExecutionMode.TRAINING, ["aux.dsp"]).built
    with pytest.raises(RedHeartError, match="backbone cannot"):
        select(ExecutionMode.TRAINING, ["backbone"])
    with pytest.raises(RedHeartError, match="unknown module 'dsp'"):
        select(ExecutionMode.TRAINING, ["dsp"])


def test_modes_set_gradients_and_leave_modules_idle(batch):
    torch.manual_seed(0)
    network = RedHeartModel(RedHeartConfig(**SMALL)).double()
    network.set_mode(ExecutionMode.EVALUATION)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    whole = ask(network, batch)
    network.set_mode(ExecutionMode.INFERENCE, ["heads.emotion"])
    only = ask(network, batch)
    assert only.bentham_logits is None
    assert only.utility is None
    assert torch.equal(only.emotion_logits, whole.readings["emotion"]["heads.emotion"])
    network.set_mode(ExecutionMode.TRAINING)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert network.idle == frozenset()


def multihead(x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None, heads: int, weights) -> torch.Tensor:
    """Attention by torch's own module, of weights (query, key, value, out) and without biases."""
    module = nn.MultiheadAttention(x.shape[-1], heads, bias=False, batch_first=True).double()
    *projections, out = weights
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat(projections))
        module.out_proj.weight.copy_(out)
        return module(x, memory, memory, key_padding_mask=None if mask is None else ~mask, need_weights=False)[0]


def test_attention_is_torchs():
    attention, x = Attention(Width(12), 3).double(), torch.randn(2, 7, 12).double()
    q, v, k = attention.weight
    normed = attention.norm(x)
    expected = x + multihead(normed, normed, None, 3, (q, k, v, attention.out_weight))
    assert torch.allclose(attention(x), expected, atol=1e-12)


def test_an_encoder_layer_is_attention_and_an_mlp_on_the_stream():
    torch.manual_seed(0)
    stack, x, norm = EncoderStack(2, Width(12), 3).double(), torch.randn(2, 7, 12).double(), nn.functional.layer_norm
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    mask = torch.tensor([[True] * 7, [True, False, True, True, False, False, False]])
    expected = x
    for i in range(2):
        (a, b), (c, d) = stack.norms[i]
        q, v, k = stack.attention_weight[i]
        normed = norm(expected, (12,), a, b)
        expected = expected + multihead(normed, normed, mask, 3, (q, k, v, stack.out_weight[i]))
        hidden = nn.functional.gelu(norm(expected, (12,), c, d) @ stack.up_weight[i].T + stack.up_bias[i])
        expected = expected + hidden @ stack.down_weight[i].T
    assert torch.allclose(stack(x, attention_bias(mask, x.dtype)), expected, atol=1e-12)


def test_a_fresh_network_passes_on_what_it_reads():
    """Of a feature that enters six layers, pooling's refinements and the emotion head, the answers still see most: the cosine of what
    enters a chain of residual blocks with what leaves it is above 0.98 (0.78 to 0.97 where branches start at full size)."""
    torch.manual_seed(0)
    width, x = Width(32), torch.randn(16, 9, 32)
    tokens, feature = EncoderStack(6, width, 2)(x, None), x[:, 0]
    blocks = Residual(width, width, dropout=0.0), BranchAttention(width, 2, 2 * width, 0.0)
    chain = ResidualChain(3, width, 4 * width, 0.0)(feature, None)[-1]
    found = [(x, tokens), (feature, chain), (feature, blocks[0](feature, None)), (feature, blocks[1](feature, x, None))]
    for before, after in found:
        assert nn.functional.cosine_similarity(before, after, -1).mean() > 0.98


def test_a_fresh_network_hears_the_text_in_every_answer():
    """What says nearly the same of all texts at first gives the backbone a gradient that is small beside the others'; a rare verdict
    then is never learned. Views of regret alone are fainter: their observers' outcomes are near zero at first."""
    torch.manual_seed(0)
    network = RedHeartModel(RedHeartConfig(encoder_width=32)).eval()
    texts = torch.randn(64, 12, 32) + torch.randn(64, 1, 32)
    with torch.no_grad():
        outputs = network(texts, contrast_features=texts.roll(1, 0), contrast_rows=torch.arange(64))
    of = units()
    spread = {n: t.raw(outputs).flatten(1).std(0).mean().item() / of.get(t.label, 1.0) for n, t in TASKS.items()}
    assert {name: round(value, 3) for name, value in spread.items() if value < 0.04} == {
        "regret_views": pytest.approx(0.008, abs=0.004)
    }
    assert spread["ethics"] > 0.1


def test_fresh_queries_of_pooling_look_somewhere():
    torch.manual_seed(0)
    pooling, x = TaskPooling(Width(32), Width(16), 2), torch.randn(16, 20, 32)
    folded = (pooling.query[..., None, :] @ pooling.key_weight).flatten(0, 2)  # [tasks · heads, D]
    weights = (x @ folded.T / 8**0.5).softmax(1)
    assert weights.amax(1).mean() > 1.5 / 20  # nearly even (1.05 / 20) where they start at 0.02


def test_a_fresh_stack_draws_every_layer_and_every_part_for_itself():
    """As torch's Linear draws them, no two alike; norms begin as identities."""
    torch.manual_seed(0)
    network = RedHeartModel(RedHeartConfig(**{**SMALL, "width": 48, "layers": 3}))
    stack = network.analyzers["emotion"].layers
    ones, zeros = stack.norms.unbind(2)
    assert (ones == 1).all()
    assert (zeros == 0).all()
    for parts, bound in [
        (stack.square_weight[:, :3], 48**-0.5),
        (stack.square_weight[:, 3:], 0.1 * 48**-0.5),
        (stack.exchange_weight, 48**-0.5),
        (stack.up_bias[:, None], 48**-0.5),
        (stack.down_weight[:, None], 0.1 * 192**-0.5),
    ]:
        flat = parts.detach().flatten(0, 1).flatten(1)
        assert flat.abs().max() <= bound * (1 + 1e-6)
        assert flat.std() == pytest.approx(bound / 3**0.5, rel=0.15)
        assert len(flat.unique(dim=0)) == len(flat)
    constant = ("norms", "pooling.value_bias", "observation_weight")  # ones and zeros on purpose
    for name, parameter in network.named_parameters():  # nor anywhere else
        if parameter.dim() > 2 and not name.endswith(constant):
            rows = parameter.detach().flatten(0, -2)
            assert len(rows.unique(dim=0)) == len(rows), name


@pytest.mark.parametrize("sides", [1, 2])
def test_a_stack_of_query_layers_is_what_its_layers_are_one_by_one(sides):
    torch.manual_seed(0)
    stack = QueryStack(2, Width(12), 3, 0.0, sides).double()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x, memory = torch.randn(2, 4, 12).double(), torch.randn(2, 7, 12).double()
    mask = torch.tensor([[True] * 7, [True, False, True, True, False, False, False]])
    expected, norm = x, nn.functional.layer_norm
    for i in range(2):
        (a, b), (c, d), (e, f) = stack.norms[i]
        shape, (*read_weights, out_weight) = (12,), stack.square_weight[i]
        expected = expected + multihead(norm(expected, shape, a, b), memory, mask, 3, read_weights)
        q, v, k = stack.exchange_weight[i]
        normed, weights = norm(expected, shape, c, d), (q, k, v, out_weight)
        if sides == 1:
            heard = multihead(normed, normed, None, 3, weights)
        else:
            one, other = normed[:, :2], normed[:, 2:]
            heard = torch.cat([multihead(one, other, None, 3, weights), multihead(other, one, None, 3, weights)], 1)
        expected = expected + heard
        hidden = nn.functional.gelu(norm(expected, shape, e, f) @ stack.up_weight[i].T + stack.up_bias[i])
        expected = expected + hidden @ stack.down_weight[i].T
    assert torch.allclose(stack(x, memory, attention_bias(mask, x.dtype), None), expected, atol=1e-12)


@pytest.mark.parametrize("sides", [1, 2])
def test_gradients_of_query_layers_made_together_are_those_of_autograd_a_layer_at_a_time(sides):
    torch.manual_seed(0)
    stack = QueryStack(3, Width(12), 3, 0.25, sides).double()
    DropoutMasks(stack)
    masks = (torch.rand(2, 3 * 12 + 3 * 48) > 0.3).double()
    query, memory = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 12), (2, 7, 12)))
    leaves, found = [query, memory, *stack.parameters()], []
    for layer in (None, lambda *given: query_layer(*given)):  # a layer of someone else's notes nothing
        stack.compiled_layer = layer
        out = stack(query, memory, None, masks).square().sum()
        once = torch.autograd.grad(out, leaves, retain_graph=True)
        again = torch.autograd.grad(out, leaves[1:2], retain_graph=True)  # and not of the weights
        found += [once, (once[0], *again, *torch.autograd.grad(out, leaves)[2:])]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(a.abs().max()))
    assert all(g.abs().amax(tuple(range(1, g.dim()))).gt(0).all() for g in found[0][2:])  # every layer has its own


def test_masks_are_those_of_the_formula_and_no_two_sites_share_one():
    """A channel is kept where the hash of (position, site) and of the channel, in unsigned 32-bit numbers, is not below p."""
    model = nn.Sequential(SampleDropout(6, 0.25), SampleDropout(5, 0.25, 3))
    keys = torch.tensor([0, 7, (1 << 31) + 7, 123456789012])
    got = DropoutMasks(model).draw(keys, torch.float64)

    def mixed(x: int) -> int:
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
        return x ^ (x >> 16)

    columns = [(0, c) for c in range(6)] + [(site, c) for site in (1, 2, 3) for c in range(5)]
    for row, key in zip(got, keys.tolist(), strict=True):
        for value, (site, channel) in zip(row.tolist(), columns, strict=True):
            bits = mixed(mixed((key + 0x9E3779B1 * (site + 1)) % 2**32) ^ mixed(channel))
            assert value == (1 / 0.75 if bits >= 2**30 else 0.0)
    x = torch.ones(4, 3, 5, dtype=torch.float64)
    assert torch.equal(model[1](x, got), got[:, 6:].view(4, 3, 5))
    assert torch.equal(model[1].at(2, x, got), got[:, None, 16:].expand(-1, 3, -1))
    assert (mix_bits(torch.arange(1000, dtype=torch.int32)) < 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_no_two_dropouts_of_the_network_share_columns():
    network = RedHeartModel(RedHeartConfig(**{**SMALL, "dropout": 0.1}))
    sites = [m for m in network.modules() if isinstance(m, SampleDropout)]
    ends = [m.column + m.count * m.width for m in sites]
    assert [m.column for m in sites] == [0, *ends[:-1]]
    assert [m.site for m in sites] == [sum(m.count for m in sites[:i]) for i in range(len(sites))]


def test_task_pooling_is_attention_with_a_learned_query():
    pooling = TaskPooling(Width(12), Width(8), 2).double()
    x, mask = torch.randn(2, 5, 12).double(), torch.tensor([[True] * 5, [True, True, False, True, False]])
    got = pooling(x, attention_bias(mask, x.dtype))
    for task in range(4):
        k = torch.einsum("btn,hdn->bhtd", x, pooling.key_weight[task])
        v = torch.einsum("btn,hdn->bhtd", x, pooling.value_weight[task]) + pooling.value_bias[task][None, :, None]
        scores = torch.einsum("hd,bhtd->bht", pooling.query[task], k) / math.sqrt(4)
        p = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        assert torch.allclose(got[:, task], torch.einsum("bht,bhtd->bhd", p, v).flatten(1), atol=1e-12)


def test_an_emotion_of_the_text_lies_between_the_mean_and_the_peak_of_its_trajectory():
    torch.manual_seed(0)
    analyzer = EmotionAnalyzer(Width(24), 2, 1, 0.0).double()
    mask = torch.arange(6)[None] < torch.tensor([[6], [2]])
    reading = analyzer(torch.randn(2, 6, 24).double(), mask, attention_bias(mask, torch.float64), None)
    for row, length in enumerate((6, 2)):
        trajectory = reading.trajectory[row, :length]
        assert (reading.emotion_logits[row] <= trajectory.amax(0)).all()
        assert (reading.emotion_logits[row] >= trajectory.mean(0)).all()


def log_density(rows: dict[tuple[int, ...], list[float]]) -> torch.Tensor:
    return torch.tensor([rows[s] for s in SUBSETS], dtype=torch.float64).log()[None]


def test_the_ladder_knows_redundancy_uniqueness_and_synergy():
    even, sure = [1 / 3] * 3, [0.98, 0.01, 0.01]
    everything = dict.fromkeys(SUBSETS, sure) | {(): even}
    (shares,), (leak,) = pointwise_ladder(log_density(everything))
    assert shares.argmax() == 0
    assert shares[0] > 0.99
    assert leak == pytest.approx(1 - (0.98**2 + 2 * 0.01**2))
    one = {s: sure if 0 in s else even for s in SUBSETS}
    assert pointwise_ladder(log_density(one))[0][0, 1] > 0.99
    together = {s: sure if len(s) > 1 else even for s in SUBSETS}
    assert pointwise_ladder(log_density(together))[0][0, 2] > 0.99
    nothing = dict.fromkeys(SUBSETS, even)
    assert pointwise_ladder(log_density(nothing))[0][0].tolist() == pytest.approx([1 / 3] * 3)


def test_the_fused_emotion_is_the_kalman_filters_last_state():
    torch.manual_seed(0)
    module = KalmanFusion(Width(8), Width(6), 0.0).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokens, feature = torch.randn(1, 5, 8).double(), torch.randn(1, 6).double()
    head, analyzer, dsp = torch.randn(1, 7).double(), torch.randn(1, 5, 7).double(), torch.randn(1, 5, 7).double()
    mask = torch.ones(1, 5, dtype=torch.bool)
    got = module(tokens, mask, tokens.mean(1), feature, head, analyzer, dsp, None)
    # the same filter step by step; the head is one more measurement after the last token, without a prediction
    prior = module.prior(torch.cat([tokens.mean(1), feature], -1), None)
    x0, p0 = prior[:, :14], torch.diag_embed(10 * torch.sigmoid(prior[:, 14:28]))
    noise = torch.exp(4 * torch.tanh(module.token_noise(tokens, None) / 4))
    weight = module.transition_weight
    transition = weight / torch.linalg.matrix_norm(weight, 2).clamp(min=1)
    factor = module.process_weight.tril()
    q = factor @ factor.mT + 1e-4 * torch.eye(14).double()
    h = module.observation_weight
    z = torch.cat([analyzer - module.observation_bias[1], dsp - module.observation_bias[2]], -1)
    steps = kalman_filter(z, transition, torch.cat([h[1], h[2]]), q, torch.diag_embed(noise), x0, p0)
    r = torch.diag_embed(torch.exp(4 * torch.tanh(prior[:, 28:] / 4)))
    eye, zero = torch.eye(14).double(), torch.zeros(14, 14).double()
    last = kalman_filter(
        (head - module.observation_bias[0])[:, None], eye, h[0], zero, r, steps.mean[:, -1], steps.covariance[:, -1]
    )
    assert torch.allclose(got.emotion_logits, last.mean[:, 0, :7], atol=1e-9)
    assert torch.allclose(got.covariance, last.covariance[:, 0, :7, :7], atol=1e-9)


def test_the_covariance_stays_positive_definite_in_fp32():
    torch.manual_seed(0)
    module = KalmanFusion(Width(8), Width(6), 0.0)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3).add_(torch.randn_like(p))
    tokens = torch.randn(8, 512, 8) * 3
    readings = (torch.randn(8, 7) * 5, torch.randn(8, 512, 7) * 5, torch.randn(8, 512, 7) * 5)
    got = module(tokens, torch.ones(8, 512, dtype=torch.bool), tokens.mean(1), torch.randn(8, 6), *readings, None)
    assert torch.linalg.eigvalsh(got.covariance.double()).min() > 0
    assert got.emotion_logits.isfinite().all()


def test_signals_are_silent_without_a_drive_and_stay_bounded(network):
    tokens, mask = torch.randn(2, 40, 24).double() * 10, torch.ones(2, 40, dtype=torch.bool)
    dsp = network.aux["dsp"]
    pooled = tokens.mean(1)
    signals, _ = dsp(tokens, mask, pooled, torch.randn(2, 16).double(), 100 * torch.randn(2, 40, 7).double(), None)
    assert signals.isfinite().all()
    late, _ = dsp(tokens, mask & (torch.arange(40) >= 20), pooled, torch.randn(2, 16).double(), None, None)
    assert late[:, :20].abs().max() < 1e-12 * late.abs().max()
    assert late[:, 20:].abs().max() > 1e-3
    assert TOKEN_RATE_HZ > 2 * 1.0  # the fastest oscillator lies below half the token rate


def test_an_inert_gate_is_one_that_never_learned():
    torch.manual_seed(0)
    mixture, x = DenseMixture(Width(8), Width(16), 4, 0.0), torch.randn(3, 8)
    told, _ = mixture(x, None)
    with inert(mixture.gate):
        even, logits = mixture(x, None)
    assert not logits.any()
    assert torch.equal(mixture(x, None)[0], told)
    with torch.no_grad():
        mixture.gate.weight.zero_()
        mixture.gate.bias.zero_()
    assert torch.equal(mixture(x, None)[0], even)
    assert not torch.allclose(even, told)


def test_a_single_expert_is_a_plain_network():
    mixture, single = DenseMixture(Width(8), Width(16), 8, 0.0), DenseMixture(Width(8), Width(128), 1, 0.0)
    sizes = [
        sum(p.numel() for n, p in m.named_parameters() if "weight" in n and "gate" not in n) for m in (mixture, single)
    ]
    assert sizes[0] == sizes[1]
    x = torch.randn(3, 8)
    inner, outer = single.experts.linears
    hidden = nn.functional.gelu(x @ inner.weight[0].T + inner.bias[0])
    assert torch.allclose(single(x, None)[0], hidden @ outer.weight[0].T + outer.bias[0], atol=1e-6)
    assert single(x, None)[1] is None


def test_the_backbone_compiles_without_graph_breaks():
    torch.manual_seed(0)
    backbone = Backbone(16, Width(24), 2, 2, Width(16), 2, 0.1).train()
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    x, masks = torch.randn(2, 5, 16), DropoutMasks(backbone).draw(torch.arange(2), torch.float32)
    bias = attention_bias(torch.ones(2, 5, dtype=torch.bool), x.dtype)
    for a, b in zip(compiled(x, bias, masks), backbone(x, bias, masks), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_the_whole_network_compiles_without_graph_breaks():
    torch.manual_seed(0)
    network = RedHeartModel(RedHeartConfig(**{**SMALL, "dropout": 0.1})).train()
    x, mask, rows = torch.randn(3, 5, 768), torch.ones(3, 5, dtype=torch.bool), torch.tensor([0, 2])
    given = (x, mask, x[:2].flip(-1), mask[:2], rows, torch.arange(3))
    compiled, plain = torch.compile(network, fullgraph=True, backend="aot_eager")(*given), network(*given)
    for name, task in TASKS.items():
        assert torch.allclose(task.raw(compiled), task.raw(plain), atol=1e-5), name


def test_meta_build_is_quick_and_of_the_designs_size():
    import time

    started = time.perf_counter()
    with torch.device("meta"):
        totals = {p: sum(x.numel() for x in build_model(load_config(p), None).parameters()) for p in ("330m", "1b3")}
    assert time.perf_counter() - started < 10
    assert -0.005 <= totals["330m"] / 330e6 - 1 <= 0.01
    assert totals["1b3"] == pytest.approx(1.32e9, rel=0.01)
