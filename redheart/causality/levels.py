"""What a level of a quantity is, once for all: the derived label (data/derive.py), the density of the SURD analyzer (losses/surd.py)
and the analysis of predictions (causality/synergy.py).

A quantity's values are cut into three groups as equal in size as ties allow; equal values share a level. No level is empty, unless
there are fewer distinct values than levels: a label of yes and no has two, a constant one. An edge stands midway between the
neighbours it parts, so that a prediction is judged by which of them it is nearer to. Edges are found in one set of values
(the training labels, or the predictions looked at) and hold for others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from redheart.finite import check_finite

LEVELS = 3


def level_edges(values: torch.Tensor) -> list[float]:
    """Up to two ascending edges between the levels of `values` [n], n ≥ 0; fewer where there are fewer than three distinct values.

    Raises RedHeartError where a value is not finite.
    """
    check_finite({"a quantity to be cut into levels": values})
    # as labels are stored, so that a label read back has the level it was given
    distinct, counts = values.float().unique(return_counts=True)
    below = counts.cumsum(0)  # values up to and with each distinct one
    edges: list[float] = []
    last, cuts = -1, min(LEVELS, len(distinct)) - 1
    for k in range(1, cuts + 1):
        possible = below[last + 1 : len(distinct) - 1 - (cuts - k)]
        last += 1 + int((possible - k * len(values) / (cuts + 1)).abs().argmin())
        edges.append((distinct[last].double() + distinct[last + 1].double()).item() / 2)
    return edges


def level_of(values: torch.Tensor, edges: Sequence[float]) -> torch.Tensor:
    """The level, 0 … len(edges), of each of `values` (any shape) -> int64 of that shape."""
    levels = torch.zeros_like(values, dtype=torch.int64)
    for edge in edges:
        levels += values.double() >= edge
    return levels
