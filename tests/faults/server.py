"""Runs works in children of its own, each forked from a process that has imported everything, behind the door of door.c.

    python -m tests.faults.server        (with LD_PRELOAD=door.so; a request a line on stdin, an answer a line on stdout)

A request is {"work", "arguments", "door": [folder, mode, at, errno, journal] or null, "seconds", "folder", "ranks"}; `folder` takes what
the children print: one, or with `ranks` as many as find each other, as a launcher starts them. An answer is {"codes", "late",
"operations", "seconds", "mib", "result"}: codes and seconds of each rank, the rest of the first. A child that stops itself is killed
once all others have ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.faults import works

door = ctypes.CDLL(None)


def child(request: dict[str, Any], number: int, world: dict[str, str]) -> int:
    """What the forked process does; its exit code."""
    folder = Path(request["folder"])
    os.environ.update(world)
    for stream, name in ((1, "out"), (2, "err")):
        handle = os.open(folder / f"{name}-{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, stream)
    if request["door"] is not None:
        where, mode, at, error, journal = request["door"]
        door.door_set(where.encode(), mode, ctypes.c_long(at), error, journal.encode())
    code, result = 0, None
    try:
        result = getattr(works, request["work"])(**request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # what an interpreter makes of it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / f"result-{number}").write_text(json.dumps([door.door_count(), result]))
    return code


def worlds(ranks: int) -> list[dict[str, str]]:
    """The variables of each process."""
    if not ranks:
        return [{}]
    import tests.train.warm  # noqa: F401  what ranks need is imported once, and only where there are some

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    return [{**meeting, "RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(ranks)} for r in range(ranks)]


def serve(request: dict[str, Any]) -> dict[str, Any]:
    folder = Path(request["folder"])
    for old in folder.glob("result-*"):
        old.unlink()
    variables, running = worlds(request["ranks"]), {}
    started = time.monotonic()
    for number, world in enumerate(variables):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(child(request, number, world))
            finally:
                os._exit(99)
        running[pid] = number
    codes, seconds, stopped, late, mib = [0] * len(running), [0.0] * len(running), set(), False, 0.0
    while running:
        for pid in list(running):
            done, status, used = os.wait4(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif done:
                number = running.pop(pid)
                stopped.discard(pid)
                codes[number], seconds[number] = os.waitstatus_to_exitcode(status), time.monotonic() - started
                mib = max(mib, used.ru_maxrss / 1024)
        overdue = not late and time.monotonic() - started > request["seconds"]
        if overdue or stopped == running.keys():
            late = late or overdue
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            stopped = set()
        time.sleep(0.002)
    first = folder / "result-0"
    operations, result = json.loads(first.read_text()) if first.exists() else (None, None)
    return {"codes": codes, "late": late, "operations": operations, "result": result, "seconds": seconds, "mib": mib}


def main() -> None:
    replies = os.dup(1)  # DeepSpeed greets on stdout
    os.dup2(2, 1)
    works.get_ready()
    for line in sys.stdin:
        os.write(replies, (json.dumps(serve(json.loads(line))) + "\n").encode())


if __name__ == "__main__":
    main()
