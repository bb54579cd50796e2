"""Two ranks and one process take the same step, and a label may be missing anywhere."""

import json

from redheart.schema import LABELS
from redheart.tasks import TASKS
from tests.runs import forked


def test_two_ranks_give_the_gradient_of_one_process_and_train_without_any_label():
    done = forked("tests.train.two_ranks", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["ranks"] == 2
    assert told["finite"]
    assert told["worst"] < 1e-5
    assert told["compared"] > 0.9 * told["parameters"]
    for label in LABELS:
        assert told["vanished"][label] == sorted(n for n, t in TASKS.items() if t.label == label)
