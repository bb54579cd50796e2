"""Runs works in children of its own, each forked from a process that has imported everything, behind the door of door.c.

    python -m tests.faults.server        (with LD_PRELOAD=door.so; a request a line on stdin, an answer a line on stdout)

A request is {"work", "arguments", "door": [folder, mode, at, errno, journal] or null, "seconds", "folder"}; `folder` takes what the
child prints. An answer is {"code", "signal", "operations", "seconds", "mib", "result"}.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.faults import works

door = ctypes.CDLL(None)


def child(request: dict[str, Any]) -> int:
    """What the forked process does; its exit code."""
    folder = Path(request["folder"])
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
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
    (folder / "result").write_text(json.dumps([door.door_count(), result]))
    return code


def serve(request: dict[str, Any]) -> dict[str, Any]:
    folder, started = Path(request["folder"]), time.monotonic()
    (folder / "result").unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(child(request))
        finally:
            os._exit(99)
    late = False
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if not late and time.monotonic() - started > request["seconds"]:
            os.kill(pid, signal.SIGKILL)
            late = True
        time.sleep(0.002)
    operations, result = json.loads((folder / "result").read_text()) if (folder / "result").exists() else (None, None)
    return {
        "code": os.waitstatus_to_exitcode(status), "late": late, "operations": operations, "result": result,
        "seconds": time.monotonic() - started, "mib": used.ru_maxrss / 1024,
    }  # fmt: skip


def main() -> None:
    replies = os.dup(1)  # DeepSpeed greets on stdout
    os.dup2(2, 1)
    works.get_ready()
    for line in sys.stdin:
        os.write(replies, (json.dumps(serve(json.loads(line))) + "\n").encode())


if __name__ == "__main__":
    main()
