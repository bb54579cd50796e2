"""What can be judged of an engine before anything is made or written: settings, machine and launcher together."""

from __future__ import annotations

from redheart.config import RunConfig
from redheart.device import compute_device, has_gpu, tell_deepspeed
from redheart.memory.states import TRAITS
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
    strategy, swap = config.memory.strategy, config.memory.swap
    eight_bit = config.optimizer_name == "adamw_8bit"
    if strategy == "plain":
        if launched_world_size() > 1:
            raise RedHeartError("memory.strategy=plain runs on one process: choose zero2_offload for several")
        if eight_bit and (swap or compute_device().type != "cpu"):
            raise RedHeartError(
                "memory.strategy=plain has 8-bit states on the CPU alone, and without memory.swap: choose zero2_offload_8bit or gpu_8bit"
            )
        return
    if swap:
        raise RedHeartError(
            f"memory.swap in training needs memory.strategy=plain: {strategy} places parameters itself; empty one of them, or choose "
            "zero3_offload_8bit to keep parameters off the device"
        )
    if eight_bit and not TRAITS[strategy].offload and not has_gpu():
        raise RedHeartError(
            f"memory.strategy={strategy} keeps 8-bit states on a GPU and none is visible: choose zero2_offload_8bit"
        )
    check_accelerate()
    tell_deepspeed()
    build_root()
