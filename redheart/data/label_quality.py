"""Words' log-probabilities -> scores in [0, 1], and a report that says which questions' answers may become labels.

Batch calibration (Zhou et al. 2023, arXiv 2309.17249): a word's share of its list is divided by the mean share over all texts, so that what
the model says of any text whatever does not count. The two forms' scores are averaged. Where people labelled training texts too,
an isotonic regression on those maps the score to their scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from redheart.config import LabelerConfig
from redheart.data.questions import FORM
from redheart.finite import check_finite
from redheart.schema import JUDGED_ORIGINS, LABELS

MIN_COMPARED = 30  # texts that people labelled below which agreement is not judged
MIN_FITTED = 200  # training texts that people labelled below which no map is fitted


def calibrated(logp: np.ndarray) -> tuple[dict[tuple[str, str], np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """float32 [N, 2, words] -> scores [N] and masses [N] of each (label, entry). RedHeartError where an answer is not finite."""
    check_finite({"the LLM's log-probabilities": torch.from_numpy(logp)})
    scores, masses = {}, {}
    start = 0
    for question in FORM:
        p = np.exp(logp[:, :, start : start + len(question.words)].astype(np.float64))
        start += len(question.words)
        mass = p.sum(-1)
        share = p / np.maximum(mass[..., None], 1e-30)
        share = share / np.maximum(share.mean(0, keepdims=True), 1e-12)
        share = (share / share.sum(-1, keepdims=True)).mean(1)  # both forms
        for number, entry in enumerate(question.entries):
            scores[question.label, entry] = share[:, 1 if question.is_scale else number]
            masses[question.label, entry] = mass.mean(1)
    return scores, masses


def judge(
    records: Sequence[Mapping[str, Any]], logp: np.ndarray, config: LabelerConfig
) -> tuple[dict[tuple[str, str], np.ndarray], list[dict[str, Any]]]:
    """(scores [N] of every accepted entry, the report of all entries). Labels of the test split decide nothing.

    Of an entry the report says its mass (mean probability of the list's words, in [0, 1]), the spread (standard deviation) of its scores,
    how many training and dev texts people labelled (compared) and, from MIN_COMPARED on, the agreement: the chance, in [0, 1], that of
    two texts people rate differently the LLM puts the right one higher.
    """
    scores, masses = calibrated(logp)
    train, deciding = (np.array([r["split"] in splits for r in records]) for splits in (["train"], ["train", "dev"]))
    accepted, report = {}, []
    for (label, entry), score in scores.items():
        human = np.array([_human(r, label, entry) for r in records])
        known = ~np.isnan(human) & deciding
        varied = known.sum() >= MIN_COMPARED and len(np.unique(human[known])) > 1
        agreement = concordance(human[known], score[known]) if varied else None
        mass, spread = float(masses[label, entry].mean()), float(score.std())
        reason = ""
        if mass < config.min_mass:
            reason = f"mass below {config.min_mass:g}"
        elif spread < config.min_spread:
            reason = f"spread below {config.min_spread:g}"
        elif agreement is not None and agreement < config.min_agreement:
            reason = f"agreement below {config.min_agreement:g}"
        told = {"label": label, "entry": entry, "mass": mass, "spread": spread, "agreement": agreement}
        report.append(told | {"compared": int(known.sum()), "accepted": not reason, "reason": reason})
        if not reason:
            accepted[label, entry] = to_human_scale(score, human, known & train)
    return accepted, report


def to_human_scale(score: np.ndarray, human: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Isotonic regression of `human` on `score` where `train`; the score itself where those are few or all alike."""
    if train.sum() < MIN_FITTED or len(np.unique(human[train])) < 2:
        return score
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(out_of_bounds="clip").fit(score[train], human[train])
    return np.asarray(fitted.predict(score))


def concordance(human: np.ndarray, score: np.ndarray) -> float:
    """P(score orders two texts as people do | people rate them differently), ties half: (1 + Somers' D) / 2, the AUC if binary."""
    ranks = np.unique(score, return_inverse=True)[1]
    below = np.zeros(len(np.unique(ranks)), dtype=np.int64)  # scores seen so far, of texts that people rate lower
    right = total = 0.0
    for value in np.unique(human):
        rows = ranks[human == value]
        cumulated = np.concatenate([[0], np.cumsum(below)])
        right += float((cumulated[rows] + below[rows] / 2).sum())
        total += len(rows) * int(below.sum())
        np.add.at(below, rows, 1)
    return right / total


def _human(record: Mapping[str, Any], label: str, entry: str) -> float:
    if record["label_origin"][label] not in JUDGED_ORIGINS or record[label] is None:
        return np.nan
    value = record[label] if LABELS[label].scalar else record[label][LABELS[label].names.index(entry)]
    return np.nan if value is None else float(value)
