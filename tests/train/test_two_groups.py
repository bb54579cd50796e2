"""Processes that meet to prepare data meet again to train, under a launcher that keeps its store and under one that keeps none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from redheart.files import read_json
from tests.runs import ROOT, environment, forked


def test_they_find_each_other_again_where_the_launcher_keeps_the_store():
    """torchrun's (and accelerate's) store outlives a group; what a rank wrote there for the first must not answer for the second."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.train.second_group",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout) == sorted("3.0\n" * 2)  # two processes write to one pipe, and lines may meet


def test_they_find_each_other_again_where_rank_0_keeps_it():
    done = forked("tests.train.second_group", ranks=2, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["3.0"]


def test_a_table_of_ones_own_trains_on_two_ranks_with_no_strategy_named(tmp_path: Path):
    rows = [{"body": f"We lost the keys again on day {n} of the long year.", "sorry": n / 40} for n in range(40)]
    table, run = tmp_path / "texts.jsonl", tmp_path / "run"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["training.max_steps=2", "training.global_batch_size=4", "training.micro_batch_size=2"]
    options = [part for setting in settings for part in ("--set", setting)]
    what = ["train", "--data", table, "--text", "body", "--label", "sorry=regret", "--out", run, *options]
    done = forked("redheart", *what, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    told = read_json(run / "result.json", "")
    assert (told["steps"], told["world_size"]) == (2, 2)
