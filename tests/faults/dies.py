"""`redheart …`, killed on the way: python -m tests.faults.dies FILE 2,3 train …  dies by SIGKILL before step 2 of its first start, before
step 3 of its second, and never again; FILE counts the starts."""

import os
import signal
import sys
from pathlib import Path

from redheart.cli import main
from redheart.train.trainer import Trainer

if __name__ == "__main__":
    file, steps = Path(sys.argv[1]), [int(s) for s in sys.argv[2].split(",")]
    starts = len(file.read_text()) if file.exists() else 0
    file.write_text("." * (starts + 1))
    whole = Trainer._step

    def step(self: Trainer, *arguments: object) -> object:
        if starts < len(steps) and self.state.step == steps[starts]:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *arguments)  # type: ignore[arg-type]

    Trainer._step = step  # type: ignore[method-assign, assignment]
    sys.argv = ["redheart", *sys.argv[3:]]
    main()
