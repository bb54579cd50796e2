"""How a command begins and ends."""

import os
import signal
from pathlib import Path

import pytest

from redheart.ends import ending


def test_an_interrupt_reaches_a_command_that_a_shell_started_in_the_background():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ending():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_tells_its_pid_and_how_it_ended_and_a_call_to_save_does_not_end_it(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("REDHEART_EXIT_CODES", str(tmp_path / "codes"))
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit), ending():
            _asked_to_save()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "codes").read_text() == f"pid {os.getpid()}\n143\n"


def _asked_to_save() -> None:
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGUSR1)
    raise SystemExit(143)
