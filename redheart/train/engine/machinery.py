"""accelerate and deepspeed: imported once they know where they run, configured from ds_configs/, kernels compiled."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redheart.config import RunConfig
from redheart.device import has_gpu, tell_deepspeed, variables_kept
from redheart.files import read_json
from redheart.memory.ds_files import FILES as DS_FILES
from redheart.memory.ds_files import SPLIT
from redheart.memory.states import TRAITS, bucket_of
from redheart.optim.adam8bit import kernel as adam8bit_kernel
from redheart.optim.building import built_alone
from redheart.ranks import is_launched, launch_file, leave
from redheart.schema import RedHeartError
from redheart.signals.native import library as signals_kernels

if TYPE_CHECKING:
    import torch

START_S = 600  # how long processes wait for each other to start: nodes read and compile at their own pace
OTHERS = {"ACCELERATE_USE_CPU": "--cpu", "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm"}
# keys of a launch file's deepspeed_config, and its mixed_precision, that Accelerate refuses beside a DeepSpeed file, which every run has
UNHEARD = (
    *("zero_stage", "offload_optimizer_device", "offload_param_device", "offload_optimizer_nvme_path", "offload_param_nvme_path"),
    *("zero3_save_16bit_model", "gradient_accumulation_steps", "gradient_clipping", "mixed_precision"),
)  # fmt: skip
# parameters below which ZeRO-3 does not look ahead for the next use of what it has gathered: DeepSpeed 0.19.8 walks through all
# that is left of the pass at every module, for two minutes in the first steps of a small network, whose tensors stay gathered anyway
SMALL = 10_000_000
# DeepSpeed's kernels: of its optimizer, and of ranks on a CPU
CPU_ADAM, SHARED_MEMORY = "CPUAdamBuilder", "ShareMemCommBuilder"
FILES = {"gpu_8bit": "zero2"}  # strategies that share the file of another


def import_machinery() -> tuple[Any, Any]:
    """accelerate and deepspeed, told about the device and about a run without a launcher before they look around."""
    tell_deepspeed()
    if not is_launched():  # a world of one, whatever an earlier launch left behind
        # port 0: the store takes one that is free as it opens; one chosen here could be another's by then
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(world)
    # DeepSpeed compiles its kernels with ninja, which lies beside this interpreter
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    import accelerate
    import cpuinfo
    import deepspeed

    # DeepSpeed asks twice for every kernel, and every answer takes py-cpuinfo more than a second
    cpuinfo.get_cpu_info = _cpu_info
    # a bare print to stdout, which is for results: `DeepSpeed … built successfully`
    # (by its name among the modules: the attribute deepspeed.comm.torch is torch itself)
    vars(sys.modules["deepspeed.comm.torch"])["print"] = deepspeed.utils.logger.info
    # of calls that DeepSpeed makes at every step, and no user can change
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return accelerate, deepspeed


@contextmanager
def tensors_only() -> Iterator[None]:
    """Inside, every `torch.load`, DeepSpeed's own among them, reads tensors, numbers and what ZeRO's states are made of, and refuses
    the rest: a pickle can ask for any function to be called."""
    with variables_kept():  # no process group comes of it
        import_machinery()
        import torch
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # wins over the `weights_only=False` of DeepSpeed's calls

        def stage_of(kind: Any, name: str) -> Any:
            """What `getattr` is read as: Python up to 3.11.3 pickles a member of an enumeration so, and nothing else may be asked of it."""
            if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
                raise pickle.UnpicklingError(f"GLOBAL getattr of {kind}")
            return ZeroStageEnum[name]

        named: list[Any] = [LossScaler, ZeroStageEnum, fragment_address, (stage_of, "builtins.getattr")]
        with torch.serialization.safe_globals(named):
            try:
                yield
            except pickle.UnpicklingError as error:
                raise not_tensors(error) from None
            except Exception as error:
                if not torn(error):
                    raise
                raise RedHeartError(
                    "a state of this checkpoint is no whole file of torch's: choose another checkpoint"
                ) from None


def torn(error: Exception) -> bool:
    """Whether torch found no whole archive of its own where it was to read one. It takes other files for pickles, and reads them until
    it stumbles, over whatever comes."""
    from torch import _weights_only_unpickler as unpickler

    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    found = ("PytorchStreamReader", "mmap can only be used with files saved with")
    return unpickler.__file__ in frames or any(text in str(error) for text in found)


def not_tensors(error: pickle.UnpicklingError) -> RedHeartError:
    """What torch refused to read, in one line."""
    asked = re.search(r"GLOBAL (\S+)|Unsupported (operand|class) \S+", " ".join(str(error).split()))
    return RedHeartError(
        f"a state of this checkpoint holds more than tensors ({asked[0] if asked else 'no torch file'}), and nothing of it was run: "
        "choose another checkpoint"
    )


def forget_machinery() -> None:
    """Ends the process group of this process and what Accelerate and DeepSpeed keep of it, so that another run may start here."""
    leave()
    if "deepspeed" not in sys.modules:
        return
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def check_accelerate() -> None:
    """Raises RedHeartError where a variable of `accelerate launch` asks for another machinery than DeepSpeed."""
    for name, option in OTHERS.items():
        if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on", "y", "t"):
            raise RedHeartError(
                f"{name}={os.environ[name]} turns DeepSpeed off, which memory.strategy asks for: `unset {name}`, start without {option}, "
                "or choose memory.strategy=plain"
            )


def check_launch_file(strategy: str) -> None:
    """Raises RedHeartError where the launch file asks for another strategy, for a DeepSpeed file that is none of ours, or for what the
    settings decide."""
    own, given = _own_launch(strategy), os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    if named := [key for key in UNHEARD if key in given]:
        raise RedHeartError(
            f"the launch file names {', '.join(named)}, which would not be heard: memory.strategy, training.precision, "
            f"training.micro_batch_size and optimizer.max_grad_norm decide them here. Start {own}"
        )
    file = launch_file()
    if file is None or FILES.get(strategy, strategy) == DS_FILES.get(file):
        return
    if file not in DS_FILES:
        raise RedHeartError(
            f"the launch file names the DeepSpeed file {file}, which is none of ds_configs/ and would not be read: start {own}"
        )
    raise RedHeartError(
        f"the launch file names {file}, and memory.strategy is {strategy}: --set memory.strategy={DS_FILES[file]}, or start {own}"
    )


def check_launch_options(config: RunConfig) -> None:
    """Raises RedHeartError where an option of `accelerate launch` asks for something else than the settings, which alone are heard."""
    traits, norm = TRAITS[config.memory.strategy], config.optimizer.max_grad_norm
    by_strategy = f"memory.strategy is {config.memory.strategy}"
    decided = (
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(traits.stage), by_strategy),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu" if traits.offload else "none", by_strategy),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none", by_strategy),
        ("ACCELERATE_MIXED_PRECISION", mixed_precision(config), f"training.precision is {config.training.precision}"),
        ("ACCELERATE_GRADIENT_CLIPPING", str(float(norm)), f"optimizer.max_grad_norm is {norm}"),
    )
    for name, wanted, said in decided:
        given = os.environ.get(name, wanted)
        unnamed = name == "ACCELERATE_MIXED_PRECISION" and given == "no"  # or was named so, which looks the same
        if given != wanted and not unnamed:
            option = name.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()
            raise RedHeartError(
                f"--{option} {given} of the launch ({name}) would not be heard, and {said}: leave the option out, set the key instead, "
                f"or start {_own_launch(config.memory.strategy)}"
            )


def _own_launch(strategy: str) -> str:
    own = f"with --config_file launch/accelerate/{FILES.get(strategy, strategy)}.yaml"
    return "without a launcher" if strategy == "plain" else own


@cache
def _cpu_info() -> dict[str, Any]:
    import cpuinfo.cpuinfo

    found: dict[str, Any] = cpuinfo.cpuinfo.get_cpu_info()
    return found


def settle_groups(seconds: float, device: torch.device) -> None:
    """Collectives of every process group wait so long for the other ranks, on this device. Call it once all groups exist.

    DeepSpeed reduces in a clone of the world group, which torch gives its own default (30 minutes under gloo), whatever the
    first group was told.
    """
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
        # without it a barrier guesses by the rank, and says so; DeepSpeed binds no group of a single rank
        if device.type == "cuda":
            group.bound_device_id = device


def deepspeed_config(config: RunConfig, accumulation: int, micro_batch_size: int, world_size: int) -> dict[str, Any]:
    """The strategy's file of ds_configs/ with the sizes and precision of this run."""
    settings: dict[str, Any] = read_json(ds_config_path(config.memory.strategy), "reinstall Red Heart")
    settings["train_micro_batch_size_per_gpu"] = micro_batch_size
    settings["gradient_accumulation_steps"] = accumulation
    settings["train_batch_size"] = micro_batch_size * accumulation * world_size
    settings["gradient_clipping"] = config.optimizer.max_grad_norm
    settings["bf16"]["enabled"] = config.training.precision == "bf16"
    if config.has_split_master:
        settings["bf16"][SPLIT] = True
    else:
        settings["bf16"].pop(SPLIT, None)
    if "offload_optimizer" in settings["zero_optimization"] and not has_gpu():
        settings["zero_optimization"]["offload_optimizer"]["pin_memory"] = False  # pinning serves copies to a GPU
    return settings


def plugin_of(accelerate: Any, settings: dict[str, Any], accumulation: int, config: RunConfig) -> Any:
    """What Accelerate makes of the settings: its `deepspeed_config` goes to DeepSpeed. Accelerate sets the precision when it starts."""
    plugin = accelerate.utils.DeepSpeedPlugin(
        hf_ds_config=settings, gradient_accumulation_steps=accumulation, zero3_init_flag=False
    )
    plugin.set_mixed_precision(mixed_precision(config))
    return plugin


def mixed_precision(config: RunConfig) -> str:
    return "bf16" if config.training.precision == "bf16" else "no"


def settle_sizes(settings: Sequence[dict[str, Any]], sizes: Sequence[int]) -> None:
    """What depends on the elements of every parameter: a bucket holds the largest (memory/states.py), and in a small network ZeRO-3
    does not look ahead (SMALL)."""
    for zero in (one["zero_optimization"] for one in settings):
        zero["reduce_bucket_size"] = max(zero["reduce_bucket_size"], bucket_of(sizes, zero["stage"]))
        if zero["stage"] == 3 and sum(sizes) < SMALL:
            zero["stage3_max_reuse_distance"] = 0


def ds_config_path(strategy: str) -> Path:
    """In ds_configs/ of the checkout, or of the installed package: the launch file's own where it is one of this strategy."""
    file = launch_file()
    if file is None or DS_FILES.get(file) != strategy:
        file = FILES.get(strategy, strategy)
    package = Path(__file__).parents[2]
    folder = next(p for p in (package.parent / "ds_configs", package / "ds_configs") if p.is_dir())
    return folder / f"{file}.json"


def load_kernel(name: str) -> Any:
    """DeepSpeed's kernel, compiled where it is not yet. Loaded by DeepSpeed, it would wait without end for a builder that was killed."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    return built_alone(builder.NAME, partial(builder.load, verbose=False))


def load_communication() -> None:
    """What DeepSpeed's ranks on a CPU talk with, where it can be compiled: DeepSpeed asks for it when a process group is made."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    if not has_gpu() and __compatible_ops__.get(get_accelerator().create_op_builder(SHARED_MEMORY).NAME, False):
        load_kernel(SHARED_MEMORY)


def compile_kernels() -> None:
    """Compiles (once, then cached) the kernels that training here needs, DeepSpeed's and our own, side by side."""
    import_machinery()
    builds: list[Callable[[], Any]] = [partial(load_kernel, CPU_ADAM), adam8bit_kernel]
    if not has_gpu():
        builds += [partial(load_kernel, SHARED_MEMORY), signals_kernels]
    with contextlib.redirect_stdout(sys.stderr), ThreadPoolExecutor() as pool:  # the threads wait for compilers
        for build in [pool.submit(build) for build in builds]:
            build.result()
