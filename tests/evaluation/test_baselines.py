"""No constant scores better than the constant baseline, metric by metric; the look-up says what training texts of a level have."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from redheart.evaluation.baselines import ALPHAS, CONSTANTS, Pooled, _constant, _linear, look_up, mean
from redheart.tasks import TASKS

RNG = np.random.default_rng(0)
SCORES = {  # by metric: of a constant c, the higher the better
    "mse": lambda t, w, c: -mean_squared_error(t, np.full_like(t, c), sample_weight=w),
    "mae": lambda t, w, c: -mean_absolute_error(t, np.full_like(t, c), sample_weight=w),
    "accuracy": lambda t, w, c: accuracy_score(t > 0.5, np.full(len(t), c > 0.5), sample_weight=w),
    "macro_f1": lambda t, w, c: f1_score(t > 0.5, np.full(len(t), c > 0.5), sample_weight=w),
}


@pytest.mark.parametrize("metric", CONSTANTS)
@pytest.mark.parametrize("positives", [0.01, 0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_no_constant_is_better(metric: str, positives: float, soft: bool):
    target = (RNG.random((5, 300)) < positives).astype(float)
    target = target.mean(0) if soft else target[0]
    target[0] = 1  # F1 is undefined without a positive
    weight = RNG.choice([1.0, 0.3], 300)
    score = SCORES[metric]
    found = score(target, weight, CONSTANTS[metric](target, weight))
    assert found >= max(score(target, weight, c) for c in np.linspace(0, 1, 101)) - 1e-12
    if metric == "macro_f1" and positives < 0.5:
        assert found > score(target, weight, mean(target, weight)) or (target > 0.5).mean() > 0.5


def test_the_look_up_is_the_mean_label_of_the_predicted_level():
    """Two levels with an edge at 0.5; labels of one known sample of each, and none of an unlabelled third."""
    surd = torch.tensor([[0.2, 0.3, 0.5, 0.1], [0.6, 0.3, 0.1, 0.7], [0.4, 0.3, 0.3, 0.3], [9.0, 9, 9, 9]])
    weight = torch.ones(4, 4)
    weight[3] = 0
    labels = {"regret": torch.tensor([[0.0], [1.0], [1.0], [1.0]]), "surd": surd}
    batch = SimpleNamespace(labels=labels, weights={"regret": torch.ones(4, 1), "surd": weight})
    train = SimpleNamespace(index={"levels": {"regret": [0.5]}}, in_order=lambda size: iter([batch]))
    predict = look_up(train, lambda regret: {"regret": regret})
    said = predict(torch.tensor([[0.9], [0.1], [0.6]]))["surd"]
    assert torch.allclose(said[1], surd[0].double())
    assert torch.allclose(said[[0, 2]], surd[1:3].double().mean(0).expand(2, -1))
    batch.weights["surd"] = torch.zeros(4, 4)
    assert look_up(train, lambda regret: {"regret": regret}) is None


def test_entries_that_are_solved_at_once_are_as_if_each_were_alone():
    """One of the seven is labelled on other rows, one never varies; scikit-learn says the rest."""
    x = RNG.normal(size=(300, 6))
    y = np.clip(0.5 + x @ RNG.normal(size=(6, 7)) * RNG.uniform(0.01, 0.2, 7) + RNG.normal(size=(300, 7)) * 0.1, 0, 1)
    y[:, 5] = 0.25
    weight = np.repeat(RNG.choice([0.0, 0.3, 1.0], size=(300, 1)), 7, 1)
    weight[:, 2] = 1.0
    lines = _linear(TASKS["bentham"], Pooled(x, x, {"bentham": y}, {"bentham": weight}))
    for column, line in enumerate(lines):
        known = weight[:, column] > 0
        alone = make_pipeline(StandardScaler(), RidgeCV(ALPHAS))
        alone.fit(x[known], y[known, column], ridgecv__sample_weight=weight[known, column])
        assert line(x) == pytest.approx(alone.predict(x).clip(0, 1), abs=1e-9)


@pytest.mark.parametrize("order", ["better first", "by a coin"])
def test_lines_between_texts_need_no_order_of_them(order: str):
    """Pairs that always name the better text first are as good to learn from, and a constant has half of them right."""
    direction = RNG.normal(size=8)
    difference = RNG.normal(size=(400, 8))
    difference *= np.sign(difference @ direction)[:, None]
    turned = np.where(RNG.random(400) < 0.5, -1.0, 1.0) if order == "by a coin" else np.ones(400)
    x, y = difference * turned[:, None], (turned > 0).astype(float)[:, None]
    data = Pooled(x, x, {"preference": y}, {"preference": np.ones((400, 1))})
    task = TASKS["preference"]
    (line,) = _linear(task, data)
    p = line(difference)
    assert (p > 0.5).mean() > 0.95
    assert line(-difference) == pytest.approx(1 - p)
    assert set(_constant(task, data, 0, CONSTANTS["accuracy"])(x)) == {0.5}
