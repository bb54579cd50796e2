"""A run that stands still says where: stacks on SIGQUIT, the rank and the place where a collective failed."""

import os
import signal
from pathlib import Path

import pytest

from redheart import ranks
from redheart.ranks import naming_lost_ranks
from redheart.schema import RedHeartError
from redheart.train.stages import open_window
from redheart.train.stalls import stacks, stacks_file
from tests.runs import forked
from tests.train.tiny import make_batch


def test_a_process_that_is_asked_writes_where_it_stands_and_goes_on(tmp_path: Path):
    before = signal.getsignal(signal.SIGQUIT)
    with stacks(tmp_path):
        os.kill(os.getpid(), signal.SIGQUIT)
    assert "test_a_process_that_is_asked" in (tmp_path / stacks_file(0)).read_text()
    assert signal.getsignal(signal.SIGQUIT) == before


def test_a_run_that_nobody_asked_leaves_no_file(tmp_path: Path):
    with stacks(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_every_rank_of_the_node_says_where_it_stands(tmp_path: Path):
    done = forked("tests.train.stalled", tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "in main" in (tmp_path / stacks_file(0)).read_text()
    assert "in barrier" in (tmp_path / stacks_file(1)).read_text()


def test_a_collective_that_failed_names_the_rank_the_step_and_the_place(monkeypatch: pytest.MonkeyPatch):
    def timed_out(values):
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation")

    monkeypatch.setattr(ranks, "_group", lambda: True)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr("redheart.train.stages.sum_over_ranks", timed_out)
    with (
        pytest.raises(
            RedHeartError, match=r"rank 1 of 2 at step 7 lost another rank in stages\.py:\d+ \(open_window\)"
        ),
        naming_lost_ranks("start it again", lambda: " at step 7"),
    ):
        open_window([make_batch(range(2))], False)
