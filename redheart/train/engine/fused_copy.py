"""The 16-bit weights written by the optimizer's own pass instead of by a cast of DeepSpeed's afterwards.

DeepSpeed 0.19.8 (stage_1_and_2.py, `step`) calls `_optimizer_step(group)`, then casts the fp32 master weights into a host
buffer and copies that into the model's weights. Here `_optimizer_step` hands the optimizer the place of the 16-bit weights,
and the buffer is one that ignores being written to. Split masters (split_master.py) are these weights already.
tests/train/test_fused_copy.py pins the version.
"""

from __future__ import annotations

from typing import Any

import torch

from redheart.optim.adam8bit import CPUAdamW8bit


class Written(torch.Tensor):
    """A buffer that the optimizer has filled already: copies into it, and from it into the weights, are left out."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def fuse_the_copy(zero: Any, optimizer: CPUAdamW8bit) -> None:
    """Changes a DeepSpeedZeroOptimizer (stage 1 or 2, optimizer on the host) as the module's docstring says.

    On a GPU the optimizer fills the pinned host buffer, and every stretch of it (optim/adam8bit.py: STRETCH) travels once it is
    finished, on the device's own time, while the next one is computed: all of the copy but the last stretch's is hidden, as far as
    the link keeps up (`redheart bench optimizer`: upload). On the CPU the optimizer writes into the weights themselves, and the
    buffer's memory is given back.
    """
    buffers, targets = zero.param_buffer_of_bit16_for_cpu_offload_groups, []
    for i, buffer in enumerate(buffers):
        rank = torch.distributed.get_rank(group=zero.real_dp_process_group[i])
        weights, master = (
            zero.parallel_partitioned_bit16_groups[i][rank].detach(),
            zero.single_partition_of_fp32_groups[i],
        )
        is_split, on_gpu = master.dtype == torch.bfloat16, weights.device.type == "cuda"
        if is_split and not on_gpu:
            master.data = weights  # once in memory
        host = (master.detach() if is_split else buffer) if on_gpu else weights
        targets.append((host, weights, {} if is_split else {master: host}))
        buffers[i] = host.as_subclass(Written)
    zero._link_all_hp_params()  # to where the masters are now

    def step(i: int) -> None:
        (host, weights, copies), groups = targets[i], optimizer.param_groups

        def send(start: int, stop: int) -> None:
            weights[start:stop].copy_(host[start:stop], non_blocking=True)

        optimizer.param_groups = [groups[i]]
        # ZeRO has looked at the norm
        optimizer.step(copies=copies, on_written=None if weights is host else send, check_finite=False)
        optimizer.param_groups = groups
        zero._lazy_init_hp_params_optimizer_state()

    zero._optimizer_step = step
