"""Processes that meet to prepare data meet again to train, under a launcher that keeps its store and under one that keeps none."""

from __future__ import annotations

import subprocess
import sys

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
