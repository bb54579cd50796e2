"""`redheart watch`: the page of a run so far, for this machine alone."""

import html
import re
import shutil
import socket
import struct
import threading
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from redheart.files import write_pointer
from redheart.schema import RedHeartError
from redheart.train import watch
from redheart.train.watch import page_so_far, server
from tests.browser import browser, look, scrolls_sideways
from tests.train.conftest import WHOLE


def test_the_page_so_far_is_served_to_this_machine_alone(whole_run: Path):
    with server(whole_run, 0) as serving:
        assert serving.server_address[0] == "127.0.0.1"
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{serving.server_port}/"
        page = urllib.request.urlopen(address).read().decode()
        assert '<meta http-equiv="refresh" content="10">' in page
        assert all(name in page for name in ("dev_loss", "samples_per_s", "all answers, weighted", "regret_views"))
        for refused in (
            urllib.request.Request(address, headers={"Host": "elsewhere.example:80"}),
            urllib.request.Request(f"{address}config.yaml"),
        ):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(refused)
        with browser() as chromium, look(chromium, address, 390) as shown:
            assert not scrolls_sideways(shown)
            assert shown.locator("svg").count() > 5
        serving.shutdown()


def test_a_browser_that_goes_away_while_the_page_is_made_is_no_error(tmp_path: Path, monkeypatch, capsys):
    asked, gone = threading.Event(), threading.Event()

    def slow(run: Path) -> str:
        asked.set()
        gone.wait(10)
        return "page" * 10**7  # more than the system takes before someone reads it

    monkeypatch.setattr(watch, "is_run", lambda run: True)
    monkeypatch.setattr(watch, "page_so_far", slow)
    with server(tmp_path, 0) as serving:
        serving.daemon_threads = False  # closing the server waits for them
        client = socket.create_connection(("127.0.0.1", serving.server_port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed, it says so at once
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost:80\r\n\r\n")
        serving.handle_request()
        asked.wait(10)
        client.close()
        gone.set()
    assert capsys.readouterr().err == ""


def test_a_run_that_is_replaced_while_the_page_is_made_is_no_error(
    whole_run: Path, tmp_path: Path, monkeypatch, capsys
):
    run = Path(shutil.copytree(whole_run, tmp_path / "run"))

    def removed(error: type[Exception]) -> None:
        shutil.rmtree(run / "tensorboard")
        raise error(f"{run}/tensorboard")

    for error in (FileNotFoundError, DirectoryDeletedError):
        with monkeypatch.context() as patched:
            patched.setattr(EventAccumulator, "Reload", partial(removed, error))
            (run / "tensorboard").mkdir(exist_ok=True)
            assert "Nothing has been logged yet" in page_so_far(run)
    with server(run, 0) as serving:
        (run / "config.yaml").unlink()
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        with pytest.raises(urllib.error.HTTPError, match="503") as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{serving.server_port}/")
        page = refused.value.read().decode()
        serving.shutdown()
    assert '<meta http-equiv="refresh" content="10">' in page
    assert "config.yaml does not exist" in page
    assert capsys.readouterr().err == ""


def test_the_kept_step_is_the_best_checkpoint_s_and_no_other(whole_run: Path, tmp_path: Path):
    """Not that of the lowest dev loss: training.best_metric may be another."""
    run = shutil.copytree(whole_run, tmp_path / "run")
    best = run / "checkpoints" / "best"
    for step in (WHOLE // 2, WHOLE):
        write_pointer(best, f"step-{step:08d}")
        assert set(re.findall(r"kept: step \d+", html.unescape(page_so_far(run)))) == {f"kept: step {step}"}
    best.unlink()
    assert "kept: step" not in page_so_far(run)


def test_what_cannot_be_watched_is_one_line(whole_run: Path, tmp_path: Path):
    with pytest.raises(RedHeartError, match="holds no run"):
        server(tmp_path, 0)
    with server(whole_run, 0) as serving, pytest.raises(RedHeartError, match="cannot be listened on"):
        server(whole_run, serving.server_port)
