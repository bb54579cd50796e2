"""What a disk holds after a power cut: replays the journal of door.c up to an operation, with what was not synced lost or torn.

The model is that of a journalling file system (ext4, xfs, btrfs): names (creations, renames, removals) reach the disk in their order,
all of those before an fsync with it; contents reach it at the fsync of their file, and before it partly or not at all.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Operation(NamedTuple):
    kind: str  # c create, t empty, w write, z cut, s fsync, r rename, l link, u unlink, m mkdir, d rmdir
    path: str
    other: str
    offset: int
    data: bytes


def read_journal(file: Path) -> list[Operation]:
    content, found = file.read_bytes(), []
    while content:
        head, _, content = content.partition(b"\n")
        kind, path, other, offset, length = head.decode().split("\t")
        found.append(Operation(kind, path, other, int(offset), content[: int(length)]))
        content = content[int(length) :]
    return with_unseen_renames(found)


def with_unseen_renames(operations: list[Operation]) -> list[Operation]:
    """safetensors' Rust renames its temporary file past the C library: seen when the file is synced under its other name."""
    found: list[Operation] = []
    made: set[str] = set()
    for one in operations:
        if one.kind == "s" and one.path not in made:
            folder = one.path.rpartition("/")[0]
            for name in sorted(n for n in made if re.fullmatch(re.escape(folder) + r"/\.tmp\w{6}", n)):
                found.append(Operation("r", name, one.path, 0, b""))
                made = (made - {name}) | {one.path}
                break
        if one.kind == "c":
            made.add(one.path)
        elif one.kind in "rl":
            made.add(one.other)
        found.append(one)
    return found


@dataclass
class Content:
    """A file. `synced`: what an fsync has put on the disk."""

    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""

    def torn(self) -> bytes:
        """Its length is on the disk, and of what came after the last fsync the first half; the rest reads as zeros."""
        same = next(
            (n for n, (a, b) in enumerate(zip(self.now, self.synced, strict=False)) if a != b), len(self.synced)
        )
        kept = same + (len(self.now) - same) // 2
        return bytes(self.now[:kept]) + bytes(len(self.now) - kept)


class Disk:
    """Names and contents below `root`; what is there at the beginning is on the disk."""

    def __init__(self, root: Path):
        self.root = root
        self.folders = {str(root), *(str(p) for p in root.rglob("*") if p.is_dir())}
        self.files = {str(p): _of(p) for p in root.rglob("*") if p.is_file()}

    def name(self, one: Operation) -> None:
        """An operation on names."""
        if one.kind == "c":
            self.files.setdefault(one.path, Content())
        elif one.kind == "m":
            self.folders.add(one.path)
        elif one.kind == "d":
            self.folders.discard(one.path)
        elif one.kind == "u":
            self.files.pop(one.path, None)
        elif one.kind == "l":
            self.files[one.other] = self.files[one.path]
        elif one.kind == "r":
            below = one.path + "/"
            if one.path in self.folders:
                for place in [f for f in self.folders if f == one.path or f.startswith(below)]:
                    self.folders.discard(place)
                    self.folders.add(one.other + place.removeprefix(one.path))
                for place in [f for f in self.files if f.startswith(below)]:
                    self.files[one.other + place.removeprefix(one.path)] = self.files.pop(place)
            else:
                self.files[one.other] = self.files.pop(one.path)

    def content(self, one: Operation) -> None:
        """An operation on what a file holds."""
        if (file := self.files.get(one.path)) is None:
            return  # a folder's fsync, or a file that has lost its name
        if one.kind == "t":
            file.now = bytearray()
        elif one.kind == "z":
            file.now = file.now[: one.offset] + bytes(max(0, one.offset - len(file.now)))
        elif one.kind == "w":
            file.now += bytes(max(0, one.offset - len(file.now)))
            file.now[one.offset : one.offset + len(one.data)] = one.data
        elif one.kind == "s":
            file.synced = bytes(file.now)


def _of(path: Path) -> Content:
    content = path.read_bytes()
    return Content(bytearray(content), content)


NAMES, STATES = "cmdulr", ("names lost", "contents lost", "contents torn")


def after_cut(start: Path, root: Path, operations: list[Operation], cut: int, state: str, target: Path) -> None:
    """Writes to `target` what a power cut after `cut` operations leaves of `root`, which began as the folder `start`.

    `state`: "names lost": neither names nor contents since the last fsync; "contents lost": all names, and of contents what was synced;
    "contents torn": all names, and contents of full length whose unsynced second half is zeros.
    """
    shutil.copytree(start, target)
    disk = Disk(target)
    moved = [_moved(o, str(root), str(target)) for o in operations[:cut]]
    synced = max((n + 1 for n, o in enumerate(moved) if o.kind == "s"), default=0)
    whole = Disk(target)  # as the process saw it: contents are told by their names of that time
    pairs = {id(file): disk.files[name] for name, file in whole.files.items()}
    for number, one in enumerate(moved):
        lasting = state != "names lost" or number < synced
        if one.kind in NAMES:
            whole.name(one)
            if lasting:
                disk.name(one)
            if one.kind == "c":
                pairs[id(whole.files[one.path])] = disk.files.get(one.path, Content()) if lasting else Content()
        elif file := whole.files.get(one.path):
            whole.content(one)
            twin = pairs[id(file)]
            twin.now, twin.synced = file.now, file.synced
    shutil.rmtree(target)
    for folder in sorted(disk.folders):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for name, file in disk.files.items():
        Path(name).write_bytes(file.torn() if state == "contents torn" else file.synced)


def _moved(one: Operation, root: str, target: str) -> Operation:
    return one._replace(path=one.path.replace(root, target, 1), other=one.other.replace(root, target, 1))
