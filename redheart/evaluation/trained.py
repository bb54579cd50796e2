"""Which answers a network has learned: an entry whose label is nowhere in its training data is an answer that nothing taught.

Such an answer is a number like any other, in its label's range, and means nothing. It is left out wherever answers are shown,
unless it is asked for, and marked there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from redheart.config import LossConfig
from redheart.schema import LABELS
from redheart.tasks import TASKS, task_weights

if TYPE_CHECKING:
    from redheart.data.shards import Histograms

Number = TypeVar("Number", int, float)
LabelWeights = dict[str, list[float]]  # by label: the summed weight of each entry's labels in the training data
LabelCounts = dict[str, list[int]]  # by label: the training rows with a label of each entry; empty where nobody counted
Entries = dict[str, tuple[bool, ...]]  # by label: which of its entries were trained


def label_weights(histograms: Histograms) -> LabelWeights:
    """From the histograms of a training split (data/shards.py); 0 where an entry has no label."""
    return {
        name: [round(sum(weight for _, weight in entry), 4) for entry in histograms[name]]
        if name in histograms
        else [0.0] * label.size
        for name, label in LABELS.items()
    }


def label_counts(split: Mapping[str, LabelCounts]) -> LabelCounts:
    """From the index of a training split; empty where an earlier version wrote it."""
    if "label_counts" not in split:
        return {}
    return {name: split["label_counts"].get(name, [0] * label.size) for name, label in LABELS.items()}


def joined(earlier: Mapping[str, list[Number]], now: Mapping[str, list[Number]]) -> dict[str, list[Number]]:
    """Of training that went on with other data: the larger number of each entry. What an entry once learned it has learned."""
    return {
        name: [max(pair) for pair in zip(earlier.get(name, entries), entries, strict=True)]
        for name, entries in now.items()
    }


def trained_entries(weights: Mapping[str, Sequence[float]], config: LossConfig) -> Entries:
    """By label: the entries that have labels and whose loss counts for something (`loss.weights`, `loss.shares`)."""
    factors = task_weights(config)
    counts = {task.label for name, task in TASKS.items() if factors[name] > 0 and task.judged.link is not None}
    return {name: tuple(name in counts and w > 0 for w in weights[name]) for name in LABELS}


def labelled_entries(weights: LabelWeights) -> Entries | None:
    """By label: the entries that have labels, whatever their losses count for; None where that is not known."""
    return {name: tuple(w > 0 for w in entries) for name, entries in weights.items()} or None


def untrained_names(trained: Mapping[str, Sequence[bool]]) -> list[str]:
    """As they are shown: `regret` where no entry was trained, `culture.han` where another entry was."""
    return _names({label: [not yes for yes in entries] for label, entries in trained.items()})


def trained_names(trained: Mapping[str, Sequence[bool]]) -> list[str]:
    """The others: `regret` where every entry was trained, `culture.han` where another was not."""
    return _names(trained)


def counted(counts: LabelCounts, name: str) -> str:
    """How many labels taught what is shown as `name`: `20`, or `13 to 40` where entries differ; empty where nobody counted."""
    label, _, entry = name.partition(".")
    numbers = counts.get(label, [])
    if entry and numbers:
        numbers = [numbers[LABELS[label].names.index(entry)]]
    return " to ".join(f"{n:,}" for n in sorted({min(numbers), max(numbers)})) if numbers else ""


def _names(chosen: Mapping[str, Sequence[bool]]) -> list[str]:
    names = []
    for label, entries in chosen.items():
        if all(entries):
            names.append(label)
        else:
            names += [f"{label}.{n}" for n, yes in zip(LABELS[label].names, entries, strict=True) if yes]
    return names
