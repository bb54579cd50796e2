"""Run by test_zero.py on two ranks: an evaluation under ZeRO-3 in which the ranks have unlike numbers of batches.

    python -m tests.train.evaluate_run '{"rows": …, "batch_size": …}'

Prints JSON on rank 0: rows and losses of the ranks together, and of the same weights on one process.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from redheart.config import load_config
from redheart.evaluation.evaluate import Evaluation, evaluate
from redheart.model.build import build_model
from redheart.ranks import barrier, is_main
from redheart.schema import Batch
from redheart.tasks import task_weights
from redheart.train.engine import make_engine
from tests.train.tiny import SETTINGS, make_batch

# a short timeout: ranks that wait for one another for ever fail soon
STRICT = ["memory.strategy=zero3_offload_8bit", "training.precision=fp32", "training.collective_timeout_s=60"]


class Rows:
    """The first rows of the fixed batch as a split, dealt as SampleStream.in_order deals them."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows

    def in_order(
        self, batch_size: int, rank: int = 0, world_size: int = 1, max_rows: int | None = None
    ) -> Iterator[Batch]:
        for turn, start in enumerate(range(0, self.num_rows, batch_size)):
            if turn % world_size == rank:
                yield make_batch(range(start, min(start + batch_size, self.num_rows)))


def main() -> None:
    wanted = json.loads(sys.argv[1])
    config = load_config("local", [*SETTINGS, *STRICT])
    stream: Any = Rows(wanted["rows"])

    def look(model: Any, *ranks: Any) -> Evaluation:
        return evaluate(
            model, stream, config.loss, task_weights(config.loss), "cpu", torch.float32, wanted["batch_size"], *ranks
        )

    torch.manual_seed(0)
    engine = make_engine(partial(build_model, config, None), config, 2, 2)
    together = look(engine.model, engine.rank, engine.world_size, None, engine.forward_has_collectives)
    torch.manual_seed(0)
    alone = build_model(config, None)
    with torch.no_grad():
        one = look(alone)  # sums over the ranks: every rank looks at all rows
    barrier()
    if is_main():
        ranks = engine.world_size
        told = {"ranks": ranks, "together": {**asdict(together), "metrics": None, "said": None}}
        print(json.dumps({**told, "alone": {"rows": one.rows / ranks, "losses": one.losses}}))


if __name__ == "__main__":
    main()
