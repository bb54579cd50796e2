"""Run by test_partitions.py: what DeepSpeed gives one rank of a world whose other ranks exist only in name.

    python -m tests.memory.fake_world PRESET RANKS

torch's `fake` backend answers every collective at once. The parameters have the preset's true shapes. ZeRO-3: real, but
never written, so they take no memory; deepspeed.zero.Init cuts them up. ZeRO-2: on `meta`, padded and cut by the
optimizer's own functions, since its constructor would copy all of them. Prints {"zero2", "zero3": elements of rank 0}.
"""

import json
import sys
from types import SimpleNamespace

import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from redheart.config import load_config
from redheart.memory.ds_files import ds_settings
from redheart.model.build import build_model
from redheart.train.engine import parameter_groups
from redheart.train.engine.base import in_chunks
from redheart.train.engine.machinery import import_machinery


def main() -> None:
    preset, ranks = sys.argv[1], int(sys.argv[2])
    torch.distributed.init_process_group(backend="fake", rank=0, world_size=ranks, store=FakeStore())
    _, deepspeed = import_machinery()
    deepspeed.init_distributed(dist_backend="fake")
    from deepspeed.runtime.utils import align_dense_tensors
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert deepspeed.comm.get_world_size() == ranks
    with torch.device("meta"):
        groups = [g["params"] for g in in_chunks(parameter_groups(build_model(load_config(preset), None), 0.01))]
    optimizer = SimpleNamespace(real_dp_process_group=[None] * len(groups))
    zero2 = 0
    for i, group in enumerate(groups):
        flat = torch.cat([p.detach().flatten() for p in align_dense_tensors(group, 2 * ranks)])
        zero2 += DeepSpeedZeroOptimizer.get_data_parallel_partitions(optimizer, flat, i)[0].numel()
    shapes = [p.shape for group in groups for p in group]
    model = nn.ParameterList([torch.empty(shape, dtype=torch.bfloat16) for shape in shapes])
    settings = ds_settings("zero3_offload_8bit")
    settings |= {"gradient_accumulation_steps": 1, "train_batch_size": ranks, "train_micro_batch_size_per_gpu": 1}
    settings["zero_optimization"]["offload_optimizer"]["pin_memory"] = False
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, mem_efficient_linear=False)
    assert [p.ds_shape for p in model] == shapes
    print(json.dumps({"zero2": zero2, "zero3": sum(p.ds_tensor.numel() for p in model)}))


if __name__ == "__main__":
    main()
