"""A fresh network says about what the best constant predictor says."""

import torch

from redheart.causality.levels import LEVELS
from redheart.config import LossConfig, load_config
from redheart.model.build import build_model
from redheart.model.heads.regret import RegretHead
from redheart.model.parts import PARTS
from redheart.model.prior import start_at
from redheart.schema import LABELS
from redheart.tasks import TASKS, constant_answers, constant_losses, task_losses
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
    constants = constant_answers(labels, batch.weights, LossConfig())
    best = constant_losses(labels, batch.weights, LossConfig())
    config = load_config("local", SETTINGS)
    torch.manual_seed(0)
    plain = losses_of(build_model(config, None), batch, labels)
    torch.manual_seed(0)
    started = losses_of(build_model(config, None, lambda n, m: start_at(n, m, constants)), batch, labels)
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
        start_at(part.name, network.get_submodule(part.name), raw)
    assert network.heads["bentham"].verdicts.bias.tolist() == [[0.25]] * 4


def test_the_regret_head_says_the_constant_where_its_features_say_nothing():
    head = RegretHead(16, 2, 0.0).eval()
    start_at("heads.regret", head, {"regret": torch.tensor([-3.0])})
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
