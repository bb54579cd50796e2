"""What users of Transformers expect of a model: masks of any kind, outputs on demand, quantised and offloaded weights."""

import pytest
import torch
from transformers import AutoModel, BitsAndBytesConfig, QuantoConfig

from redheart.config import LossConfig
from redheart.model.layers import attention_bias
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.schema import RedHeartError
from redheart.tasks import task_losses
from tests.model.test_model import SMALL, inputs, small

ANSWERS = (
    "emotion_logits",
    "vad_raw",
    "utility",
    "regret_logits",
    "surd_logits",
    "emotion_covariance",
    "task_features",
)
TOKENS = ("trajectory", "signals")


@pytest.fixture(scope="module")
def model():
    return small(dropout=0.0).eval()


@pytest.fixture(scope="module")
def given():
    return inputs()[:2]


@pytest.fixture(scope="module")
def expected(model, given):
    with torch.no_grad():
        return model(*given, output_hidden_states=True)


def rolled(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same rows, padded on the left."""
    return torch.stack([row.roll(int((~m).sum()), 0) for row, m in zip(x, mask, strict=True)])


def same(a, b, mask=None, other=None) -> None:
    for name in ANSWERS:
        assert torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-10), name
    for name in TOKENS:
        mine = a[name] if mask is None else a[name][mask]
        theirs = b[name] if other is None else b[name][other]
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-10), name


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_a_mask_may_be_of_any_whole_type(model, given, expected, dtype):
    same(expected, model(given[0], given[1].to(dtype)))


def test_padding_may_stand_on_either_side_and_tokens_keep_their_places(model, given, expected):
    features, mask = given
    left = rolled(mask, mask)
    found = model(rolled(features, mask), left.long(), output_hidden_states=True)
    same(expected, found, mask, left)
    for mine, theirs in zip(expected.hidden_states, found.hidden_states, strict=True):
        assert torch.allclose(mine[mask], theirs[left], rtol=1e-9, atol=1e-10)


def test_tokens_masked_in_the_middle_are_as_if_they_were_not_there(model, given):
    features, mask = given[0][:, :4], torch.ones(8, 4, dtype=torch.bool)
    holes = torch.tensor([True, False, True, True]).expand(8, 4)
    short, long = model(features[:, [0, 2, 3]], mask[:, :3]), model(features, holes)
    for name in ANSWERS:
        assert torch.allclose(short[name], long[name], rtol=1e-9, atol=1e-10), name
    assert torch.allclose(short.trajectory, long.trajectory[:, [0, 2, 3]], rtol=1e-9, atol=1e-10)


def test_left_padded_contrasts_are_the_same_contrasts(model, given):
    features, mask = given
    rows = torch.tensor([1, 4])
    whole = model(features, mask, features.flip(-1)[rows], mask[rows], rows)
    left = model(
        features, mask, rolled(features.flip(-1)[rows], mask[rows]), rolled(mask[rows], mask[rows]).int(), rows
    )
    assert torch.allclose(whole.utility_difference, left.utility_difference, rtol=1e-9, atol=1e-10)
    assert whole.utility_difference[rows].abs().min() > 0


def test_without_a_mask_every_token_is_real(model, given):
    same(model(given[0], torch.ones_like(given[1])), model(given[0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, m: (f, m.double()), "bool or of integers"),
        (lambda f, m: (f, m[:, :-1]), r"must be \[8, 5\].*got \[8, 4\]"),
        (lambda f, m: (f, m[:, None, None]), r"must be \[8, 5\].*got \[8, 1, 1, 5\]"),
        (lambda f, m: (f[..., :-1], m), r"features must be \[texts, tokens, 768\].*got \[8, 5, 767\]"),
        (lambda f, m: (f[0], m[0]), r"features must be \[texts, tokens, 768\]"),
        (lambda f, m: (f, m, f[:2], m[:2]), "contrast_features and contrast_rows belong together"),
        (lambda f, m: (f, m, f[:2], m[:2], torch.tensor([1])), r"contrast_rows must be int64 \[2\].*int64 \[1\]"),
        (lambda f, m: (f, m, f[:2], m[:2], torch.tensor([0, 1]).int()), r"contrast_rows must be int64 \[2\].*int32"),
        (lambda f, m: (f[:0], m[:0]), "must hold a text and a token"),
        (lambda f, m: (f[:, :0], m[:, :0]), "must hold a text and a token"),
    ],
)
def test_what_does_not_fit_is_named(model, given, change, words):
    with pytest.raises(ValueError, match=words):
        model(*change(*given))


def test_hidden_states_and_tuples_on_demand_and_attention_maps_never(model, given, expected):
    states = expected.hidden_states
    assert len(states) == SMALL["layers"] + 1
    assert all(s.shape == (8, 5, SMALL["width"]) for s in states)
    last = model.backbone.norm(states[-1])
    assert torch.allclose(
        last, model.backbone(given[0], attention_bias(given[1], torch.float64), None)[0], rtol=1e-9, atol=1e-10
    )
    inner = model(*given, output_hidden_states=True)
    inner.hidden_states[1].retain_grad()
    inner.emotion_logits.sum().backward()
    assert inner.hidden_states[1].grad.abs().max() > 0
    model.zero_grad()
    plain = model(*given)
    assert "hidden_states" not in plain
    as_tuple = model(*given, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(plain)
    assert torch.equal(as_tuple[0], plain.emotion_logits)
    with pytest.raises(ValueError, match="attention maps are never formed"):
        model(*given, output_attentions=True)
    model.config.output_hidden_states = True
    try:
        assert len(model(*given).hidden_states) == len(states)
    finally:
        model.config.output_hidden_states = False


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory, inputs, answers) of a network that is wide enough for quantised weights, in fp32."""
    torch.manual_seed(0)
    network = RedHeartModel(RedHeartConfig(width=128, heads=4, layers=2, task_width=64, task_heads=2)).eval()
    directory = tmp_path_factory.mktemp("saved")
    network.save_pretrained(directory)
    features, mask, _ = inputs(dtype=torch.float32)
    with torch.no_grad():
        return directory, (features, mask), network(features, mask)


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": QuantoConfig(weights="int8")},
    ],
    ids=["8 bits", "4 bits", "bitsandbytes", "as a dictionary", "quanto"],
)
def test_quantised_weights_are_refused_by_name(saved, options):
    """Linear layers alone are quantised, and most weights here are of stacked parts: little would be saved, and nobody would be told."""
    for kind in (RedHeartModel, AutoModel):
        with pytest.raises(RedHeartError, match=f"{next(iter(options))}.*dtype=torch.bfloat16"):
            kind.from_pretrained(saved[0], **options)


def test_dynamic_quantisation_finds_nothing_to_quantise(saved):
    """torch's knows Linear itself and not its heirs: the answers stay what they are."""
    directory, given, expected = saved
    network = RedHeartModel.from_pretrained(directory).eval()
    untouched = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, dtype=torch.qint8)
    assert not [n for n, m in untouched.named_modules() if "quantized" in type(m).__module__]
    with torch.no_grad():
        found = untouched(*given)
    for name in (*ANSWERS, *TOKENS):
        assert torch.equal(found[name], expected[name]), name


def test_a_network_that_was_asked_in_inference_mode_can_be_trained_afterwards():
    """What is made once and kept is made for both."""
    network, (features, mask, labels) = small(dropout=0.1), inputs()
    rows, keys = torch.tensor([0, 3]), torch.arange(8)
    ones = {name: torch.ones_like(value) for name, value in labels.items()}
    with torch.inference_mode():
        outputs = network(features, mask, features[rows], mask[rows], rows, keys)
        task_losses(outputs, labels, ones, LossConfig())
    outputs = network(features, mask, features[rows], mask[rows], rows, keys)
    sum(value for value, _ in task_losses(outputs, labels, ones, LossConfig()).values()).backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_accelerate_keeps_elsewhere_give_the_same_answers(saved, tmp_path, where):
    import accelerate

    directory, given, expected = saved
    network = RedHeartModel.from_pretrained(directory).eval()
    if where == "cpu":
        accelerate.cpu_offload(network, execution_device="cpu")
    else:
        accelerate.disk_offload(network, tmp_path, execution_device="cpu")
    assert all(p.is_meta for p in network.parameters())
    with torch.no_grad():
        found = network(*given)
    for name in (*ANSWERS, *TOKENS):
        assert torch.equal(found[name], expected[name]), name
