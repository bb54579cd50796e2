"""Whose files a directory holds, and who is at work in it.

A directory that the product writes into carries `.redheart.json`: what it is (a run, prepared data) and the names in it that
the product wrote. Only these names are ever replaced or removed; everything else in it is the user's. `.redheart.lock` is
held by the process that writes there, and is free again the moment that process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from redheart.console import console
from redheart.files import (
    LOCK,
    check_name,
    flush_to_disk,
    read_sealed_json,
    remove,
    unfinished_files,
    write_sealed_json,
)
from redheart.schema import RedHeartError

MARKER = ".redheart.json"


def make_directory(path: Path, option: str) -> None:
    """Makes `path`, for its owner alone (users' texts will lie there), and its parents; RedHeartError, naming the command's `option`,
    where a file or a permission is in the way. One that is there stays as it is."""
    check_name(path, option)
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RedHeartError(f"{option} {path} is a file, or lies below one: name a directory") from None
    except OSError as error:
        raise RedHeartError(f"{option} {path} cannot be made ({error.strerror}): name another directory") from None


def check_can_make(path: Path, option: str) -> None:
    """Raises RedHeartError where `path` could not be made, before long work whose result would go there. Makes nothing."""
    there = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not there.is_dir():
        raise RedHeartError(f"{option} {path}: {there} is a file: name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RedHeartError(f"{option} {path}: {there} cannot be written to: name another place")


def check_can_make_file(path: Path, option: str, example: str) -> None:
    """The same of a file, such as `example`, which no directory may be."""
    if path.is_dir():
        raise RedHeartError(f"{option} {path} is a directory: name a file in it, such as {path / example}")
    check_can_make(path, option)


def check_new(path: Path, option: str = "--out") -> None:
    """The same of what must not be there yet, not even as a link to nothing, which no directory could be renamed to."""
    check_name(path, option)
    if os.path.lexists(path):
        raise RedHeartError(f"{path} exists already: name another {option}")
    check_can_make(path, option)


def owned(directory: Path, kind: str) -> list[str]:
    """The names in `directory` that the product wrote as a `kind` ("run", "data"); none where it never did."""
    path = directory / MARKER
    if not path.exists():
        return []
    marker = read_sealed_json(path, "nothing in this directory is touched without it; name another one")
    names = marker.get("names")
    if not isinstance(names, list) or not all(isinstance(n, str) and n == Path(n).name for n in names):
        raise RedHeartError(f"{path} is damaged: nothing in this directory is touched without it; name another one")
    if marker.get("kind") != kind:
        raise RedHeartError(f"{directory} holds a {marker.get('kind')}, not a {kind}: name another directory")
    return names


def own(directory: Path, kind: str, names: Iterable[str], dry: bool = False) -> None:
    """Says, before they are written, that these `names` in `directory` are ours; `dry`: looks only whether they could be.

    Raises RedHeartError where one of them is there already and was not ours.
    """
    before = owned(directory, kind)
    new = [name for name in names if name not in before]
    for name in new:
        if os.path.lexists(directory / name):
            raise RedHeartError(
                f"{directory / name} is there already and was not written by redheart: move it away, or name another directory"
            )
    if (new or not before) and not dry:
        write_sealed_json(directory / MARKER, {"kind": kind, "names": [*before, *new]})


def adopt(directory: Path, kind: str, names: Iterable[str]) -> None:
    """Says of what is there already, and was written before directories had a marker, that it is ours."""
    assert not owned(directory, kind)
    write_sealed_json(directory / MARKER, {"kind": kind, "names": list(names)})


def disown_others(directory: Path, kind: str, names: Iterable[str]) -> None:
    """Says that of the names that were ours these alone still are: what the user calls by another one later is the user's."""
    before, names = owned(directory, kind), set(names)
    if not names.issuperset(before):
        write_sealed_json(directory / MARKER, {"kind": kind, "names": [name for name in before if name in names]})


def remove_owned(directory: Path, kind: str) -> None:
    """Removes what the product wrote in `directory`, and nothing else; the marker goes last."""
    for name in owned(directory, kind):
        remove(directory / name)
    (directory / MARKER).unlink(missing_ok=True)
    flush_to_disk(directory)


@contextmanager
def exclusive(directory: Path, work: str) -> Iterator[None]:
    """Holds `directory` for this process; RedHeartError at once, naming the other process, where one is at `work` in it.

    The directory must exist. Of a launch's processes only one may call this.
    """
    path = directory / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(handle, 100).decode("ascii", "replace").strip() or "unknown"
            raise RedHeartError(
                f"another process ({other}) is {work} in {directory}: wait for it to end, or name another directory"
            ) from None
        except OSError as error:  # some network file systems are mounted without locks
            console.print(
                f"{directory} cannot be locked ({error.strerror}): see to it that no other process is {work} in it",
                markup=False,
            )
        for left in unfinished_files(directory):  # of processes that were killed
            remove(left)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)  # the lock goes with it; the file stays: removing it would let two processes hold two locks
