"""Where caches lie: the XDG rule, a user without a home, a place that cannot be written; the oracle is the rule's own text."""

import os
import pwd

import pytest

from redheart.caches import VARIABLES, cache_directory, forget_empty_variables, writable
from redheart.optim.building import build_root
from redheart.schema import RedHeartError


@pytest.fixture
def nobody(monkeypatch):
    """A container's user: no HOME, no entry in /etc/passwd."""

    def unknown(uid: int):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_the_xdg_rule(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/cache", None):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if unset is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_directory() == tmp_path / ".cache" / "redheart"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x" / "redheart"


def test_a_user_without_a_home(nobody, monkeypatch, tmp_path):
    for ask in (cache_directory, build_root):
        with pytest.raises(RedHeartError, match="XDG_CACHE_HOME"):
            ask()
    monkeypatch.setenv("HOME", "")  # which is no directory either
    with pytest.raises(RedHeartError, match="XDG_CACHE_HOME"):
        cache_directory()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "redheart"


def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RedHeartError, match=r"file/redheart cannot be made \(Not a directory\): set XDG_CACHE_HOME"):
        writable(tmp_path / "file" / "redheart")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(RedHeartError, match="set TORCH_EXTENSIONS_DIR"):
        build_root()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(RedHeartError, match="cannot be written to: set XDG_CACHE_HOME"):
        writable(tmp_path)


def test_empty_variables_do_not_reach_the_libraries(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    forget_empty_variables()
    assert not set(VARIABLES) - {"HF_HOME"} & os.environ.keys()
    assert "XDG_CACHE_HOME" not in os.environ
    assert os.environ["HF_HOME"] == "/somewhere"
    monkeypatch.setenv("XDG_CACHE_HOME", "/absolute")
    forget_empty_variables()
    assert os.environ["XDG_CACHE_HOME"] == "/absolute"
