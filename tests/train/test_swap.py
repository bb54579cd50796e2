"""Swap through the doors: training, evaluation and the pipeline, the same to the last bit."""

from pathlib import Path

import pytest
import torch

from redheart.config import load_config
from redheart.infer import RedHeartPipeline
from redheart.model.select import MODULES
from redheart.schema import RedHeartError
from redheart.train.start import train
from redheart.train.validate import validate
from tests.runs import last_weights

SWAP = ["analyzers.emotion", "analyzers.regret", "heads.bentham", "aux.utility"]
SMALL = ["model.width=24", "model.heads=2", "model.layers=1", "model.task_width=16", "model.task_heads=2"]
STEPS = ["training.max_steps=3", "training.micro_batch_size=8", "training.synergy_every=2", "training.evaluate_every=3"]


def test_a_run_with_swapped_modules_is_bitwise_the_run_without(data: Path, tmp_path: Path, capfd):
    plain = load_config("local", [*SMALL, *STEPS, "memory.strategy=plain"])
    swapped = load_config("local", [*SMALL, *STEPS, "memory.strategy=plain", f"memory.swap=[{','.join(SWAP)}]"])
    train(plain, data, tmp_path / "plain")
    train(swapped, data, tmp_path / "swapped")
    assert "fetches" in capfd.readouterr().err
    expected, got = last_weights(tmp_path / "plain"), last_weights(tmp_path / "swapped")
    assert expected.keys() == got.keys()
    assert [n for n in expected if not torch.equal(expected[n], got[n])] == []

    texts = ["I broke the cup and told nobody.", "We laughed all evening."]
    answers = [RedHeartPipeline.from_pretrained(tmp_path / "plain", swap=swap)(texts) for swap in ((), MODULES)]
    assert answers[0] == answers[1]
    told = [validate(tmp_path / run, None, "dev", tmp_path / "report.md")[0].evaluation for run in ("plain", "swapped")]
    assert "swap: heads.bentham" in capfd.readouterr().err  # as the run's own configuration says
    assert told[0] == told[1]


def test_deepspeed_refuses_to_swap(data: Path, tmp_path: Path):
    config = load_config("local", [*SMALL, *STEPS, "memory.swap=[heads.surd]"])
    with pytest.raises(RedHeartError, match=r"memory\.strategy=plain"):
        train(config, data, tmp_path / "run")
