"""How a command ends: the exit codes, which tell a supervisor (launch/supervise.sh) whether starting again can help.

| code | what ended it | starting again |
|---|---|---|
| 0 | it is done | |
| 1 | settings, data, a damaged file, a full disk: one line names it and the remedy | meets it again |
| 2 | the command line is wrong | meets it again |
| 70 | nobody foresaw it: a traceback | may help |
| 75 | another rank, a node or the network was lost: one line names it | helps |
| 128 + N | signal N; SIGINT and SIGTERM end a run with a checkpoint | was asked to end |
| 141 | whoever read stdout has gone, as `head` does (128 + SIGPIPE); all other work is done | |

A launcher has an exit code of its own, and keeps signals to itself: each process appends to the file of REDHEART_EXIT_CODES, where
that is set, "pid N" as it begins and its code as it ends (launch/processes.sh reads them).
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from redheart.schema import PassingError, RedHeartError

REFUSED, UNFORESEEN, PASSING, UNREAD = 1, 70, 75, 128 + signal.SIGPIPE
FILE = "REDHEART_EXIT_CODES"


def code_of(error: BaseException) -> int:
    """Of an error whose line was printed."""
    return PASSING if isinstance(error, PassingError) else REFUSED


@contextmanager
def ending() -> Iterator[None]:
    """Around a command: an error that nobody foresaw shows its traceback; the exit code is told."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # so a shell without job control starts what stands before `&`: whoever interrupts this very process means it, from its start on
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # "save", which only training hears: it ends nothing
    _tell(f"pid {os.getpid()}")
    try:
        yield
    except SystemExit as end:
        _tell(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except Exception as error:
        traceback.print_exc()
        code = code_of(error) if isinstance(error, RedHeartError) else UNFORESEEN
        _tell(code)
        raise SystemExit(code) from None
    _tell(0)


def _tell(line: int | str) -> None:
    if file := os.environ.get(FILE):
        with open(file, "a", encoding="ascii") as told:
            told.write(f"{line}\n")
