"""Where this machine keeps what was made once: $XDG_CACHE_HOME/redheart, or ~/.cache/redheart.

By the XDG rule an empty or relative XDG_CACHE_HOME counts as not set.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from redheart.schema import RedHeartError

XDG = "XDG_CACHE_HOME"
VARIABLES = (
    "HOME",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)


def cache_directory() -> Path:
    """The directory, which need not exist yet. Raises RedHeartError where neither variable nor home directory says where."""
    given = Path(os.environ.get(XDG, ""))
    if given.is_absolute():
        return given / "redheart"
    try:
        home = Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # no such user in /etc/passwd, as in many containers
        home = Path()
    if not home.is_absolute():
        raise RedHeartError(
            f"this user has no home directory to keep models and kernels in: set HOME, or {XDG}, to a directory it may write to"
        )
    return home / ".cache" / "redheart"


def writable(directory: Path, variable: str = XDG) -> Path:
    """`directory`, made if it is not there; RedHeartError, naming the `variable` that moves it, where nothing can be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RedHeartError(f"cache {directory} cannot be made ({error.strerror}): {_remedy(variable)}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise RedHeartError(f"cache {directory} cannot be written to: {_remedy(variable)}")
    return directory


def _remedy(variable: str) -> str:
    return f"set {variable} to a directory that this user may write to"


def forget_empty_variables() -> None:
    """Removes cache variables that say nothing: torch and the hub's libraries would read them as the current directory."""
    for name in VARIABLES:
        if os.environ.get(name) == "":
            del os.environ[name]
    if not Path(os.environ.get(XDG, "/")).is_absolute():
        del os.environ[XDG]
