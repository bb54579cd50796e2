"""Run by test_zero.py on one or two ranks: steps of the tiny network, saved, loaded, and compared bit by bit.

    python -m tests.train.tiny_run '{"strategy": …, "steps": 6, "save_at": 3, "save": DIR, "load": DIR or null, "twice": true}'

`weights`: FILE for the weights that the engine ends with, gathered from all ranks.
`carry`: DIR of a checkpoint whose weights and, unless `moments` is false, whose moments a fresh engine starts with.
Prints JSON on rank 0: the loss of every step, and with `twice` whether a second engine that loaded the checkpoint of
`save_at` ended with the same bits (master weights, optimizer states and model) on every rank.
"""

import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from redheart.config import load_config
from redheart.model.build import Place, build_model
from redheart.model.redheart import RedHeartConfig
from redheart.ranks import barrier, is_main
from redheart.tasks import task_weights
from redheart.train.engine import Engine, consolidated_weights, make_engine
from redheart.train.moments import open_moments
from redheart.train.progress import Progress
from redheart.train.stages import compute, forward, open_window, update
from redheart.train.stored import Stored, fill
from tests.train.tiny import SETTINGS, make_batch

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
ROWS = 4 // WORLD  # of a micro-batch; two of them on every rank


def start(wanted: dict[str, Any]) -> tuple[Engine, Any]:
    settings = [*SETTINGS, f"memory.strategy={wanted['strategy']}", f"training.precision={wanted['precision']}"]
    config = load_config("local", [*settings, "training.micro_batch_size=4", *wanted.get("set", [])])
    torch.manual_seed(0)
    if not wanted.get("carry"):
        return make_engine(partial(build_model, config, None), config, 2, ROWS), config
    directory = Path(wanted["carry"])
    values = config.model.model_dump(exclude={"activation_checkpointing"})
    weights = consolidated_weights(directory)
    stored = Stored(directory, RedHeartConfig(**values), config, Progress(), weights.__getitem__)

    def build(place: Place) -> Any:
        def fill_and_place(name: str, module: torch.nn.Module) -> None:
            fill(stored, name, module)
            place(name, module)

        return build_model(config, None, fill_and_place)

    engine = make_engine(build, config, 2, ROWS)
    if wanted.get("moments", True):
        with open_moments(stored) as moments:
            engine.set_moments(moments.read, moments.step)
    return engine, config


NORMS: dict[str, float] = {}  # of the first step's gradients, by module


def step(engine: Engine, config: Any, number: int) -> float:
    factors = task_weights(config.loss)
    starts = [k * 4 + engine.rank * ROWS for k in range(2)]
    batches = [make_batch(range(s, s + ROWS)).to("cpu", engine.dtype) for s in starts]
    window, total = open_window(batches, False), 0.0
    for i, batch in enumerate(window.batches):
        loss, _ = compute(forward(engine, batch), batch, window.counts, factors, 2 * WORLD, config.loss)
        engine.backward(loss, i == 1)
        total += float(loss) / 2 / WORLD
    done = update(engine, 1e-3)
    assert done.applied
    if not NORMS:
        NORMS.update(done.module_norms)
    mean = torch.tensor(total, dtype=torch.float64)
    dist.all_reduce(mean)
    return mean.item()


def digest(engine: Engine) -> str:
    """Of all bits that this rank holds."""
    zero = engine._zero
    masters = zero.fp32_partitioned_groups_flat if engine._stage == 3 else zero.single_partition_of_fp32_groups
    models = zero.fp16_partitioned_groups_flat if engine._stage == 3 else zero.bit16_groups_flat
    states = [v for s in zero.optimizer.state.values() for _, v in sorted(s.items()) if isinstance(v, torch.Tensor)]
    found = hashlib.sha256()
    for tensor in [*masters, *models, *states]:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    wanted = json.loads(sys.argv[1])
    engine, config = start(wanted)
    if wanted.get("load"):
        engine.load(Path(wanted["load"]))
    losses, bitwise = [], None
    for number in range(wanted["steps"]):
        losses.append(step(engine, config, number))
        if "save" in wanted and number + 1 == wanted.get("save_at", wanted["steps"]):
            Path(wanted["save"]).mkdir(parents=True, exist_ok=True)
            engine.save(Path(wanted["save"]))
            barrier()
    if wanted.get("twice"):
        expected = digest(engine)
        engine.close()
        engine, config = start(wanted)
        assert digest(engine) != expected
        engine.load(Path(wanted["save"]))
        replayed = [step(engine, config, n) for n in range(wanted["save_at"], wanted["steps"])]
        same = digest(engine) == expected and replayed == losses[wanted["save_at"] :]
        everyone: list[Any] = [None] * WORLD
        dist.all_gather_object(everyone, same)
        bitwise = all(everyone)
    if wanted.get("weights"):
        parameters = dict(engine.model.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine._stage == 3):
            if is_main():
                torch.save({n: p.detach().clone() for n, p in parameters.items()}, wanted["weights"])
    if is_main():
        told = {
            "losses": losses,
            "norms": NORMS,
            "bitwise": bitwise,
            "optimizer": type(engine._zero.optimizer).__name__,
        }
        print(json.dumps(told))


if __name__ == "__main__":
    main()
