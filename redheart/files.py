"""Files that are either whole or absent: write-and-rename, sha256 manifests, completion markers.

A directory is committed by its manifest: `committed_directory` fills a hidden one beside it, writes `manifest.json` (sha256 of
every file), flushes everything to the disk and renames. A directory without a valid manifest was never committed. What is not
finished has a name that no user chooses, `.NAME.redheart-XXXXXXXX.tmp`: a NAME.tmp or NAME.old beside NAME is somebody else's.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redheart.schema import RedHeartError

MANIFEST, LOCK = "manifest.json", ".redheart.lock"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """fsync of a file or of a directory's entry list."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, rights: int = 0o666) -> None:
    """Replaces `path` with `text` in one step; a reader sees the old file or the new one, never half of one. `rights`: less the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished_name(path)
    try:
        with open(temporary, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, rights)) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def unfinished_name(final: Path) -> Path:
    """A new hidden name beside `final` for what is to become it."""
    return final.with_name(f".{final.name[:60]}.redheart-{secrets.token_hex(4)}.tmp")


def unfinished_of(final: Path) -> list[Path]:
    """What has such a name beside `final`, of whatever process."""
    pattern = re.compile(rf"\.{re.escape(final.name[:60])}\.redheart-[0-9a-f]{{8}}\.tmp")
    return [p for p in final.parent.glob(".*.tmp") if pattern.fullmatch(p.name)]


def unfinished_files(directory: Path) -> list[Path]:
    """The files in `directory` that have such a name."""
    return [
        p for p in directory.glob(".*.tmp") if re.fullmatch(r"\..+\.redheart-[0-9a-f]{8}\.tmp", p.name) and p.is_file()
    ]


def remove(path: Path) -> None:
    """Removes a file, a link or a whole directory, where it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# torch's and safetensors' own errors of a write that the system refused; torch does not say why
NO_ROOM_SAID = re.compile(
    rf"file write failed|unexpected pos|strerror: (?:{'|'.join(map(os.strerror, NO_ROOM))})"
    rf"|os error ({'|'.join(map(str, sorted(NO_ROOM)))})"
)


def no_room(error: BaseException) -> str | None:
    """Why a write found no room (disk full, quota, limit on the size of a file), in a few words; None for other errors."""
    if isinstance(error, OSError):
        if error.errno not in NO_ROOM:
            return None
        reason = os.strerror(error.errno)
        return f"{reason}: {error.filename}" if error.filename else reason
    if isinstance(error, MemoryError) or not (refusal := NO_ROOM_SAID.search(str(error))):
        return None
    return os.strerror(int(refusal[1])) if refusal[1] else "a write was cut off"


@contextmanager
def telling_no_room(work: str, kept: str = "") -> Iterator[None]:
    """Turns a write that found no room into a RedHeartError; `kept`: what of the work is not lost."""
    try:
        yield
    except Exception as error:
        reason = no_room(error)
        if reason is None:
            raise
        raise RedHeartError(
            f"{work} failed ({reason}): make room, or raise the limit (quota, ulimit -f){kept}"
        ) from error


def check_name(path: str | Path, what: str) -> None:
    """Raises RedHeartError where a path is not UTF-8: what is written down of it could not be read back."""
    try:
        f"{path} {os.path.realpath(path)}".encode()
    except ValueError:  # of a NUL, too
        raise RedHeartError(f"{what} {path}: this name, or one above it, is not UTF-8: rename it") from None


def is_here() -> bool:
    """Whether the current directory is still there, so that relative paths mean something."""
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def write_json(path: Path, value: Any) -> None:
    """Indented, with lists of plain numbers on one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False)
    one_line = re.sub(r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    write_text(path, one_line + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """The value in a JSON file; a missing or unreadable one is an error that names the file and `remedy`."""
    try:
        return json.loads(read_text(path, remedy, "JSON"))
    except (ValueError, RecursionError) as error:
        raise RedHeartError(f"{path} is not valid JSON ({error}): {remedy}") from None


def read_text(path: Path, remedy: str, kind: str = "UTF-8") -> str:
    """A UTF-8 file; one that is missing, unreadable, a directory or not UTF-8 is an error that names the file and `remedy`."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RedHeartError(f"{path} does not exist: {remedy}") from None
    except UnicodeDecodeError as error:
        raise RedHeartError(f"{path} is not valid {kind} ({error}): {remedy}") from None
    except OSError as error:
        raise RedHeartError(f"{path} cannot be read ({error.strerror}): {remedy}") from None


SEAL = "# sha256 of the lines above: "


def seal(text: str) -> str:
    """`text` with a last line that tells whether it was changed; for files that have comments (YAML, JSON lines are sealed otherwise)."""
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def unseal(text: str, path: Path, remedy: str) -> str:
    """The text that `seal` was given; one that was changed since is an error. A text without a seal comes back as it is."""
    body, separator, digest = text.rpartition(SEAL)
    if not separator:
        return text
    if digest != hashlib.sha256(body.encode()).hexdigest() + "\n":
        raise RedHeartError(f"{path} was changed since it was written (its last line says so): {remedy}")
    return body


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """`write_json` of a mapping with one more key, `sha256`: of the rest, as canonical JSON."""
    write_json(path, {**value, "sha256": _digest(value)})


def read_sealed_json(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_sealed_json` was given; a file that was changed since, or never sealed, is an error."""
    return check_sealed_json(read_json(path, remedy), path, remedy)


def check_sealed_json(value: Any, path: object, remedy: str) -> dict[str, Any]:
    """The second half of `read_sealed_json`, for texts that came another way than from a local file."""
    digest = value.pop("sha256", None) if isinstance(value, dict) else None
    if digest is None:
        raise RedHeartError(f"{path} has no sha256 of its own: it is damaged, or of an earlier version: {remedy}")
    if digest != _digest(value):
        raise RedHeartError(f"{path} is damaged (its sha256 is not that of its content): {remedy}")
    return value


def sealed_line(value: dict[str, Any]) -> str:
    """A line for a file that grows line by line (JSON lines): the mapping with one more key, `sha256`, as of `write_sealed_json`."""
    return json.dumps({**value, "sha256": _digest(value)}, ensure_ascii=False) + "\n"


def read_sealed_lines(path: Path, remedy: str) -> list[dict[str, Any]]:
    """What `sealed_line` was given, of the lines that are whole; a damaged line is an error that names the file and its number.

    What follows the last line break is what a kill cut short; it is left out.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RedHeartError(f"{path} cannot be read ({error.strerror}): {remedy}") from None
    values = [
        check_sealed_json(_value_of(line), f"line {number} of {path}", remedy) for number, line in enumerate(lines, 1)
    ]
    if _value_of(rest[:-1]) is not None:  # nothing was cut short: its line break is another character now
        raise RedHeartError(f"line {len(lines) + 1} of {path} is damaged (it does not end): {remedy}")
    return values


def _value_of(line: bytes) -> Any:
    """What a line of JSON holds, or None."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_manifest(directory: Path) -> None:
    """Lists every file below `directory` with its sha256 and size, and flushes each to the disk. Written last, and sealed."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in (MANIFEST, LOCK))
    entries = {str(p.relative_to(directory)): {"sha256": sha256_of(p), "bytes": p.stat().st_size} for p in files}
    for path in files:
        flush_to_disk(path)
    write_sealed_json(directory / MANIFEST, {"files": entries})


def list_in_manifest(directory: Path, name: str, listed: bool, remedy: str) -> None:
    """Takes one file of a committed directory into its manifest, as it is now, or out of it; what it says of the others stays."""
    path = directory / MANIFEST
    content = read_sealed_json(path, remedy)
    _entries(content, path, remedy)
    files = {other: entry for other, entry in content["files"].items() if other != name}
    if listed:
        files[name] = {"sha256": sha256_of(directory / name), "bytes": (directory / name).stat().st_size}
    write_sealed_json(path, {"files": dict(sorted(files.items()))})


def verify_manifest(
    directory: Path,
    remedy: str = "choose another checkpoint",
    only: Collection[str] | None = None,
    free: Collection[str] = frozenset(),
) -> None:
    """Raises RedHeartError, with `remedy`, unless every file of the manifest (or those of `only`) is there with the recorded sha256.

    `free`: names that may be changed or missing.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise RedHeartError(f"{path} does not exist: this directory was never committed; choose another one")
    for name, digest in _entries(read_sealed_json(path, remedy), path, remedy).items():
        file = below(path, name, remedy)
        if name in free or (only is not None and name not in only):
            continue
        if not file.is_file():
            raise RedHeartError(f"{file} is missing although {MANIFEST} names it: {remedy}")
        if sha256_of(file) != digest:
            raise RedHeartError(f"{file} is damaged (its sha256 differs from {MANIFEST}): {remedy}")


def below(path: Path, name: object, remedy: str) -> Path:
    """The file that `path`, a list of files, names in its own directory; a name that leads elsewhere is an error."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if {"", ".", ".."} & set(parts) or "\0" in str(name) or "\\" in str(name):
        raise RedHeartError(f"{path} names {name!r}, which is no file in its directory: {remedy}")
    return path.parent.joinpath(*parts)


def _entries(content: dict[str, Any], path: Path, remedy: str) -> dict[str, str]:
    """The sha256 of each file that a manifest names."""
    entries = content.get("files")
    files = entries if isinstance(entries, dict) else {"": None}
    digests = {name: entry.get("sha256") for name, entry in files.items() if isinstance(entry, dict)}
    named = {name: digest for name, digest in digests.items() if isinstance(digest, str)}
    if set(content) != {"files"} or named.keys() != files.keys():
        raise RedHeartError(f"{path} is no manifest of this program (files: name, sha256, bytes): {remedy}")
    return named


@contextmanager
def unfinished_directory(final: Path, rights: int = 0o777) -> Iterator[Path]:
    """A new hidden directory beside `final`, to be filled and renamed to it; removed in the end where that did not happen.

    It holds a locked file as long as this process lives. What killed processes left on their way to `final` is removed first.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished_name(final)
    parent = os.open(final.parent, os.O_RDONLY)
    try:
        alone = _lock(parent, wait=True)  # nobody is between making a directory and locking it
        for left in unfinished_of(final):
            if (alone and not (left / LOCK).is_file()) or ((left / LOCK).is_file() and not _is_locked(left / LOCK)):
                remove(left)
        temporary.mkdir(rights)
        handle = os.open(temporary / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        _lock(handle, wait=True)
    finally:
        os.close(parent)
    try:
        yield temporary
        if not temporary.exists():
            (final / LOCK).unlink(missing_ok=True)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
        os.close(handle)


def _lock(handle: int, wait: bool = False) -> bool:
    """Whether the file is ours alone now. A file system without locks: then nobody finds it unlocked either."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except OSError:
        return False


def _is_locked(path: Path) -> bool:
    handle = os.open(path, os.O_RDWR)
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


@contextmanager
def committed_directory(final: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a hidden directory to be filled; on success it becomes `final`, on an error it is removed and `final` untouched.

    Raises RedHeartError where `final` is there by then, unless it may be replaced.
    """
    with unfinished_directory(final) as temporary:
        yield temporary
        commit_directory(temporary, final, unfinished_name(final) if replace else None)


def commit_directory(temporary: Path, final: Path, aside: Path | None) -> None:
    """The second half of `committed_directory`, for callers whose ranks fill the directory together.

    A `final` that is there is moved to `aside`, and removed once the new one has its name.
    """
    write_manifest(temporary)
    for directory in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        flush_to_disk(directory)
    if final.exists():
        if aside is None:
            raise RedHeartError(f"{final} has come to exist meanwhile: move it away, or name another directory")
        remove(aside)
        os.rename(final, aside)
    os.rename(temporary, final)
    flush_to_disk(final.parent)
    if aside is not None:
        remove(aside)


def write_pointer(path: Path, target: str) -> None:
    """A small text file that names a sibling directory (`last`, `best`); a link would not survive every file system."""
    write_text(path, target + "\n")


def read_pointer(path: Path) -> Path | None:
    """The sibling that a pointer names, or None where there is no pointer that names one."""
    try:
        name = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return path.parent / name if name and name == Path(name).name else None
