"""One number for what each final answer knows, and the mean and interval of such a number over seeds.

Which metric judges an answer follows from its labels: macro-F1 of emotions, with thresholds from dev; accuracy of pairs and of entries
that people answer with yes or no alone (and, but of pairs, their F1, with thresholds from dev); Pearson's r of everything else. Of a
label with several entries the whole is measured, and, but of emotions, each entry too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from redheart.evaluation.ablation import METRIC
from redheart.evaluation.answers import Answers, cuts, metric, sums
from redheart.schema import LABEL_COLUMNS, LABELS
from redheart.tasks import TASKS

Measured = dict[str, tuple[str, float]]  # what is measured -> name of the metric, value


def measure(
    dev: Mapping[str, Answers], held_out: Mapping[str, Answers], entries: np.ndarray, same_rows: bool
) -> Measured:
    """Of every final answer that has one of the `entries` [NUM_LABEL_COLUMNS] (bool, in the order of LABEL_COLUMNS).

    `dev` chooses thresholds; `same_rows`: held out is dev itself (answers.cuts). Nothing is measured where all labels are alike, but
    of pairs, which are read either way round, or where the network lacks the answer.
    """
    found: Measured = {}
    for label in LABELS:
        wanted = np.flatnonzero(entries[LABEL_COLUMNS[label]])
        if not wanted.size or label not in held_out:
            continue
        parts = {label: wanted}
        if TASKS[label].kind != "multilabel" and len(wanted) > 1:
            parts |= {f"{label}.{LABELS[label].names[k]}": np.array([k]) for k in wanted}
        for name, columns in parts.items():
            found |= _measured(name, label, dev[label].entries(columns), held_out[label].entries(columns), same_rows)
    return found


def _measured(name: str, label: str, dev: Answers, held_out: Answers, same_rows: bool) -> Measured:
    labels = held_out.target[held_out.known]
    kind: str = TASKS[label].kind
    if not len(labels) or ((labels == labels[0]).all() and kind != "binary"):
        return {}
    if kind == "multilabel" and not (labels > 0.5).any():
        return {}
    if kind == "score" and np.isin(labels, (0, 1)).all():
        kind = "binary"
    cut = cuts(dev, held_out, same_rows) if kind == "multilabel" else None
    found = {name: (METRIC[kind], float(metric(kind, sums(kind, held_out, cut).sum(0))))}
    if kind == "binary" and TASKS[label].kind == "score" and held_out.target.shape[1] == 1:
        f1 = sums("multilabel", held_out, cuts(dev, held_out, same_rows))
        found[f"{name} (F1)"] = ("f1", float(metric("multilabel", f1.sum(0))))
    return found


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation (n - 1) and Student's 95 % interval of the mean; None where one value says nothing of it."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    from scipy.stats import t

    sd = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def paired(a: Sequence[Mapping[str, float]], b: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, list[float]]]:
    """What was measured in every seed of both, and a - b seed by seed: one order of samples, two networks."""
    for name in a[0]:
        if all(name in one for one in (*a, *b)):
            yield name, [x[name] - y[name] for x, y in zip(a, b, strict=True)]
