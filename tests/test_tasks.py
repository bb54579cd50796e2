"""TASKS: every answer has its label and loss; taking a task's labels away takes exactly its loss away."""

import pytest
import torch

from redheart.config import LossConfig
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.model.select import MODULES
from redheart.schema import LABELS
from redheart.tasks import GATES, TASKS, constant_losses, loss_counts, task_losses

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


def test_constant_losses_are_those_of_the_weighted_mean(batch):
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
