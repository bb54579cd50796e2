"""What a run says where stderr is no terminal."""

import re
from pathlib import Path

import pytest

from redheart.console import LiteralConsole
from redheart.train import board
from redheart.train.engine import Update


def test_a_line_for_every_logged_step_stands_in_for_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(board, "console", LiteralConsole(stderr=True))
    shown = board.Board(tmp_path, 20, 100)
    shown._clock = shown._start = 0.0
    monkeypatch.setattr(board.time, "perf_counter", lambda: 10.0)
    shown.count(64)
    update = Update(applied=True, module_norms={"backbone": 1.0})
    assert shown.train(40, {"regret": 0.5}, 0.75, update, 1e-4, 0) == 6.4
    shown.close()
    told = capsys.readouterr().err
    assert re.fullmatch(
        r"step 40/100  loss 0\.7500  6\.4 samples/s  ETA 0:00:30  host_rss \d+\.\d\d GiB(, gpu_.*)?\n", told
    )
