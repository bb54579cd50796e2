"""TASKS: every answer has its label and loss; taking a task's labels away takes exactly its loss away."""

import math

import pytest
import torch

from redheart.config import LossConfig
from redheart.model.parts import IDENTITY
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.model.select import MODULES
from redheart.schema import LABELS
from redheart.tasks import GATES, TASKS, constant_answers, constant_losses, loss_counts, task_losses

CONFIG = LossConfig()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    model = RedHeartModel(RedHeartConfig(width=24, heads=2, layers=1, task_width=16, task_heads=2, dropout=0.0)).eval()
    mask = torch.ones(5, 4, dtype=torch.bool)
    x = torch.randn(5, 4, 768, generator=generator)
    with torch.no_grad():
        outputs = model(x, mask, x[:2], mask[:2], torch.tensor([0, 3]))
    labels = {n: torch.rand(5, lab.size, generator=generator) for n, lab in LABELS.items()}
    labels["surd"][:, :3] /= labels["surd"][:, :3].sum(1, keepdim=True)
    weights = {n: torch.ones(5, lab.size) for n, lab in LABELS.items()}
    return outputs, labels, weights


def test_every_task_names_a_module_that_exists():
    assert {t.module for t in TASKS.values()} <= set(MODULES)


@pytest.mark.parametrize("removed", list(LABELS))
def test_removing_a_tasks_labels_removes_exactly_its_losses(batch, removed: str):
    outputs, labels, weights = batch
    before = task_losses(outputs, labels, weights, CONFIG)
    fewer = {**weights, removed: torch.zeros_like(weights[removed])}
    after = task_losses(outputs, labels, fewer, CONFIG)
    assert set(after) == {*TASKS, *GATES}
    for name, (value, count) in after.items():
        if name in TASKS and TASKS[name].label == removed:
            assert value == 0
            assert count == 0
        else:
            assert value == before[name][0]
            assert value != 0


def test_counts_are_known_before_the_forward_pass(batch):
    outputs, labels, weights = batch
    weights = {n: w * 0.3 for n, w in weights.items()}
    told = loss_counts(weights, 5)
    for name, (_, count) in task_losses(outputs, labels, weights, CONFIG).items():
        assert told[name] == pytest.approx(float(count), rel=1e-6)


def dense_grid(name: str, target: torch.Tensor, weight: torch.Tensor, config: LossConfig) -> float:
    """The least loss of any constant, entry by entry, at 4,001 of them."""
    task, raw = TASKS[name], torch.linspace(-9.21, 9.21, 4001, dtype=torch.float64)  # logits of 1e-4 to 1 - 1e-4
    if task.judged.link is IDENTITY:
        raw = torch.linspace(0, 1, 4001, dtype=torch.float64)
    total = 0.0
    for entry in zip(target.double().T, weight.double().T, strict=True):
        t, w = (v[None, :, None].expand(4001, -1, -1) for v in entry)
        losses = torch.vmap(lambda x, t, w: task.loss(x, t, w, config)[0])(raw[:, None, None].expand_as(t), t, w)
        total += losses.min().item()
    return total / weight.double().sum().item()


@pytest.mark.parametrize("positives", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", ["emotion", "regret", "bentham", "culture", "regret_views"])
def test_no_constant_has_a_lower_loss_than_the_constant_predictor(name: str, soft: bool, positives: float):
    generator, size = torch.Generator().manual_seed(0), LABELS[name].size
    target = (torch.rand(5, 200, size, generator=generator) < positives).double()
    target = target.mean(0) if soft else target[0]  # five raters, or one
    weight = torch.tensor([1.0, 0.3, 0.0]).double()[torch.randint(3, (200, size), generator=generator)]
    for config in (CONFIG, LossConfig(focal_gamma=0.5, huber_delta=0.05, extreme_penalty=3.0)):
        task = TASKS[name]
        value, count = task.loss(task.constant(target, weight, config), target, weight, config)
        least = dense_grid(name, target, weight, config)
        assert value / count <= least * (1 + 1e-6) + 1e-9
        if config is CONFIG:  # a focus below 1 has a kink at every label, between which a grid may lie
            assert value / count == pytest.approx(least, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("first", [1.0, 0.0, 0.7])
def test_pairs_that_always_name_the_better_text_first_teach_a_constant_nothing(first: float):
    """Its loss is that of a coin, whatever the order in which a data set lists the two texts."""
    labels = {n: torch.full((40, lab.size), 0.4) for n, lab in LABELS.items()}
    labels["preference"] = (torch.arange(40) < 40 * first).float()[:, None]
    weights = {n: torch.ones(40, lab.size) for n, lab in LABELS.items()}
    told = constant_losses(labels, weights, CONFIG)
    assert [told[n] for n, t in TASKS.items() if t.label == "preference"] == pytest.approx([math.log(2)] * 3)
    assert constant_answers(labels, weights, CONFIG)["preference"].tolist() == [0.0]


def test_the_constant_of_a_rare_emotion_is_no_longer_its_mean():
    """At 3 % positives the mean costs two and a half times the least focal loss."""
    task, weight = TASKS["emotion"], torch.ones(100, 7)
    target = (torch.arange(100) < 3).float()[:, None].expand(-1, 7)
    loss = lambda raw: float(task.loss(raw.expand_as(target), target, weight, CONFIG)[0]) / 700  # noqa: E731
    assert loss(torch.logit(target.mean(0))) == pytest.approx(0.099, abs=0.001)
    assert loss(task.constant(target, weight, CONFIG)) == pytest.approx(0.039, abs=0.001)
    labels = {n: torch.full((100, lab.size), 0.4) for n, lab in LABELS.items()} | {"emotion": target}
    weights = {n: torch.zeros(100, lab.size) for n, lab in LABELS.items()} | {"emotion": weight}
    assert constant_losses(labels, weights, CONFIG)["emotion"] == pytest.approx(0.039, abs=0.001)
    assert list(constant_answers(labels, weights, CONFIG)) == ["emotion"]
    assert (constant_answers(labels, weights, CONFIG)["emotion"].sigmoid() > 0.15).all()


def test_constant_losses_are_those_of_the_weighted_mean_where_the_loss_is_squared_or_a_cross_entropy(batch):
    _, labels, weights = batch
    told = constant_losses(labels, weights, CONFIG)
    y = labels["surd"]
    assert told["surd"] == pytest.approx(((y - y.mean(0)) ** 2).mean().item(), rel=1e-5)
    y = labels["acceptability"]
    p = y.mean()
    assert told["acceptability"] == pytest.approx(-(y * p.log() + (1 - y) * (1 - p).log()).mean().item(), rel=1e-5)
    assert all(told[g] == 1.0 for g in GATES)
    none = {n: torch.zeros_like(w) for n, w in weights.items()}
    assert constant_losses(labels, none, CONFIG)["emotion"] == 1.0
