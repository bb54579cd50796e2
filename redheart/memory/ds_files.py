"""The DeepSpeed files of ds_configs/ and the Accelerate files of launch/accelerate/, written from what the planner assumes.

`redheart plan --write-ds-configs DIR` writes them; a test compares the checked-in ones. All values are integers, numbers or words,
none is `auto`: Accelerate fills only some of those, and a run must be what its file says. Batch sizes are placeholders that
train/engine replaces, with the precision and the clipping, by those of the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redheart.files import write_json, write_text
from redheart.memory.states import (
    REDUCE_BUCKET,
    STRATEGIES,
    TRAITS,
    ZERO3_MAX_LIVE,
    ZERO3_PERSISTENCE,
    ZERO3_PREFETCH,
    ZERO3_SUB_GROUP,
    Traits,
)
from redheart.sections import Strategy

SPLIT = "bf16_master_weights_and_grads"  # DeepSpeed's key: masters and gradients on the host in 16 bits
MULTINODE = "zero3_multinode"
FILES: dict[str, Strategy] = {s: s for s in STRATEGIES if s not in ("plain", "gpu_8bit")}  # gpu_8bit runs on zero2's
FILES[MULTINODE] = "zero3"


def ds_settings(file: str) -> dict[str, Any]:
    """The content of ds_configs/FILE.json."""
    traits = TRAITS[FILES[file]]
    settings: dict[str, Any] = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 64,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True} | ({SPLIT: True} if traits.offload and traits.eight_bit else {}),
    }
    if traits.fp32_accumulation:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    settings["zero_optimization"] = _zero3(file) if traits.stage == 3 else _zero12(traits)
    if traits.offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": traits.pinned}
    return settings | {
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _zero12(traits: Traits) -> dict[str, Any]:
    return {
        "stage": traits.stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": REDUCE_BUCKET,
        "allgather_partitions": True,
        "allgather_bucket_size": REDUCE_BUCKET,
        "round_robin_gradients": False,
    }


def _zero3(file: str) -> dict[str, Any]:
    return {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": file == MULTINODE,  # worth a second bucket where a network is between
        "reduce_bucket_size": REDUCE_BUCKET,
        "sub_group_size": ZERO3_SUB_GROUP,
        "stage3_prefetch_bucket_size": ZERO3_PREFETCH,
        "stage3_param_persistence_threshold": ZERO3_PERSISTENCE,
        "stage3_max_live_parameters": ZERO3_MAX_LIVE,
        "stage3_max_reuse_distance": ZERO3_MAX_LIVE,
        "stage3_gather_16bit_weights_on_model_save": False,
    }


def accelerate_settings(file: str) -> str:
    """The content of launch/accelerate/FILE.yaml."""
    nodes = 2 if file == MULTINODE else 1
    more = (
        "# On every node, with its own --machine_rank: add --num_machines, --num_processes (cards in all) and --main_process_ip.\n"
        if file == MULTINODE
        else "# On several GPUs, or as several CPU processes: add --num_processes N.\n"
    )
    launcher = "  deepspeed_multinode_launcher: standard\n" if file == MULTINODE else ""
    return (
        f"# accelerate launch --config_file launch/accelerate/{file}.yaml -m redheart train --preset 330m --data DIR "
        f"--set memory.strategy={FILES[file]}\n"
        "# Where memory.strategy is another than the DeepSpeed file's, the start is refused. Red Heart fills in batch sizes,\n"
        "# precision and clipping (RUN/ds_config.json).\n"
        f"{more}"
        "compute_environment: LOCAL_MACHINE\n"
        "distributed_type: DEEPSPEED\n"
        "deepspeed_config:\n"
        f"  deepspeed_config_file: ds_configs/{file}.json\n"
        f"{launcher}"
        "  zero3_init_flag: false\n"
        f"num_machines: {nodes}\n"
        f"num_processes: {nodes}\n"
        "machine_rank: 0\n"
        "rdzv_backend: static\n"
        "same_network: true\n"
        "use_cpu: false\n"
    )


def write_ds_configs(root: Path) -> list[Path]:
    """Writes ROOT/ds_configs/*.json and ROOT/launch/accelerate/*.yaml; the paths written."""
    written = []
    for file in FILES:
        for path in (root / "ds_configs" / f"{file}.json", root / "launch" / "accelerate" / f"{file}.yaml"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                write_json(path, ds_settings(file))
            else:
                write_text(path, accelerate_settings(file))
            written.append(path)
    return written
