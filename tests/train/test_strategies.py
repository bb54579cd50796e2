"""Every strategy that a CPU can run, through `redheart train`: logging, synergy, evaluation, saving and resuming."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from redheart.config import DataConfig
from redheart.data.prepare import prepare
from redheart.train.synergy import COMPARED
from tests.runs import distance, last_weights, losses, scalars, train
from tests.train.conftest import made_once

STEPS, SAVED = 5, 3
KINDS = {"emotion": "joy", "regret": 0.7, "acceptability": 0.2}  # a row has one label
SETTINGS = [
    *("model.width=24", "model.heads=2", "model.layers=1", "model.task_width=16", "model.task_heads=2"),
    *(
        "training.global_batch_size=2",
        "training.micro_batch_size=1",
        "training.log_every=2",
        "training.evaluate_every=3",
    ),
    *("training.checkpoint_every=3", "checkpoint.keep_last=9", "training.log_samples=true"),
    "training.seed=4",  # whose batches have two kinds of labels at every step
]


@pytest.fixture(scope="module")
def one_label_each(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows, each with one of three labels: two ranks with a row each seldom have the same."""

    def make(out: Path) -> None:
        source = out.with_suffix(".json")
        rows = []
        for i in range(24):
            label = list(KINDS)[i % len(KINDS)]
            rows.append({"id": f"{label}-{i}", "text": f"Number {i} of them came home late.", label: KINDS[label]})
            rows[-1]["split"] = "dev" if i >= 20 else "train"
        source.write_text(json.dumps(rows))
        prepare([f"mine={source}"], out, DataConfig.model_validate({"labeler": {"max_texts": 0}}))

    return made_once(tmp_path_factory, "one-label-each", make)


def kinds(run: Path, rank: int) -> list[list[str]]:
    """The labels of a rank's samples, step by step."""
    lines = map(json.loads, (run / f"samples-rank{rank}.jsonl").read_text().splitlines())
    return [[i.partition("-")[0] for i in line["ids"]] for line in lines]


RISKY = [("plain", 1), ("zero3_offload_8bit", 2)]
OTHERS = [("zero3_offload_8bit", 1)]
OTHERS += [(s, n) for s in ("zero1", "zero2", "zero2_offload", "zero2_offload_8bit", "zero3") for n in (1, 2)]


@pytest.mark.parametrize(("strategy", "ranks"), RISKY + [pytest.param(*c, marks=pytest.mark.slow) for c in OTHERS])
def test_a_run_with_synergy_ends_and_resumes_bitwise(one_label_each, tmp_path, strategy, ranks):
    settings = [x for s in (*SETTINGS, f"memory.strategy={strategy}") for x in ("--set", s)]
    world = 0 if strategy == "plain" else ranks
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(one_label_each, whole, STEPS, *settings, "--set", "training.synergy_every=2", ranks=world)
    assert set(losses(whole)) == {2, 4}
    assert set(scalars(whole, "0_overview/dev_loss")) == {0, 3, 5}
    if ranks > 1:
        unlike = [
            (step, sorted({*a, *b}, key=COMPARED.index))
            for step, (a, b) in enumerate(zip(*(kinds(whole, rank) for rank in range(2)), strict=True), 1)
            if a != b and step % 2 == 0
        ]
        assert unlike
        for step, pair in unlike:  # both gradients are known, and lie on different rows
            assert scalars(whole, f"3_synergy/cosine/{'~'.join(pair)}")[step] == 0

    shutil.copytree(whole, again)
    train(one_label_each, again, STEPS, *settings, "--resume", again / "checkpoints" / f"step-{SAVED:08d}", ranks=world)
    expected, got = last_weights(whole), last_weights(again)
    assert expected.keys() == got.keys()
    assert [n for n in expected if not torch.equal(expected[n], got[n])] == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_zero_3_on_one_process_goes_on_with_a_smaller_micro_batch(one_label_each, tmp_path, where):
    """Whatever the interrupted pass has left gathered."""
    more = ["memory.strategy=zero3", "training.global_batch_size=4", "training.synergy_every=2"]
    settings = [x for s in (*SETTINGS, *more) for x in ("--set", s)]
    small, shrunk = tmp_path / "small", tmp_path / "shrunk"
    train(one_label_each, small, STEPS, *settings, "--set", "training.micro_batch_size=2", ranks=1)
    through = ["tests.train.oom_run", where, "0", "2", "2"]
    wide = ["--set", "training.micro_batch_size=4"]
    done = train(one_label_each, shrunk, STEPS, *settings, *wide, ranks=1, through=through)
    assert "micro-batch 4 → 2" in done.stderr
    assert losses(shrunk) == pytest.approx(losses(small), rel=1e-5)
    assert distance(last_weights(shrunk), last_weights(small)) < 1e-3
