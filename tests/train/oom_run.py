"""Run by test_oom.py: `redheart …` on a machine whose memory is too small for a micro-batch, on one rank.

    python -m tests.train.oom_run WHERE RANK STEP ROWS train --data …

From optimizer step STEP on, the training pass of more than ROWS samples on rank RANK runs out of memory, in WHERE: `forward`
or `backward`.
"""

import sys

import torch

from redheart.cli import main
from redheart.model.redheart import RedHeartModel
from redheart.ranks import launched_rank
from redheart.train.trainer import Trainer


def install(where: str, rank: int, step: int, rows: int, patch=setattr) -> None:
    """`patch(class, name, function)` may be a fixture's, which takes it back."""
    now = {"step": -1}
    one_step, forward = Trainer._step, RedHeartModel.forward

    def noting(self, stop):
        now["step"] = self.state.step
        return one_step(self, stop)

    def limited(self, features, *arguments, **keywords):
        too_large = self.training and now["step"] >= step and launched_rank() == rank and len(features) > rows
        if too_large and where == "forward":
            raise torch.OutOfMemoryError("injected: tried to allocate 2.00 GiB")
        outputs = forward(self, features, *arguments, **keywords)
        if too_large:
            outputs.task_features.register_hook(run_out)
        return outputs

    patch(Trainer, "_step", noting)
    patch(RedHeartModel, "forward", limited)


def run_out(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("injected: tried to allocate 2.00 GiB")


if __name__ == "__main__":
    where, rank, step, rows, *sys.argv[1:] = sys.argv[1:]
    install(where, int(rank), int(step), int(rows))
    main()
