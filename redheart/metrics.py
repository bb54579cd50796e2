"""Metrics as mergeable sums: tallies of parts add up to the tally of the whole, on any number of ranks; never means of means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

FIELDS = ("n", "abs", "sq", "p", "t", "pp", "tt", "pt", "tp", "fp", "fn", "tn", "bad", "rows")
Tally = torch.Tensor  # float64 [len(FIELDS), size]
MIN_TEXTS = 20  # with fewer nothing can be told
LEAST_VARIANCE = 0.01  # that errors are compared with: of labels that hardly differ every error would be a large one
ROUNDING = 1e-11  # of a sum of squares: what a difference of such sums is off by, with room


def empty_tally(size: int) -> Tally:
    return torch.zeros(len(FIELDS), size, dtype=torch.float64)


def tally(prediction: torch.Tensor, target: torch.Tensor, labelled: torch.Tensor) -> Tally:
    """Sums over the labelled entries of prediction, target, labelled [B, size] -> [fields, size]. A label above 0.5 is positive.

    What is not finite enters no sum but that of its own, `bad`. `rows` counts, in the first column, the rows with any label.
    """
    p, t = prediction.double(), target.double()
    known, finite = labelled > 0, p.isfinite() & t.isfinite()
    said, true = p > 0.5, t > 0.5
    ones = torch.ones_like(p)
    terms = [ones, (p - t).abs(), (p - t) ** 2, p, t, p * p, t * t, p * t]
    terms += [said & true, said & ~true, ~said & true, ~said & ~true]
    sums = [torch.where(known & finite, x.double(), 0.0).sum(0) for x in terms]
    rows = torch.zeros_like(sums[0])
    rows[0] = known.any(1).sum()
    return torch.stack([*sums, (known & ~finite).double().sum(0), rows])


def pair_tally(prediction: torch.Tensor, target: torch.Tensor, labelled: torch.Tensor) -> Tally:
    """The tally of answers about two texts: every row once as it is and once with its texts the other way round, each counting half.

    So nothing depends on the order in which a data set lists the two, and who always says the same is right half of the time.
    """
    both, true = (torch.cat([x, 1 - x]) for x in (prediction, target))
    return tally(both, true, torch.cat([labelled, labelled])) / 2


def unexplained(sums: Tally) -> float:
    """1 - R²: squared errors over the squares of what labels differ from their mean by, of all entries together; NaN where nothing is
    labelled or an entry is not finite. Labels' variance counts as LEAST_VARIANCE at least."""
    if not_finite(sums):
        return math.nan
    n, _, sq, _, t, _, tt, *_ = sums
    known = n > 0
    of_labels = torch.maximum(tt - t * t / n, LEAST_VARIANCE * n)[known].sum().item()
    return sq[known].sum().item() / of_labels if of_labels else math.nan


def not_finite(sums: Tally) -> int:
    """How many labelled entries of a tally had a prediction or a label that is NaN or infinite."""
    return int(sums[FIELDS.index("bad")].sum())


def macro_f1(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """Mean of 2·tp / (2·tp + fp + fn) over the columns that have a positive label; counts [..., size] -> [...], NaN where none has.

    Where the counts of several samples of the same rows are given (a bootstrap), the columns are those of any of them.
    """
    positive = (tp + fn > 0).any(tuple(range(tp.ndim - 1)))
    if not positive.any():
        return np.full(tp.shape[:-1], np.nan)
    return (2 * tp / np.maximum(2 * tp + fp + fn, 1e-12))[..., positive].mean(-1)


def telling(n: torch.Tensor | np.ndarray, varies: Any) -> Any:
    """Which entries [size] enter a mean of correlations: of those that vary the ones with MIN_TEXTS labels; all where none has so many."""
    enough = varies & (n >= MIN_TEXTS)
    return enough if enough.any() else varies


def summarise(sums: Tally) -> dict[str, float]:
    """count (labelled entries), rows (with a labelled entry), mae, rmse, accuracy, pearson (mean over the columns whose labels vary and
    are enough (`telling`), 0 where the prediction does not vary; left out where no prediction does) and macro_f1 (where some column has
    a positive label); {} where nothing is labelled.

    ValueError where an entry is not finite: no figure stands for it.
    """
    if bad := not_finite(sums):
        raise ValueError(f"{bad} predictions or labels are not finite: there is no metric of them")
    n, absolute, sq, p, t, pp, tt, pt, tp, fp, fn, tn, _, rows = sums
    total = n.sum().item()
    if total == 0:
        return {}
    result = {
        "count": total,
        "rows": rows.sum().item(),
        "mae": (absolute.sum() / total).item(),
        "rmse": (sq.sum() / total).sqrt().item(),
        "accuracy": ((tp + tn).sum() / total).item(),
    }
    covariance, var_p, var_t = n * pt - p * t, n * pp - p * p, n * tt - t * t
    # a constant's variance is the rounding of its sums
    varies, moves = (var_t > ROUNDING * n * tt), (var_p > ROUNDING * n * pp)
    varies = telling(n, varies)
    if (varies & moves).any():
        r = torch.where(moves, covariance / (var_p * var_t).sqrt(), 0.0)
        result["pearson"] = r[varies].mean().item()
    if (tp + fn > 0).any():
        result["macro_f1"] = float(macro_f1(tp.numpy(), fp.numpy(), fn.numpy()))
    return result
