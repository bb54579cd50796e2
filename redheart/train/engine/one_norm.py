"""One wait in a step of DeepSpeed's ZeRO: its looks at every single gradient become one look at all of them.

DeepSpeed 0.19.8 asks of each gradient, as it arrives, whether it is finite (stages 1 and 2 with the optimizer offloaded), and
reads their norms one after the other in `scaled_global_norm` (stage 3: `_get_norm_groups`). Here those norms, which stand on the
device already, are read together; a gradient that is not finite has a norm that is not, and `step` skips the update by itself.
DeepSpeed's clipping multiplies by 1 where there is nothing to clip; here that pass over the gradients is left out, and our own
optimizer does what there is to do as it reads them.
tests/train/test_one_norm.py pins the version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from redheart.optim.adam8bit import CPUAdamW8bit
from redheart.train.engine.base import clip_coefficient, norms_of, read_norms


class OneNorm:
    """Takes over norm, check and clipping of a ZeRO optimizer; `module_norms` are the last step's, over all ranks."""

    def __init__(self, zero: Any, stage: int, modules: Sequence[str], owners: dict[int, str], max_norm: float):
        """`owners`: the module of every parameter, by its id."""
        self._scaling = zero.optimizer if isinstance(zero.optimizer, CPUAdamW8bit) else None
        self._zero, self._modules, self._owners, self._max_norm = zero, modules, owners, max_norm
        self.module_norms: dict[str, float] = {}
        if stage == 3:
            zero._get_norm_groups = lambda: [torch.tensor(self._read(zero.fp16_groups, zero.offload_optimizer))]
            zero.unscale_and_clip_grads = lambda group, norm: self._clip(
                [zero.fp32_partitioned_groups_flat[group].grad]
            )
        else:
            zero.update_offload_overflow_tracker = lambda gradient: None
            # `overflow` is False before it, and the norm decides
            zero.check_overflow = lambda partition_gradients: None
            zero.scaled_global_norm = lambda: self._read(zero.params_in_partition, zero.cpu_offload)
            zero.unscale_and_clip_grads = lambda gradients, norm: self._clip(gradients)

    @property
    def total(self) -> float:
        return math.hypot(*self.module_norms.values())

    def _read(self, groups: Iterable[Sequence[torch.Tensor]], offloaded: bool) -> float:
        """The gradient's norm over all ranks. Collective."""
        zero, owners, norms = self._zero, [], []
        for i, group in enumerate(groups):
            if offloaded:  # measured on their way to the host, by number of the parameter
                known = [p for p in group if zero.get_param_id(p) in zero.norm_for_param_grads]
                owners += [self._owners[id(p)] for p in known]
                norms += [zero.norm_for_param_grads[zero.get_param_id(p)] for p in known]
            else:
                parts = [g for g in zero.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
                # zeros at the end of a last partition bear no mark
                pairs = list(zip(group, parts, strict=False))
                owners += [self._owners[id(p)] for p, _ in pairs]
                norms += norms_of([g for _, g in pairs])
        self.module_norms = read_norms(self._modules, owners, norms)
        return self.total

    def _clip(self, gradients: Iterable[torch.Tensor]) -> None:
        clip = clip_coefficient(self.total, self._max_norm)
        if self._scaling is not None:
            self._scaling.gradient_scale = clip
        elif clip < 1:
            for gradient in gradients:
                gradient.mul_(clip)
