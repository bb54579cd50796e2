"""What the host tells a GPU, and waits for, beside a micro-step's own operations: the books that an engine keeps of every tensor.

Operations that are no views, counted for one parameter tensor by a dispatch mode around DeepSpeed 0.19.8 (tests/memory/launches_run.py).
A micro-step itself waits for nothing: it runs on shapes (activations.py), of which nobody can read a number.

ZeRO-1 and -2   reduce_independent_p_g_buckets_and_remove_grads, copy_grads_in_partition: into the bucket and out of it, or a cast and a
                sum in fp32; norms of all gradients are one operation (train/engine/one_norm.py)
  with offload  async_accumulate_grad_in_cpu_via_gpu: the sum so far copied up, added to, copied down, where sums are 16-bit;
                at the last micro-step norm, cast and copy to the host
ZeRO-3          into the bucket and its partition; with offload the last one on to the host, sub-group by sub-group
"""

from __future__ import annotations

from redheart.memory.states import Traits

WAITS = 1  # of a step, whatever the strategy: norms of all gradients, read together
# launches of a step for the few flat tensors of the optimizer: norms, clip, AdamW, the 16-bit copy. Assumed, not counted
UPDATE = 60


def tensor_of(traits: Traits) -> tuple[int, int]:
    """Per parameter tensor: launches of a micro-step and of an optimizer step."""
    if traits.stage == 0:  # a gradient is added to the sum so far; the update is one call over all
        return 1, 0
    if traits.stage == 3:
        return 2, 7 if traits.offload else 1
    if traits.offload:
        return 4, 3
    return (1, 2) if traits.stage == 1 else (4, 0)


def count_launches(traits: Traits, tensors: int, micro_step: int, accumulation: int) -> int:
    """Launches of an optimizer step: `micro_step` operations in each of `accumulation` micro-steps, and those of the tensors."""
    of_micro_step, of_update = tensor_of(traits)
    return accumulation * (micro_step + of_micro_step * tensors) + of_update * tensors + UPDATE
