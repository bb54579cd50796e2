"""Single texts with what their label says and what the network says of them: a few of a split, and those it is most wrong about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from redheart.data.stream import SampleStream
from redheart.evaluation.answers import Answers
from redheart.evaluation.evaluate import Said
from redheart.schema import LABELS
from redheart.tasks import TASKS


class Example(NamedTuple):
    """`answer`: `regret`, or the entry of an answer of several, `emotion.joy`; `label` and `said` in its units."""

    text: str
    answer: str
    label: float
    said: float


def shown(said: Said, stream: SampleStream) -> list[Example]:
    """Every final answer that has a label on these rows; of an answer of several entries the one with the highest label."""
    found = []
    for place, row in enumerate(stream.rows(said.rows)):
        for task, predictions in said.predictions.items():
            given = row[task] if TASKS[task].final else None
            entries = given if isinstance(given, list) else [given]
            label = np.array([np.nan if v is None else v for v in entries], float)
            if label.size and not np.isnan(label).all():
                k = int(np.nanargmax(label))
                found.append(Example(_text(row, task), _entry(task, k), float(label[k]), float(predictions[place, k])))
    return found


def worst(held_out: Mapping[str, Answers], stream: SampleStream, each: int = 3) -> list[Example]:
    """Of every answer the `each` texts with the largest error of one entry that people labelled, the largest first."""
    found = []
    for task, given in held_out.items():
        assert given.numbers is not None
        error = np.where(given.known, np.abs(given.prediction - given.target), -1.0)
        rows = np.argsort(-error.max(1), kind="stable")[:each]
        for place, row in zip(rows, stream.rows(given.numbers[rows]), strict=True):
            k = int(error[place].argmax())
            label, said = float(given.target[place, k]), float(given.prediction[place, k])
            found.append(Example(_text(row, task), _entry(task, k), label, said))
    return found


def confusion(task: str, given: Answers, trained: Sequence[bool]) -> tuple[tuple[str, ...], np.ndarray] | None:
    """(entries, [n, n]) of the `trained` entries: of the texts whose label of one is above 0.5, how many have which of them as the
    strongest; None where fewer than two were trained."""
    names = [n for n, yes in zip(LABELS[TASKS[task].label].names, trained, strict=True) if yes]
    if len(names) < 2:
        return None
    prediction, target, known = (x[:, list(trained)] for x in (given.prediction, given.target, given.known))
    strongest = np.eye(len(names), dtype=int)[prediction.argmax(1)]
    return tuple(names), ((target > 0.5) & known).T.astype(int) @ strongest


def _text(row: Mapping[str, Any], task: str) -> str:
    """Of an answer about two texts both of them."""
    return f"{row['text']} ⟷ {row['contrast_text']}" if TASKS[task].kind == "binary" else row["text"]


def _entry(task: str, k: int) -> str:
    label = LABELS[TASKS[task].label]
    return task if label.scalar else f"{task}.{label.names[k]}"
