"""SURD above chance, and how sure it is: the plug-in estimate from samples is biased upwards, and a shuffled target says by how much.

With B bins and N agents independent data show about (B^N - 1)(B_T - 1) / (2 n ln 2) bits (Miller 1955): 0.12 bit for n = 3000,
5 bins and 3 agents. Shuffling the target destroys what the agents tell and keeps the bias.
"""

from __future__ import annotations

import numpy as np
import torch

from redheart.causality.surd import SurdResult, joint_pmf, surd, surd_from_samples

SIGNIFICANCE = 4.0  # standard deviations of the null that a term has to exceed


def surd_above_null(
    target: torch.Tensor, agents: torch.Tensor, bins: int, repeats: int = 20, seed: int = 0
) -> SurdResult:
    """SURD of samples (target [n], agents [N, n]) minus what `repeats` shuffles of the target show, in bits.

    A term that does not exceed the null's mean by four of its standard deviations is 0; another is the term minus the mean. A
    floor at 0 alone would leave half of the null's spread in every one of up to 2^N terms. `mutual_information` is the sum of the
    terms that stay, and leak = 1 - I / H(T) with the estimate's own H(T), so the parts still sum to the whole.
    """
    found = surd_from_samples(target, agents, bins)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [
        surd_from_samples(target[torch.randperm(len(target), generator=generator)], agents, bins)
        for _ in range(repeats)
    ]
    parts = []
    for kind in ("redundant", "unique", "synergistic"):
        null = torch.tensor([list(getattr(s, kind).values()) for s in shuffled], dtype=torch.float64)
        mean, spread = null.mean(0), null.std(0)
        terms = getattr(found, kind)
        excess = torch.tensor(list(terms.values()), dtype=torch.float64) - mean
        kept = torch.where(excess > SIGNIFICANCE * spread, excess, 0.0)
        parts.append(dict(zip(terms, kept.tolist(), strict=True)))
    redundant, unique, synergistic = parts
    total = sum(sum(p.values()) for p in parts)
    entropy = found.mutual_information / (1 - found.leak) if found.leak < 1 else 0.0
    leak = 1 - total / entropy if entropy > 0 else 0.0
    return SurdResult(redundant, unique, synergistic, leak, total)


def deviations(codes: torch.Tensor, sizes: list[int], resamples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How far the 97.5th and the 2.5th percentile of the plug-in terms over resampled rows lie from their mean, in bits, [terms + 1]
    each: the redundant, unique and synergistic terms in their order, and the mutual information.

    codes [variables, n], the target first, each in [0, its size). [estimate - first, estimate - second] is the interval of an estimate
    above the null (the basic bootstrap, Davison and Hinkley 1997, 5.2.1; from the mean, since the null has taken the bias away).
    """
    pmf, n = joint_pmf(codes, sizes), codes.shape[1]
    counts = np.random.default_rng(seed).multinomial(n, pmf.flatten().numpy(), size=resamples)
    drawn = np.stack([_terms(surd(torch.from_numpy(one / n).reshape(pmf.shape))) for one in counts])
    high, low = np.percentile(drawn, (97.5, 2.5), axis=0) - drawn.mean(0)
    return high, low


def _terms(of: SurdResult) -> np.ndarray:
    return np.array([*of.redundant.values(), *of.unique.values(), *of.synergistic.values(), of.mutual_information])
