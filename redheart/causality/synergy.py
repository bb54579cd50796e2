"""What tasks have to do with one another: the angles of their gradients, and SURD of their predictions.

Both are pure functions of tensors; train/synergy.py calls them now and then during training, evaluation/report.py at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from redheart.causality.levels import LEVELS, level_edges, level_of
from redheart.causality.null import above_null, deviations
from redheart.finite import check_finite


@dataclass(frozen=True)
class Informing:
    """How much the agents tell about the target, in bits; keys are agents' names, `leak` lies in [0, 1]. `intervals`, where rows were
    resampled: of 95 %, of every term by (kind, agents) as in `rows`, and of all of it by ("", "")."""

    target: str
    redundant: dict[tuple[str, ...], float]
    unique: dict[str, float]
    synergistic: dict[tuple[str, ...], float]
    leak: float
    mutual_information: float
    intervals: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def shares(self) -> dict[str, float]:
        """The redundant, unique and synergistic part of what is told; all 0 where nothing is."""
        kinds = {
            "redundant": sum(self.redundant.values()),
            "unique": sum(self.unique.values()),
            "synergistic": sum(self.synergistic.values()),
        }
        total = self.mutual_information
        return {kind: bits / total if total > 0 else 0.0 for kind, bits in kinds.items()}

    def rows(self) -> list[tuple[str, str, float]]:
        """(kind, agents, bits) of every term above 0, the largest first."""
        return sorted((t for t in self.terms() if t[2] > 0), key=lambda t: -t[2])

    def to_json(self) -> dict[str, Any]:
        terms: list[dict[str, Any]] = [{"kind": k, "agents": a, "bits": v} for k, a, v in self.rows()]
        for term in terms if self.intervals else ():
            term["interval"] = self.intervals[term["kind"], term["agents"]]
        bits = {"bits": self.mutual_information, "leak": self.leak, "interval": self.intervals.get(("", ""))}
        return {"shares": self.shares(), **bits, "terms": terms}

    def terms(self) -> list[tuple[str, str, float]]:
        """(kind, agents, bits) of all terms."""
        terms = [("redundant", " + ".join(k), v) for k, v in self.redundant.items()]
        terms += [("unique", k, v) for k, v in self.unique.items()]
        return terms + [("synergistic", " + ".join(k), v) for k, v in self.synergistic.items()]


def informing(
    target: str,
    values: torch.Tensor,
    agents: Mapping[str, torch.Tensor],
    repeats: int = 20,
    seed: int = 0,
    resamples: int = 0,
) -> Informing:
    """SURD above chance of `values` [n] given one to four agents [n] each, each cut into levels (causality/levels.py) by its own values;
    with the intervals of so many resamples of the rows (null.deviations).

    ValueError where the lengths differ, RedHeartError that names the quantity where a value is not finite.
    """
    if any(a.shape != values.shape for a in agents.values()):
        raise ValueError(f"target and agents must be alike: {[tuple(v.shape) for v in (values, *agents.values())]}")
    names = list(agents)
    check_finite({target: values, **agents})
    codes = torch.stack([level_of(v, level_edges(v)) for v in (values, *agents.values())])
    result, excess = above_null(codes[0].double(), codes[1:].double(), LEVELS, repeats, seed)
    name = lambda key: tuple(names[i - 1] for i in key)  # noqa: E731 (agents are numbered from 1)
    told = Informing(
        target,
        {name(k): v for k, v in result.redundant.items()},
        {names[k - 1]: v for k, v in result.unique.items()},
        {name(k): v for k, v in result.synergistic.items()},
        result.leak,
        result.mutual_information,
    )
    if not resamples:
        return told
    ends = (
        deviations(codes, [LEVELS] * len(codes), resamples, seed) + np.append(excess, told.mutual_information)[:, None]
    )
    names_of = [term[:2] for term in told.terms()] + [("", "")]
    between = {term: (max(low, 0.0), max(high, 0.0)) for term, (low, high) in zip(names_of, ends.tolist(), strict=True)}
    return replace(told, intervals=between)


def gradient_cosines(names: Sequence[str], products: torch.Tensor) -> dict[tuple[str, str], float]:
    """Cosine of the angle between every two gradients, in [-1, 1], from their inner products [N, N] (which add up over rows and
    ranks); pairs with a zero gradient are left out.

    RedHeartError that names the gradient where one is not finite.
    """
    norms = products.diagonal().sqrt()
    check_finite({f"gradient of {name}": norm[None] for name, norm in zip(names, norms, strict=True)})
    return {
        (names[i], names[j]): float(products[i, j] / (norms[i] * norms[j]))
        for i, j in combinations(range(len(names)), 2)
        if norms[i] > 0 and norms[j] > 0
    }
