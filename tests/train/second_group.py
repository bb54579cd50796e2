"""Run by test_two_groups.py on two ranks: `after_main`, then a group as an engine makes it, at which rank 1 arrives late."""

import sys
import time

import torch.distributed as dist

from redheart.ranks import after_main, launched_rank, sum_over_ranks


def main() -> None:
    for word in ("one", "two"):
        assert after_main(lambda word=word: word) == word
    if launched_rank() == 1:
        time.sleep(3)  # rank 0 looks for it meanwhile, and must not find where it was before
    dist.init_process_group("gloo")
    sys.stdout.write(f"{sum_over_ranks([1.0 + dist.get_rank()])[0]}\n")  # one piece: two ranks may write to one pipe
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
