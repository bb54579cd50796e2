"""What the host tells a GPU, and waits for, beside a micro-step's own operations: the books that an engine keeps of every tensor.

Operations that are no views, counted for one parameter tensor by a dispatch mode around DeepSpeed 0.19.8 (tests/memory/launches_run.py).
A micro-step itself waits for nothing: it runs on fake tensors (activations.py), of which nobody can read a number.

ZeRO-1 and -2   reduce_independent_p_g_buckets_and_remove_grads, copy_grads_in_partition: into the bucket and out of it, or a cast and a
                sum in fp32; has_overflow (asked by train/engine and again by step), get_grad_norm_direct: largest and least
                value, whether they are finite, casts and norms
  with offload  async_accumulate_grad_in_cpu_via_gpu: the sum so far copied up, added to, copied down, where sums are 16-bit;
                at the last micro-step overflow (read at once: the host waits), norm, cast and copy to the host;
                complete_grad_norm_calculation_for_cpu_offload: the norm is read (the host waits again)
ZeRO-3          into the bucket and its partition; with offload the last one on to the host, sub-group by sub-group
"""

from __future__ import annotations

from typing import NamedTuple

from redheart.memory.states import Traits

WAITS = 2  # of a step, whatever the strategy: are gradients finite, and their norm
UPDATE = 60  # launches of a step for the few flat tensors of the optimizer: clip, AdamW by foreach, the 16-bit copy


class Tensor(NamedTuple):
    """Per parameter tensor: launches of a micro-step, and launches and waits of an optimizer step."""

    micro_launches: int
    update_launches: int
    update_waits: int


def tensor_of(traits: Traits) -> Tensor:
    if traits.stage == 0:  # a gradient is added to the sum so far; the update is foreach's
        return Tensor(1, 0, 0)
    if traits.stage == 3:
        return Tensor(2, 9 if traits.offload else 3, 0)
    if traits.offload:
        return Tensor(4, 16, 2)
    return Tensor(1, 30, 0) if traits.stage == 1 else Tensor(4, 28, 0)


def count_launches(traits: Traits, tensors: int, micro_step: int, accumulation: int) -> int:
    """Launches of an optimizer step: `micro_step` operations in each of `accumulation` micro-steps, and those of the tensors."""
    each = tensor_of(traits)
    return accumulation * (micro_step + each.micro_launches * tensors) + each.update_launches * tensors + UPDATE


def count_waits(traits: Traits, tensors: int) -> int:
    """How often the host waits for the GPU in an optimizer step."""
    return WAITS + tensor_of(traits).update_waits * tensors
