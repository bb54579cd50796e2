"""The best constant: what to answer if one has to say the same of every text. The scale of every loss and a start for output biases.

Only under a squared error or a cross-entropy is it the mean. A focal loss makes little of what is nearly right, so that its best constant
for a rare label lies well above the mean; a Huber loss leans to the median; a penalty has a mind of its own. So it is searched for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from redheart.losses.elementwise import SumCount

GRID = 400  # equal steps; those of the labels' histograms (data/shards.py), where losses may have kinks, are among them
FINER = 64  # steps of a round of refinement, between the neighbours of the best
ROUNDS = 5  # 1/400 · (2/64)⁵: about 1e-10


def best_constant(
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], SumCount],
    raw: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    weight: torch.Tensor,
    low: float,
    high: float,
) -> torch.Tensor:
    """The answer in [low, high] with the least loss, for each entry of target and weight [N, size] -> float64 [size].

    `loss` takes what `raw` makes of an answer, and is a sum over entries. An entry without any label gets the middle.
    """
    target, weight = target.double(), weight.double()

    def losses(answers: torch.Tensor) -> torch.Tensor:
        """[answers, size] -> [answers, size], summed over the rows: a loss is Σ weight · entry, so its slope in a weight is the entry's."""
        shape = (len(answers), *target.shape)
        weights = weight.expand(shape).flatten(0, 1).clone().requires_grad_()
        said = raw(answers)[:, None].expand(shape).flatten(0, 1)
        (entries,) = torch.autograd.grad(loss(said, target.expand(shape).flatten(0, 1), weights)[0], weights)
        return (entries.view(shape) * weight).sum(1)

    start = torch.full(target.shape[1:], low, dtype=torch.float64)
    end, steps = torch.full_like(start, high), GRID
    for _ in range(1 + ROUNDS):
        answers = torch.lerp(start, end, torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None])
        best = answers.gather(0, losses(answers).argmin(0, keepdim=True))[0]
        step, steps = (end - start) / steps, FINER
        start, end = (best - step).clamp(min=low), (best + step).clamp(max=high)
    return torch.where(weight.sum(0) > 0, best, (low + high) / 2)
