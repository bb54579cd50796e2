"""Only what the product wrote is replaced or removed, and one process at a time writes into a directory."""

import errno
import fcntl
import subprocess
import sys

import pytest

from redheart.owned import LOCK, MARKER, exclusive, make_directory, own, owned, remove_owned
from redheart.schema import RedHeartError


def test_only_what_was_owned_is_removed(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    own(tmp_path, "run", ["config.yaml", "checkpoints", "never-written"])
    (tmp_path / "config.yaml").write_text("ours")
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    own(tmp_path, "run", ["report.md"])
    (tmp_path / "report.md").write_text("ours")
    assert owned(tmp_path, "run") == ["config.yaml", "checkpoints", "never-written", "report.md"]
    remove_owned(tmp_path, "run")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_name_that_the_user_has_already_is_refused_and_left(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(RedHeartError, match=r"README\.md is there already"):
        own(tmp_path, "data", ["index.json", "README.md"])
    assert owned(tmp_path, "data") == []
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_link_is_removed_and_what_it_names_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "note").write_text("mine")
    (tmp_path / "out").mkdir()
    own(tmp_path / "out", "data", ["work"])
    (tmp_path / "out" / "work").symlink_to(tmp_path / "far")
    remove_owned(tmp_path / "out", "data")
    assert (tmp_path / "far" / "note").read_text() == "mine"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '{"kind": "run", "names": ["../other"]}', '{"kind": "run", "names": "a"}']
)
def test_a_damaged_marker_is_refused_by_name(tmp_path, text):
    (tmp_path / MARKER).write_text(text)
    with pytest.raises(RedHeartError, match=MARKER):
        owned(tmp_path, "run")


def test_a_directory_of_another_kind_is_refused(tmp_path):
    own(tmp_path, "run", ["config.yaml"])
    with pytest.raises(RedHeartError, match="holds a run, not a data"):
        own(tmp_path, "data", ["index.json"])


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    code = (
        "import sys; from pathlib import Path; from redheart.owned import exclusive\n"
        "with exclusive(Path(sys.argv[1]), 'training'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RedHeartError, match=rf"pid {other.pid}\) is training"), exclusive(tmp_path, "training"):
            pass
        other.kill()
    with exclusive(tmp_path, "training"), pytest.raises(RedHeartError), exclusive(tmp_path, "training"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [LOCK]


def test_a_file_in_the_place_of_a_directory_is_one_line(tmp_path):
    (tmp_path / "table.csv").write_text("a,b")
    for path in (tmp_path / "table.csv", tmp_path / "table.csv" / "below"):
        with pytest.raises(RedHeartError, match=r"--out .*table\.csv.* is a file"):
            make_directory(path, "--out")


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with exclusive(tmp_path, "training"):
        assert "cannot be locked (Operation not supported): see to it" in capsys.readouterr().err
