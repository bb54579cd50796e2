"""A fresh network says about what the best constant predictor says."""

import pytest
import torch

from redheart.causality.levels import LEVELS
from redheart.config import LossConfig, load_config
from redheart.model.analyzers import VAD_SCALE
from redheart.model.build import build_model
from redheart.model.heads.regret import RegretHead
from redheart.model.parts import PARTS
from redheart.model.prior import Start, start_at
from redheart.schema import LABELS
from redheart.tasks import TASKS, constant_losses, task_losses, what_is_known
from tests.train.two_ranks import SETTINGS, make_batch


def skewed_labels():
    """One text in eight regrets, one is acceptable, ratings hardly move."""
    batch = make_batch(range(8))
    labels = {name: value.clone() for name, value in batch.labels.items()}
    labels["regret"] = (labels["regret"] > labels["regret"].max() - 1e-6).float()
    labels["acceptability"] = (labels["acceptability"] > labels["acceptability"].max() - 1e-6).float()
    labels["vad"] = 0.1 + 0.1 * labels["vad"]
    return batch, labels


def losses_of(network, batch, labels) -> dict[str, float]:
    with torch.no_grad():
        outputs = network.eval()(batch.features, batch.mask)
    found = task_losses(outputs, labels, batch.weights, LossConfig())
    return {name: float(value / count) for name, (value, count) in found.items() if name in TASKS and count > 0}


def test_answers_start_near_the_constant_predictor():
    batch, labels = skewed_labels()
    best = constant_losses(labels, batch.weights, LossConfig())
    known = what_is_known(labels, batch.weights, best, LossConfig())
    config = load_config("local", SETTINGS)
    torch.manual_seed(0)
    plain = losses_of(build_model(config, None), batch, labels)
    torch.manual_seed(0)
    started = losses_of(build_model(config, None, lambda n, m: start_at(n, m, known)), batch, labels)
    for name in ("regret", "vad", "acceptability", "analyzers.regret/regret", "analyzers.surd/density"):
        assert started[name] < 1.5 * max(best[name], 0.01), name
        assert started[name] < plain[name], name


def test_every_place_is_there_and_takes_its_answer():
    network = build_model(load_config("local", SETTINGS), None)
    raw = {label: torch.full((LABELS[label].size,), 0.25) for label in ("acceptability", "ethics", "vad")}
    for part in PARTS:
        for answer in part.answers:
            if answer.prior:
                bias = network.get_submodule(part.name).get_parameter(answer.prior.bias)
                assert bias.numel() in (LABELS[answer.label].size, LEVELS)
        start_at(part.name, network.get_submodule(part.name), Start(raw, {}))
    assert network.heads["bentham"].verdict.bias.tolist() == [[0.25]] * 4


@pytest.mark.parametrize("spread", [0.02, 0.15, 0.4])
def test_ratings_are_shifted_in_units_of_their_deviation_whatever_the_data(spread):
    labels = {n: torch.zeros(400, label.size) for n, label in LABELS.items()}
    weights = {n: torch.zeros_like(x) for n, x in labels.items()}
    labels["vad"], weights["vad"] = (
        spread * torch.tensor([-1.0, 1.0])[torch.arange(400) % 2, None].expand(-1, 3),
        torch.ones(400, 3),
    )
    network = build_model(load_config("local", SETTINGS), None)
    fusion = network.get_submodule("aux.utility")
    before = fusion.units.clone()
    losses = constant_losses(labels, weights, LossConfig())
    start_at("aux.utility", fusion, what_is_known(labels, weights, losses, LossConfig()))
    place = fusion.layout.labels.index("vad")
    assert before[place].item() == pytest.approx(VAD_SCALE)
    assert fusion.units[place].item() == pytest.approx(max(spread, 0.1), rel=1e-3)  # loss.constant_floor is 0.1²
    assert [u for i, u in enumerate(fusion.units.tolist()) if i != place] == [1.0] * (len(before) - 1)
    assert "aux.utility.units" in network.state_dict()  # so that every checkpoint and export has them


def test_the_regret_head_says_the_constant_where_its_features_say_nothing():
    head = RegretHead(16, 2, 0.0).eval()
    start_at("heads.regret", head, Start({"regret": torch.tensor([-3.0])}, {}))
    with torch.no_grad():
        for silent in (head.mix, head.outcome):
            silent.weight.zero_()
            silent.bias.zero_()
        head.regret.linears[2].weight.zero_()
        assert torch.allclose(head(torch.randn(4, 16), None).regret_logits, torch.tensor(-3.0), atol=1e-5)


def test_experts_used_evenly_are_one_network_of_their_summed_width():
    from redheart.model.axes import Width
    from redheart.model.moe import DenseMixture

    many, one = DenseMixture(Width(16), Width(8), 4, 0.0), DenseMixture(Width(16), Width(32), 1, 0.0)
    with torch.no_grad():
        many.gate.weight.zero_()
        many.gate.bias.zero_()
        (inner, outer), (whole_inner, whole_outer) = many.experts.linears, one.experts.linears
        whole_inner.weight.copy_(inner.weight.flatten(0, 1)[None])
        whole_inner.bias.copy_(inner.bias.flatten()[None])
        whole_outer.weight.copy_(outer.weight.transpose(1, 2).flatten(0, 1).T[None])
        whole_outer.bias.copy_(outer.bias.sum(0)[None])
    x = torch.randn(5, 16)
    assert torch.allclose(many(x, None)[0], one(x, None)[0], atol=1e-5)
