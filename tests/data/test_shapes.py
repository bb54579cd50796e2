"""Few shapes: a run's micro-batches have few, and what is padded for it changes no answer, no loss and no gradient."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from redheart.config import RunConfig, load_config
from redheart.data.collate import collate, rounded_tokens
from redheart.data.order import CHUNK, Order, bucket, positions
from redheart.losses.combine import factors
from redheart.model.build import build_model
from redheart.schema import LABEL_COLUMNS, LABELS, NUM_LABEL_COLUMNS, Batch
from redheart.tasks import GATES, TASKS, task_weights
from redheart.train import stages

MOST = 22  # tokens, no multiple of 8
WIDTH = 8


@pytest.fixture(scope="module")
def config() -> RunConfig:
    sizes = {"encoder_width": WIDTH, "width": 16, "heads": 2, "layers": 2, "task_width": 16, "task_heads": 2}
    return load_config("local", [f"model.{k}={v}" for k, v in sizes.items()])


def batch(lengths: list[tuple[int, int]], few_shapes: bool) -> Batch:
    """Texts of these numbers of tokens, and their contrasts' (0: none); every label but the preferences that cannot be."""
    rng = np.random.default_rng(0)
    texts, others = ([rng.normal(size=(n, WIDTH)).astype(np.float16) for n in column] for column in zip(*lengths))
    values = rng.random((len(lengths), NUM_LABEL_COLUMNS)).astype(np.float32)
    values[[i for i, (_, c) in enumerate(lengths) if not c], LABEL_COLUMNS["preference"]] = np.nan
    count = (len(lengths), len(LABELS))
    return collate(
        texts, [x if len(x) else None for x in others], values, np.ones(count, np.float32), np.zeros(count, np.int8),
        np.arange(7, 7 + len(lengths)), [str(i) for i in range(len(lengths))], WIDTH, MOST if few_shapes else None,
    )  # fmt: skip


def step(config: RunConfig, given: Batch, dtype: torch.dtype, dropout: float) -> tuple[dict, dict, dict]:
    """(answers, Σ losses, gradients) of a micro-step of a fresh network."""
    torch.manual_seed(0)
    model = build_model(config.model_copy(update={"model": config.model.model_copy(update={"dropout": dropout})}), None)
    model.to(dtype)
    one = dict.fromkeys((*TASKS, *GATES), 1.0)
    on_device = given.to("cpu", dtype)
    on_device = replace(
        on_device, **{n: {k: v.to(dtype) for k, v in getattr(on_device, n).items()} for n in ("labels", "weights")}
    )
    outputs = stages.forward(model, on_device)
    scale = factors(task_weights(config.loss), one, config.loss.constant_floor)
    loss, sums = stages.compute(outputs, on_device, one, scale, 1, config.loss)
    loss.backward()
    answers = {name: task.predict(outputs) for name, task in TASKS.items()}
    compared = on_device.weights["preference"][:, 0] > 0  # the others' preference is no answer
    answers = {n: a[compared] if TASKS[n].label == "preference" and a is not None else a for n, a in answers.items()}
    return answers, sums.read(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("lengths", [[(5, 0), (3, 0)], [(9, 4), (11, 19)], [(9, 0), (11, 19), (2, 0)]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_same_step_in_one_of_few_shapes(config, lengths, dropout, dtype, most):
    plain, padded = batch(lengths, False), batch(lengths, True)
    assert padded.features.shape != plain.features.shape
    for given, wanted in zip(step(config, padded, dtype, dropout), step(config, plain, dtype, dropout), strict=True):
        assert given.keys() == wanted.keys()
        for name, value in wanted.items():
            # single elements depend on the order in which a processor sums
            if dtype == torch.float32 and isinstance(value, torch.Tensor):
                size, apart = (float(x.double().norm()) for x in (value, given[name] - value))
                assert apart <= most * size + most / 10 * value.numel() ** 0.5, name
                continue
            torch.testing.assert_close(given[name], value, rtol=most, atol=most / 10, msg=lambda m, n=name: f"{n}: {m}")


def test_shapes_of_a_batch():
    assert [rounded_tokens(n, 64) for n in (1, 8, 9, 57, 64)] == [8, 8, 16, 64, 64]
    assert [rounded_tokens(n, MOST) for n in (15, 17, 22)] == [16, 22, 22]
    none, some, each = (batch(x, True) for x in ([(5, 0), (9, 0)], [(5, 0), (9, 18)], [(5, 17), (9, 3)]))
    assert (none.features.shape, none.contrast_features.shape) == ((2, 16, WIDTH), (0, 16, WIDTH))
    for given in (some, each):
        assert given.features.shape == given.contrast_features.shape == (2, MOST, WIDTH)
        assert given.contrast_rows.tolist() == [0, 1]
    assert some.contrast_mask.sum(1).tolist() == [5, 18]  # a text that has no contrast is its own
    assert torch.equal(some.contrast_features[0, :5], some.features[0, :5])


def test_an_epoch_has_few_shapes_and_few_seams_where_pairs_meet_others():
    rng, limit, rows, micro = np.random.default_rng(1), 64, 40_000, CHUNK
    texts = np.clip(rng.lognormal(3.0, 0.5, rows).astype(int), 1, limit)
    pairs = np.where(rng.random(rows) < 0.15, np.clip(texts + rng.integers(-6, 7, rows), 1, limit), 0)
    lengths = np.stack([texts, pairs], 1)
    shards, sorted_rows = [], []
    for part in np.array_split(lengths, 20):
        own = np.array([bucket(t, c, limit) for t, c in part.tolist()])
        sorted_rows.append(part[np.argsort(own, kind="stable")])
        shards.append({"rows": len(part), "buckets": sorted(Counter(own.tolist()).items())})
    order, all_rows = Order({"shards": shards}, seed=0), np.concatenate(sorted_rows)
    shapes, mixed = set(), 0
    for number in range(rows // micro):
        own = all_rows[order.samples(positions(number, micro))]
        with_contrast = int((own[:, 1] > 0).sum())
        mixed += 0 < with_contrast < micro
        shapes.add((micro, rounded_tokens(int(own.max()), limit), micro if with_contrast else 0))
    assert len(shapes) <= 16
    assert mixed <= 4  # of 5,000: a seam in each of two windows, and where the windows meet
