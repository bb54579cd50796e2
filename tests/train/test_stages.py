"""The arithmetic of a step: schedule, window sizes, and what a non-finite gradient does."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from redheart.config import OptimizerConfig, load_config
from redheart.data.shards import INDEX, write_shard
from redheart.data.stream import SampleStream
from redheart.files import read_sealed_json, write_sealed_json
from redheart.model.build import build_model
from redheart.schema import RedHeartError
from redheart.train.checkpoint import read_progress
from redheart.train.engine import PlainEngine, parameter_groups
from redheart.train.progress import Progress
from redheart.train.stages import learning_rate_at, split_global_batch
from redheart.train.start import train


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    config = OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-5, warmup_fraction=0.1)
    rates = [learning_rate_at(s, 100, config) for s in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])
    assert rates[55] == pytest.approx((1e-3 + 1e-5) / 2)  # halfway down the cosine
    assert rates[99] == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize(("g", "m", "w"), [(64, 16, 1), (64, 16, 2), (12, 5, 1), (16, 16, 4), (30, 4, 3)])
def test_micro_batches_make_up_the_global_batch(g: int, m: int, w: int):
    micro, accumulation = split_global_batch(g, m, w)
    assert micro * accumulation * w == g
    assert micro <= m


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(RedHeartError, match="for instance 12"):
        split_global_batch(10, 4, 4)


def test_biases_and_norms_are_not_decayed():
    model = build_model(load_config("local"), None)
    decayed, free = parameter_groups(model, 0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    matrices = ("weight", "query", "unknown")
    assert all(names[id(p)].endswith(matrices) and "norm" not in names[id(p)] for p in decayed["params"])
    vectors = ("bias", "sharpness", "exponents", "threshold", "scale", "offset", "gain", "task.weight")
    assert all("norm" in names[id(p)] or names[id(p)].endswith(vectors) for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_the_plain_engine_skips_a_gradient_that_is_not_finite():
    config = load_config("local", ["memory.strategy=plain"])
    engine = PlainEngine(partial(build_model, config, None), config, 1)
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    engine.backward(sum(p.sum() for p in engine.model.heads["regret"].parameters()) * float("nan"), True)
    update = engine.step()
    assert [m for m, v in update.module_norms.items() if not np.isfinite(v)] == ["heads.regret"]
    assert not update.applied
    assert all(torch.equal(before[n], p) for n, p in engine.model.named_parameters())


@pytest.fixture
def poisoned(data: Path, tmp_path: Path) -> Path:
    """The prepared rows with a feature of every training row turned into infinity."""
    index = read_sealed_json(data / INDEX, "again")
    out = tmp_path / "poisoned"
    out.mkdir()
    for split in ("train", "dev"):
        stream = SampleStream(data, split)
        rows = stream.rows(np.arange(stream.num_rows))
        if split == "train":
            for row in rows:
                row["features"] = row["features"].copy()
                row["features"][0, 0] = np.inf
        entry = write_shard(out / f"{split}-00000.arrow", rows, 768, 64)
        index["splits"][split] |= {"shards": [entry]}
    write_sealed_json(out / INDEX, index)
    return out


@pytest.mark.parametrize("strategy", ["plain", "zero2_offload"])
def test_three_bad_steps_end_the_run_with_a_file_that_names_modules_and_samples(poisoned, tmp_path, strategy):
    from tests.runs import redheart

    run = tmp_path / "run"
    result = redheart(
        "train",
        "--data",
        poisoned,
        "--out",
        run,
        "--set",
        f"memory.strategy={strategy}",
        "--set",
        "training.max_steps=9",
    )
    assert result.returncode == 1
    assert "3 steps in a row were not finite" in result.stderr
    told = json.loads((run / "non_finite_step_00000002.json").read_text())
    assert "backbone" in told["modules"]
    assert len(told["samples"]) == 32


def test_progress_survives_the_round_trip(data: Path, tmp_path: Path):
    config = load_config("local", ["memory.strategy=plain", "training.max_steps=2", "training.evaluate_every=2"])
    result = train(config, data, tmp_path / "run")
    saved = read_progress(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert isinstance(saved, Progress)
    assert saved == result.state
    assert saved.encoder["name"] == "package:minilm"
