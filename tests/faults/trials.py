"""Trials, their count and their table: the other end of server.py.

with Server(folder) as server:  reply = server.ask("resume_training", {"home": …}, Door(home, KILL, at=17))
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.cpp_extension import get_default_build_root

from redheart.train.checkpoint import last

ROOT = Path(__file__).parents[2]
COUNT, KILL, REFUSE, REFUSE_ALL, JOURNAL = range(5)
MIB, SECONDS = 2048, 10  # what a refused input may take


class Door(NamedTuple):
    """See door.c. `at`: the number of an operation, from 1."""

    folder: Path
    mode: int = COUNT
    at: int = 0
    reason: int = errno.ENOSPC
    journal: str = ""


class Reply(NamedTuple):
    codes: list[int]  # of each rank; negative: the signal that ended it
    late: bool
    operations: int | None  # None where it was killed
    result: Any
    seconds: list[float]
    mib: float
    said: str  # on stderr, by all
    out: str

    @property
    def code(self) -> int:
        """The first that is not 0."""
        return next((code for code in self.codes if code), 0)

    @property
    def lines(self) -> list[str]:
        """Its error lines."""
        return [line for line in self.said.splitlines() if line.startswith(("redheart: ", "Error: "))]


class Server:
    """A process that has imported everything and forks a child for each trial."""

    def __init__(self, folder: Path):
        self.folder = folder
        door = folder / "door.so"
        compile_ = ["gcc", "-O1", "-shared", "-fPIC", "-o", str(door), str(Path(__file__).with_name("door.c")), "-ldl"]
        subprocess.run(compile_, check=True)
        variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
        variables |= {
            "LD_PRELOAD": str(door),
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "COLUMNS": "200",
        }
        variables |= {"XDG_CACHE_HOME": str(folder / "cache"), "REDHEART_DEBUG": "", "PYTHONPATH": str(ROOT)}
        (folder / "cache").mkdir()
        (folder / "cache" / "torch_extensions").symlink_to(get_default_build_root())  # kernels are compiled already
        self._err = (folder / "server.err").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._err,
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._err.close()

    def ask(
        self, work: str, arguments: dict[str, Any], door: Door | None = None, seconds: float = 120, ranks: int = 0
    ) -> Reply:
        """Runs one work to its end, and at most for `seconds`; with `ranks` in as many processes."""
        plain = None if door is None else [str(door.folder), door.mode, door.at, door.reason, door.journal]
        request = {"work": work, "arguments": arguments, "door": plain, "seconds": seconds, "folder": str(self.folder)}
        request["ranks"] = ranks
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write((json.dumps(request) + "\n").encode())
        self._process.stdin.flush()
        deadline = time.monotonic() + seconds + 600  # the first one waits for the imports
        ready, _, _ = select.select([self._process.stdout], [], [], deadline - time.monotonic())
        assert ready, (self.folder / "server.err").read_text()[-3000:]
        line = self._process.stdout.readline()
        assert line, (self.folder / "server.err").read_text()[-3000:]
        answer = json.loads(line)
        said, out = (
            "".join((self.folder / f"{name}-{r}").read_text(errors="replace") for r in range(max(ranks, 1)))
            for name in ("err", "out")
        )
        return Reply(**answer, said=said, out=out)

    def done(self, work: str, arguments: dict[str, Any], door: Door | None = None) -> Reply:
        """As `ask`, of what has to succeed."""
        reply = self.ask(work, arguments, door)
        assert reply.code == 0, (work, arguments, reply.code, reply.said[-3000:])
        return reply

    def command(self, *arguments: str | Path, seconds: float = SECONDS) -> Reply:
        """`redheart …`."""
        return self.ask("command", {"arguments": [str(a) for a in arguments]}, seconds=seconds)


def train(
    server: Server, home: Path, *hurt: list[Any], more: Sequence[str] = (), ranks: int = 0, seconds: float = 120
) -> Reply:
    """`redheart train` of what stands in `home`, as a supervisor would go on with it; see works.HURTS."""
    run = home / "run"
    begin = ["--resume"] if last(run) else ["--overwrite"] if run.exists() else []
    arguments = {"home": str(home), "hurt": hurt, "more": list(more), "begin": begin}
    return server.ask("train_hurt", arguments, seconds=seconds, ranks=ranks)


def fresh(world: Path, home: Path) -> Path:
    """The world without its run."""
    shutil.copytree(world, home)
    shutil.rmtree(home / "run")
    return home


class Table:
    """fault -> how often each end came; printed at the end of the session, and written where REDHEART_FAULTS_TABLE names a file."""

    def __init__(self) -> None:
        self.rows: dict[str, Counter[str]] = {}
        self.seconds: Counter[str] = Counter()

    def add(self, fault: str, end: str) -> None:
        self.rows.setdefault(fault, Counter())[end] += 1

    def lines(self) -> list[str]:
        if not self.rows:
            return []
        told = [
            f"| {fault} | {ends.total()} | {', '.join(f'{n} {end}' for end, n in ends.most_common())} | {self.seconds[fault]:.0f} |"
            for fault, ends in self.rows.items()
        ]
        return ["| fault | trials | ends | seconds |", "|---|---|---|---|", *told]


TABLE = Table()


def refused(reply: Reply, named: Sequence[str] = ()) -> str:
    """How a door took a wrong input: "refused", or what is wrong with how it did."""
    if reply.late:
        return f"took longer than {SECONDS} s"
    if reply.mib > MIB:
        return f"took {reply.mib:.0f} MiB"
    if "Traceback" in reply.said:
        return f"traceback: {reply.said.strip().splitlines()[-1][:200]}"
    if reply.code == 0:
        return "accepted"
    if reply.code not in (1, 2) or len(reply.lines) != 1:
        return f"code {reply.code}, {len(reply.lines)} lines: {reply.said[-300:]}"
    if missing := [name for name in named if name not in reply.lines[0]]:
        return f"{missing} not named: {reply.lines[0][:300]}"
    return "refused"
