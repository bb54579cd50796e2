"""The synergy analysis looks without touching."""

import pytest
import torch

from redheart.config import LossConfig, load_config
from redheart.model.build import build_model
from redheart.tasks import TASKS, task_weights
from redheart.train.synergy import RECENT, Synergy, predictions
from tests.train.two_ranks import SETTINGS, make_batch


@pytest.fixture
def network():
    config = load_config("local", SETTINGS)
    return build_model(config, None)


def test_cosines_are_those_of_the_gradients_and_no_parameter_is_touched(network):
    batch, factors = make_batch(range(8)), task_weights(LossConfig())
    values = Synergy(LossConfig()).analyse(network, batch, factors)
    cosines = {k: v for k, v in values.items() if k.startswith("cosine/")}
    assert len(cosines) == 11 * 10 / 2  # every two of the twelve answers but the pairs' one
    assert all(-1 <= v <= 1 for v in cosines.values())
    assert "cosine/emotion~regret_views" in cosines
    assert all(p.grad is None for p in network.parameters())
    assert network.training


def test_recent_predictions_are_bounded_and_analysed(network):
    synergy = Synergy(LossConfig())
    batch = make_batch(range(8))
    with torch.no_grad():
        outputs = network.eval()(batch.features, batch.mask)
    for _ in range(RECENT // 8 + 40):
        synergy.remember(predictions(outputs))
    assert sum(map(len, synergy._recent)) == RECENT
    values = synergy.analyse(network, batch, task_weights(LossConfig()))
    assert 0 <= values["regret/leak"] <= 1
    assert values["regret/bits"] > 0.5  # eight distinct rows, repeated: what they predict hangs together
    assert {f"regret/{k}_share" for k in ("redundant", "unique", "synergistic")} <= set(values)
    assert "emotion" in TASKS
