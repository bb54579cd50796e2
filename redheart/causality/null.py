"""SURD above chance, and how sure it is: the plug-in estimate from samples is biased upwards, and a shuffled target says by how much.

With B bins and N agents independent data show about (B^N - 1)(B_T - 1) / (2 n ln 2) bits (Miller 1955): 0.12 bit for n = 3000,
5 bins and 3 agents. Shuffling the target destroys what the agents tell and keeps the bias.
"""

from __future__ import annotations

import numpy as np
import torch

from redheart.causality.surd import SurdResult, joint_pmf, surd, surd_from_samples
from redheart.schema import RedHeartError

SIGNIFICANCE = 4.0  # standard deviations of the null that a term has to exceed


def surd_above_null(
    target: torch.Tensor, agents: torch.Tensor, bins: int, repeats: int = 20, seed: int = 0
) -> SurdResult:
    """SURD of samples (target [n], agents [N, n]) minus what `repeats` shuffles of the target show, in bits.

    A term that does not exceed the null's mean by four of its standard deviations is 0; another is the term minus the mean. A
    floor at 0 alone would leave half of the null's spread in every one of up to 2^N terms. `mutual_information` is the sum of the
    terms that stay, and leak = 1 - I / H(T) with the estimate's own H(T), so the parts still sum to the whole. RedHeartError for
    fewer than two shuffles.
    """
    return above_null(target, agents, bins, repeats, seed)[0]


def above_null(
    target: torch.Tensor, agents: torch.Tensor, bins: int, repeats: int = 20, seed: int = 0
) -> tuple[SurdResult, np.ndarray]:
    """`surd_above_null`, and of every term (redundant, unique, synergistic, in their order) what it was before any was set to 0:
    the estimate minus the null's mean, in bits, [terms]."""
    if repeats < 2:
        raise RedHeartError(f"the spread of a null takes two shuffles or more, not {repeats}: choose repeats >= 2")
    found = surd_from_samples(target, agents, bins)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [
        surd_from_samples(target[torch.randperm(len(target), generator=generator)], agents, bins)
        for _ in range(repeats)
    ]
    null = np.stack([terms_of(s) for s in shuffled])
    excess = terms_of(found) - null.mean(0)
    kept = iter(np.where(excess > SIGNIFICANCE * null.std(0, ddof=1), excess, 0.0).tolist())
    redundant = {key: next(kept) for key in found.redundant}
    unique = {key: next(kept) for key in found.unique}
    synergistic = {key: next(kept) for key in found.synergistic}
    total = sum([*redundant.values(), *unique.values(), *synergistic.values()])
    leak = 1 - total / found.entropy if found.entropy > 0 else 0.0
    return SurdResult(redundant, unique, synergistic, leak, total, found.entropy), excess


def deviations(codes: torch.Tensor, sizes: list[int], resamples: int, seed: int = 0) -> np.ndarray:
    """How far the 2.5th and the 97.5th percentile of the plug-in terms over resampled rows lie from their mean, in bits,
    [terms + 1, 2]: the redundant, unique and synergistic terms in their order, and the mutual information.

    codes [variables, n], the target first, each in [0, its size). Added to an estimate from which the null has taken the bias they
    are its percentile interval (Efron and Tibshirani 1993, ch. 13), moved to where the estimate is. Of a term that was set to 0
    the estimate is what it was before: an interval around 0 would know nothing of what was cut.
    """
    pmf, n = joint_pmf(codes, sizes), codes.shape[1]
    counts = np.random.default_rng(seed).multinomial(n, pmf.flatten().numpy(), size=resamples)
    told = [surd(torch.from_numpy(one / n).reshape(pmf.shape)) for one in counts]
    drawn = np.stack([np.append(terms_of(one), one.mutual_information) for one in told])
    return (np.percentile(drawn, (2.5, 97.5), axis=0) - drawn.mean(0)).T


def terms_of(of: SurdResult) -> np.ndarray:
    """Bits of the redundant, unique and synergistic terms, in their order."""
    return np.array([*of.redundant.values(), *of.unique.values(), *of.synergistic.values()])
