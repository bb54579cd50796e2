"""Metrics as mergeable sums: tallies of parts add up to the tally of the whole, on any number of ranks; never means of means."""

from __future__ import annotations

import torch

FIELDS = ("n", "abs", "sq", "p", "t", "pp", "tt", "pt", "tp", "fp", "fn", "tn")
Tally = torch.Tensor  # float64 [len(FIELDS), size]


def empty_tally(size: int) -> Tally:
    return torch.zeros(len(FIELDS), size, dtype=torch.float64)


def tally(prediction: torch.Tensor, target: torch.Tensor, labelled: torch.Tensor) -> Tally:
    """Sums over the labelled entries of prediction, target, labelled [B, size] -> [fields, size]. A label above 0.5 is positive."""
    p, t = prediction.double(), target.double()
    said, true = p > 0.5, t > 0.5
    ones = torch.ones_like(p)
    terms = [ones, (p - t).abs(), (p - t) ** 2, p, t, p * p, t * t, p * t]
    terms += [said & true, said & ~true, ~said & true, ~said & ~true]
    return torch.stack([torch.where(labelled > 0, x.double(), 0.0).sum(0) for x in terms])


def summarise(sums: Tally) -> dict[str, float]:
    """mae, rmse, pearson (mean over the columns where it exists), macro_f1, accuracy; {} where nothing is labelled.

    macro_f1 is the mean of 2·tp / (2·tp + fp + fn) over the columns that have a positive label.
    """
    n, absolute, sq, p, t, pp, tt, pt, tp, fp, fn, tn = sums
    total = n.sum().item()
    if total == 0:
        return {}
    result = {
        "count": total,
        "mae": (absolute.sum() / total).item(),
        "rmse": (sq.sum() / total).sqrt().item(),
        "accuracy": ((tp + tn).sum() / total).item(),
    }
    covariance, var_p, var_t = n * pt - p * t, n * pp - p * p, n * tt - t * t
    moves = (var_p > 1e-9) & (var_t > 1e-9)
    if moves.any():
        result["pearson"] = (covariance[moves] / (var_p[moves] * var_t[moves]).sqrt()).mean().item()
    positive = tp + fn > 0
    if positive.any():
        result["macro_f1"] = (2 * tp / (2 * tp + fp + fn).clamp(min=1e-12))[positive].mean().item()
    return result
