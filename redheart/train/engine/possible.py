"""What can be judged of an engine before anything is made or written: settings, machine and launcher together."""

from __future__ import annotations

from redheart.config import RunConfig
from redheart.device import has_gpu, tell_deepspeed
from redheart.memory.states import refusal
from redheart.model.regional import check_compilation
from redheart.optim.building import build_root
from redheart.ranks import launched_world_size
from redheart.schema import RedHeartError
from redheart.train.engine.machinery import check_accelerate, check_launch_file, check_launch_options


def check_engine(config: RunConfig) -> None:
    """Raises RedHeartError where the engine that `memory.strategy` names cannot run these settings here. `make_engine` asks, and
    whoever writes or removes something first."""
    check_compilation(config)
    check_launch_file(config.memory.strategy)
    check_launch_options(config)
    strategy = config.memory.strategy
    if strategy == "plain" and launched_world_size() > 1:
        raise RedHeartError("memory.strategy=plain runs on one process: choose zero2_offload for several")
    if why := refusal(config, strategy, has_gpu()):
        raise RedHeartError(why)
    if strategy == "plain":
        return
    check_accelerate()
    tell_deepspeed()
    build_root()
