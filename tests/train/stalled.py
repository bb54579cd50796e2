"""Run by test_stalls.py on two ranks: rank 0 gets SIGQUIT while rank 1 waits for it. `python -m tests.train.stalled RUN`"""

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from redheart.ranks import barrier, rank
from redheart.train.stalls import stacks, stacks_file


def main() -> None:
    dist.init_process_group("gloo")
    run = Path(sys.argv[1])
    with stacks(run):
        if rank() == 0:
            time.sleep(0.5)  # until rank 1 stands still
            os.kill(os.getpid(), signal.SIGQUIT)
            deadline = time.monotonic() + 20
            while not (run / stacks_file(1)).stat().st_size and time.monotonic() < deadline:
                time.sleep(0.05)
        barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
