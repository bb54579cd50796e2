"""Run by test_spikes.py: a run that leaves out the samples of some steps: `python -m tests.train.left_out 3,4 train …`"""

import sys

from redheart.cli import main
from redheart.train.progress import Progress
from redheart.train.trainer import Trainer

if __name__ == "__main__":
    steps, *sys.argv[1:] = sys.argv[1:]
    run = Trainer.run

    def knowing(self: Trainer):
        self.state.left_out = [int(step) for step in steps.split(",")]
        return run(self)

    Trainer.run = knowing
    assert Progress().left_out == []
    main()
