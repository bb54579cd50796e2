"""From per-output sums to the one number that backward receives.

    total = Σ_output  weight_output / scale_output · sum_output / count_output · (accumulation steps · ranks)

`scale` is the loss of the best constant predictor on the training split, floored: an untrained output starts near 1 and
outputs become comparable. `count` is the sum of label weights over all ranks and all micro-steps of the step; engines
average over both, hence the last factor. Nothing depends on how a global batch is cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def combine(
    sums: Mapping[str, torch.Tensor],
    counts: Mapping[str, float],
    factors: Mapping[str, float],
    num_micro_batches: int,
) -> torch.Tensor:
    """The loss of one micro-batch, a scalar. `num_micro_batches` = accumulation steps × ranks.

    An output whose count is 0 in the whole global batch adds 0·sum, so that every rank touches the same parameters.
    """
    side_by_side = torch.stack(list(sums.values()))
    shares = [factors[n] * num_micro_batches / counts[n] if counts[n] > 0 else 0.0 for n in sums]
    on_gpu = side_by_side.is_cuda
    weights = torch.tensor(shares, dtype=side_by_side.dtype, pin_memory=on_gpu)  # so that nothing waits for the copy
    return (side_by_side * weights.to(side_by_side.device, non_blocking=on_gpu)).sum()


def factors(weights: Mapping[str, float], scales: Mapping[str, float], floor: float) -> dict[str, float]:
    """weight ÷ max(constant-predictor loss, floor) for every output."""
    return {name: weight / max(scales[name], floor) for name, weight in weights.items()}
