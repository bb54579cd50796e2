"""Run by test_launches.py: what an engine does for every parameter tensor in one optimizer step, counted.

python -m tests.memory.launches_run STRATEGY      prints {"micro", "update", "waits"} per tensor as JSON
"""

import json
import sys
from functools import partial

from torch.utils._python_dispatch import TorchDispatchMode

from redheart.config import load_config
from redheart.losses.combine import factors
from redheart.model.build import build_model
from redheart.tasks import GATES, TASKS, task_weights
from redheart.train.engine import make_engine
from redheart.train.measure import synthetic_batch
from redheart.train.stages import loss_of, open_window
from tests.train.tiny import SETTINGS

READ = "aten::_local_scalar_dense"
ACCUMULATION = 3


class Count(TorchDispatchMode):
    """Operations that are no views, and how many of them read a number."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += not func.is_view
        self.reads += func._schema.name == READ
        return func(*args, **(kwargs or {}))


def main(strategy: str) -> dict[str, float]:
    sizes = [f"training.global_batch_size={2 * ACCUMULATION}", "training.micro_batch_size=2"]
    config = load_config("local", [*SETTINGS, *sizes, f"memory.strategy={strategy}", "training.precision=bf16"])
    engine = make_engine(partial(build_model, config, None), config, ACCUMULATION, 2)
    scale = factors(task_weights(config.loss), dict.fromkeys((*TASKS, *GATES), 1.0), config.loss.constant_floor)
    batches = [synthetic_batch(2, 8, config.model.encoder_width, i) for i in range(ACCUMULATION)]
    for _ in range(3):  # the first makes states and the second, under ZeRO-3, a plan of what to gather
        window, micro = open_window(batches, False), []
        for i, batch in enumerate(window.batches):
            _, loss, _ = loss_of(engine, engine, batch, window, scale, config.loss)
            with Count() as one:
                engine.backward(loss, is_last=i == ACCUMULATION - 1)
            micro.append(one)
        with Count() as update:
            engine.step()
    model = build_model(config, None).to(engine.dtype)
    _, loss, _ = loss_of(model, engine, window.batches[0], window, scale, config.loss)
    with Count() as bare:
        loss.backward()
    tensors, reads = len(list(model.parameters())), update.reads + micro[-1].reads
    steps = micro[-1].operations - micro[1].operations + update.operations - reads
    return {
        "micro": (micro[1].operations - bare.operations) / tensors,
        "update": steps / tensors,
        "waits": reads / tensors,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1])))
