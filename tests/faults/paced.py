"""`redheart …`, a step each so many seconds: python -m tests.faults.paced FILE SECONDS train …; FILE gets a line with each process's id."""

import os
import sys
import time

from redheart.cli import main
from redheart.train.trainer import Trainer

if __name__ == "__main__":
    file, seconds, *sys.argv[1:] = sys.argv[1:]
    with open(file, "a", encoding="ascii") as pids:
        pids.write(f"{os.getpid()}\n")
    whole = Trainer._step

    def step(self: Trainer, *arguments: object) -> object:
        began = time.monotonic()
        found = whole(self, *arguments)  # type: ignore[arg-type]
        time.sleep(max(0.0, float(seconds) - (time.monotonic() - began)))
        return found

    Trainer._step = step  # type: ignore[method-assign, assignment]
    main()
