"""The synergy analysis looks without touching."""

from functools import partial
from itertools import combinations

import pytest
import torch

from redheart.config import LossConfig, load_config
from redheart.model.build import build_model
from redheart.model.layers import attention_bias
from redheart.schema import LABELS
from redheart.tasks import task_losses, task_weights
from redheart.train.engine import PlainEngine
from redheart.train.synergy import COMPARED, RECENT, ROWS, Synergy, predictions
from tests.train.tiny import SETTINGS, make_batch


@pytest.fixture
def engine():
    config = load_config("local", [*SETTINGS, "memory.strategy=plain"])
    torch.manual_seed(0)
    return PlainEngine(partial(build_model, config, None), config, 1)


@pytest.mark.parametrize("micro_batch_size", [8, 3])
def test_cosines_are_those_of_each_tasks_own_backward_pass_and_no_parameter_is_touched(engine, micro_batch_size):
    batch, factors, network = make_batch(range(micro_batch_size)), task_weights(LossConfig()), engine.model
    values = Synergy(LossConfig()).analyse(engine, batch, factors)
    assert all(p.grad is None for p in network.parameters())
    assert network.training

    few = slice(0, ROWS)
    network.eval()
    leaves = [
        x.detach().requires_grad_()
        for x in network.backbone(batch.features[few], attention_bias(batch.mask[few], torch.float32), None)
    ]
    outputs = network.answer(*leaves, batch.mask[few])
    labels, weights = ({n: v[few] for n, v in d.items()} for d in (batch.labels, batch.weights))
    losses = task_losses(outputs, labels, weights, LossConfig())
    expected = {}
    for name in COMPARED:
        parts = torch.autograd.grad(losses[name][0], leaves, None, True, allow_unused=True, materialize_grads=True)
        expected[name] = torch.cat([p.flatten() for p in parts]).double()
    cosine = partial(torch.cosine_similarity, dim=0)
    assert len(values) == 11 * 10 / 2  # every two of the twelve answers but the pairs' one
    for a, b in combinations(COMPARED, 2):
        assert values[f"cosine/{a}~{b}"] == pytest.approx(float(cosine(expected[a], expected[b])), abs=1e-5)
    assert min(values.values()) < 0.5  # and they differ


def test_a_task_without_labels_has_no_angles(engine):
    batch = make_batch(range(8))
    batch.weights["regret"].zero_()
    values = Synergy(LossConfig()).analyse(engine, batch, task_weights(LossConfig()))
    assert len(values) == 10 * 9 / 2
    assert not any("regret" in name.replace("regret_views", "") for name in values)


def test_recent_predictions_are_bounded_and_analysed(engine):
    synergy = Synergy(LossConfig())
    batch = make_batch(range(8))
    with torch.no_grad():
        outputs = engine.model.eval()(batch.features, batch.mask)
    for _ in range(RECENT // 8 + 40):
        synergy.remember(predictions(outputs))
    assert sum(map(len, synergy._recent)) == RECENT
    values = synergy.analyse(engine, batch, task_weights(LossConfig()))
    assert 0 <= values["regret/leak"] <= 1
    assert values["regret/bits"] > 0.5  # eight distinct rows, repeated: what they predict hangs together
    assert sum(values[f"regret/{k}_share"] for k in ("redundant", "unique", "synergistic")) == pytest.approx(1)


def test_answers_that_nothing_trains_inform_nobody(engine):
    """Nor are they informed; an answer is left out where one of its entries is not trained."""
    outputs = engine.model.eval()(*(getattr(make_batch(range(8)), name) for name in ("features", "mask")))
    labels = {name: [1.0] * label.size for name, label in LABELS.items()}
    told = []
    emotion = labels | {"emotion": [1.0, 1.0, 0, 0, 0, 0, 0]}
    cases = [
        (labels, True),
        (emotion, True),
        (emotion | {"bentham": [0.0] * 7}, False),
        (labels | {"regret": [0.0]}, False),
    ]
    for taught, there in cases:
        synergy = Synergy(LossConfig(), taught)
        synergy.remember(predictions(outputs) * 20)
        values = synergy.analyse(engine, make_batch(range(8)), task_weights(LossConfig()))
        assert ("regret/bits" in values) == there
        told.append(values.get("regret/bits"))
    assert told[0] > told[1]  # by two agents, where the emotions are not all trained
