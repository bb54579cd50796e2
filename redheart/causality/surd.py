"""SURD: synergistic, unique and redundant decomposition of what several agents tell about a target, in bits.

Source: Martínez-Sánchez, Arranz and Lozano-Durán (2024), "Decomposing causality into its synergistic, unique, and
redundant components", Nature Communications 15. For every target state t and every subset j of the agents the specific
information is  ĩ_j(t) = KL(p(a_j | t) ‖ p(a_j)) ≥ 0.  The subsets that tell more than every smaller one form a ladder in
ascending order; the increments along it are redundant (single agents but the last), unique (the last single agent) or
synergistic (larger subsets). Weighted by p(t) they sum to the mutual information I(T; A) exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch

from redheart.finite import check_finite
from redheart.schema import RedHeartError

MAX_AGENTS = 4


@dataclass(frozen=True)
class SurdResult:
    """Bits per set of agents (numbered from 1); `leak` = H(T|A) / H(T) in [0, 1], 0 where H(T) is; `mutual_information` = I(T; A);
    `entropy` = H(T)."""

    redundant: dict[tuple[int, ...], float]
    unique: dict[int, float]
    synergistic: dict[tuple[int, ...], float]
    leak: float
    mutual_information: float
    entropy: float


@dataclass(frozen=True)
class Rung:
    """One increment of the ladder of a target state: the agents read so far and what kind the increment is."""

    subset: tuple[int, ...]  # agents from 0
    kind: str  # redundant, unique or synergistic
    credited: tuple[int, ...]  # the agents that the increment is credited to, from 0
    bits: float  # increment of the specific information


def surd(pmf: torch.Tensor) -> SurdResult:
    """Decomposes a joint distribution.

    pmf: [n_target, n_1, …, n_N], finite, non-negative, summing to one (to 1e-6); at most four agents. Raises RedHeartError otherwise.
    """
    pmf = _checked(pmf)
    num_agents = pmf.dim() - 1
    p_t = pmf.flatten(1).sum(1)
    redundant = {c: 0.0 for k in range(2, num_agents + 1) for c in combinations(range(1, num_agents + 1), k)}
    synergistic = dict(redundant)
    unique = dict.fromkeys(range(1, num_agents + 1), 0.0)
    for t in range(pmf.shape[0]):
        if p_t[t] == 0:
            continue
        for rung in ladder(pmf, t):
            bits = rung.bits * p_t[t].item()
            agents = tuple(a + 1 for a in rung.credited)
            if rung.kind == "unique":
                unique[agents[0]] += bits
            elif rung.kind == "redundant":
                redundant[agents] += bits
            else:
                synergistic[agents] += bits
    h_t = _entropy(p_t)
    h_t_given_a = _entropy(pmf) - _entropy(pmf.sum(0))
    leak = h_t_given_a / h_t if h_t > 0 else 0.0
    return SurdResult(redundant, unique, synergistic, min(max(leak, 0.0), 1.0), max(h_t - h_t_given_a, 0.0), h_t)


def surd_from_samples(target: torch.Tensor, agents: torch.Tensor, bins: int) -> SurdResult:
    """SURD of samples: target [n], agents [N, n], each cut into `bins` equal-width bins between its least and largest value.

    Raises RedHeartError for shapes that do not fit, no sample, no bin, and for values that are not finite, whose bin nobody knows.
    """
    if target.dim() != 1 or agents.dim() != 2 or agents.shape[1] != len(target) or not len(target) or bins < 1:
        raise RedHeartError(
            f"surd_from_samples takes a target [n], agents [N, n] and a bin or more: got {list(target.shape)}, "
            f"{list(agents.shape)} and {bins}"
        )
    check_finite({"target": target, **{f"agent {i}": agent for i, agent in enumerate(agents, 1)}})
    rows = torch.cat([target[None], agents]).double()
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    width = torch.where(high > low, (high - low) / bins, torch.ones_like(low))
    codes = ((rows - low) / width).long().clamp(0, bins - 1)
    return surd(joint_pmf(codes, [bins] * rows.shape[0]))


def joint_pmf(codes: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The empirical joint distribution of integer codes [variables, n], each in [0, its size) -> [*sizes], float64."""
    assert all(0 <= int(row.min()) <= int(row.max()) < size for row, size in zip(codes, sizes, strict=True))
    flat = torch.zeros(codes.shape[1], dtype=torch.long)
    for row, size in zip(codes.long(), sizes, strict=True):
        flat = flat * size + row
    counts = torch.bincount(flat, minlength=int(torch.tensor(sizes).prod())).double()
    return (counts / counts.sum()).reshape(sizes)


def ladder(pmf: torch.Tensor, t: int) -> Iterator[Rung]:
    """The rungs of target state `t`, from nothing known to the most that any subset tells."""
    num_agents = pmf.dim() - 1
    p_at = pmf[t] / pmf[t].sum()
    p_a = pmf.sum(0)
    order: list[tuple[float, tuple[int, ...]]] = []
    largest_smaller = 0.0
    for size in range(1, num_agents + 1):
        told = [(_specific_information(p_at, p_a, c), c) for c in combinations(range(num_agents), size)]
        order += [(bits, c) for bits, c in sorted(told) if size == 1 or bits >= largest_smaller]
        # of every smaller size: a larger subset that tells no more may tell less by rounding
        largest_smaller = max(largest_smaller, *(bits for bits, _ in told))
    order.sort(key=lambda entry: entry[0])
    known, remaining = 0.0, list(range(num_agents))
    for bits, subset in order:
        if len(subset) == 1:
            kind = "unique" if len(remaining) == 1 else "redundant"
            credited = tuple(remaining)
            remaining.remove(subset[0])
        else:
            kind, credited = "synergistic", subset
        yield Rung(subset, kind, credited, bits - known)
        known = bits


def pointwise_shares(pmf: torch.Tensor, t: int, a: tuple[int, ...]) -> tuple[list[float] | None, float | None]:
    """Shares (redundant, unique, synergistic) of what the agents' states `a` tell about `t`, and the leak.

    Along the ladder of t the pointwise increments are δ = log2 p(t | a_k) / p(t | a_{k-1}); a kind's share is the sum of
    its positive δ over the sum of all positive δ, None where none is positive; leak = 1 - p(t | a). Both are None for a
    combination of t and a that the distribution never saw.
    """
    pmf = _checked(pmf)
    if pmf[(t, *a)] == 0:
        return None, None
    gained = {"redundant": 0.0, "unique": 0.0, "synergistic": 0.0}
    before = (pmf[t].sum() / pmf.sum()).item()
    for rung in ladder(pmf, t):
        if rung.bits <= 1e-12:
            continue
        after = _conditional(pmf, t, a, rung.subset)
        gained[rung.kind] += max(math.log2(after / before), 0.0)
        before = after
    total = sum(gained.values())
    shares = [v / total for v in gained.values()] if total > 1e-12 else None
    return shares, 1.0 - _conditional(pmf, t, a, tuple(range(len(a))))


def _conditional(pmf: torch.Tensor, t: int, a: tuple[int, ...], subset: tuple[int, ...]) -> float:
    """p(t | the states of the agents in `subset`)."""
    index = tuple(a[k] if k in subset else slice(None) for k in range(len(a)))
    joint = torch.stack([pmf[(s, *index)].sum() for s in range(pmf.shape[0])])
    return (joint[t] / joint.sum()).item()


def _specific_information(p_at: torch.Tensor, p_a: torch.Tensor, subset: tuple[int, ...]) -> float:
    """KL(p(a_j | t) ‖ p(a_j)) in bits, for the agents of `subset`."""
    rest = [k for k in range(p_at.dim()) if k not in subset]
    q, p = (x.sum(rest) if rest else x for x in (p_at, p_a))
    return (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum().item() / math.log(2)


def _entropy(p: torch.Tensor) -> float:
    """In bits."""
    return -torch.special.xlogy(p, p).sum().item() / math.log(2)


def _checked(pmf: torch.Tensor) -> torch.Tensor:
    pmf = pmf.double()
    if not 1 <= pmf.dim() - 1 <= MAX_AGENTS:
        raise RedHeartError(f"surd takes 1 to {MAX_AGENTS} agents: got a pmf of {pmf.dim()} dimensions")
    check_finite({"pmf": pmf})
    if bool((pmf < 0).any()) or abs(pmf.sum().item() - 1) > 1e-6:
        raise RedHeartError("surd needs a distribution: non-negative entries that sum to one")
    return pmf / pmf.sum()
