"""What the LLM is asked about a text: a form with one line per question, each answered by one word of a short list.

The words of a scale run from low to high. A question with several entries names a category each (the seven emotions). The form is
filled in twice, once with every list of words in its order and once reversed, so that a liking for the first word cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redheart.schema import LABELS


@dataclass(frozen=True)
class Question:
    """One line of the form: ` key: word`."""

    key: str
    label: str  # of schema.LABELS
    entries: tuple[str, ...]  # the label's entries that it answers: one for a scale, one per word for categories
    words: tuple[str, ...]

    @property
    def is_scale(self) -> bool:
        return len(self.entries) == 1


def _scale(key: str, label: str, entry: str, low: str, high: str) -> Question:
    return Question(key, label, (entry,), (low, high))


FORM = (
    Question("feeling", "emotion", LABELS["emotion"].names, ("joy", "sadness", "anger", "fear", "surprise", "disgust", "calm")),
    _scale("tie", "culture", "jeong", "cold", "warm"),
    _scale("grief", "culture", "han", "fresh", "old"),
    _scale("honour", "culture", "chemyeon", "private", "public"),
    _scale("strength", "bentham", "intensity", "weak", "strong"),
    _scale("length", "bentham", "duration", "short", "long"),
    _scale("outcome", "bentham", "certainty", "open", "certain"),
    _scale("time", "bentham", "propinquity", "later", "now"),
    _scale("repetition", "bentham", "fecundity", "once", "often"),
    _scale("mixture", "bentham", "purity", "mixed", "pure"),
    _scale("people", "bentham", "extent", "few", "many"),
    _scale("effect", "ethics", "utilitarian", "harm", "help"),
    _scale("duty", "ethics", "deontological", "broken", "kept"),
    _scale("character", "ethics", "virtue", "bad", "good"),
    _scale("treatment", "ethics", "justice", "unfair", "fair"),
    _scale("act", "acceptability", "acceptability", "wrong", "right"),
    _scale("regret", "regret", "regret", "none", "deep"),
    _scale("hope", "regret_views", "optimistic", "none", "deep"),
    _scale("doubt", "regret_views", "neutral", "none", "deep"),
    _scale("despair", "regret_views", "pessimistic", "none", "deep"),
)  # fmt: skip
NUM_WORDS = sum(len(q.words) for q in FORM)
assert all(set(q.entries) <= set(LABELS[q.label].names) for q in FORM)
assert all(len(q.words) == (2 if q.is_scale else len(q.entries)) for q in FORM)

HEADING = "A form is filled in about each text. Every line has one word of its list.\n"
# Two filled-in forms, so that a small model keeps to the lists; between them every scale's word is low once and high once.
EXAMPLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "I broke my promise to visit my grandmother again, and now she is gone. I will never forgive myself.",
        ("sadness", "warm", "old", "private", "strong", "long", "certain", "later", "often", "pure", "few",
         "harm", "broken", "bad", "unfair", "wrong", "deep", "deep", "deep", "deep"),
    ),
    (
        "Our whole class won the quiz today, and everyone who helped got a share of the prize!",
        ("joy", "cold", "fresh", "public", "weak", "short", "open", "now", "once", "mixed", "many",
         "help", "kept", "good", "fair", "right", "none", "none", "none", "none"),
    ),
)  # fmt: skip
assert all(w in q.words for _, answers in EXAMPLES for q, w in zip(FORM, answers, strict=True))


def lists(reverse: bool) -> str:
    """The lists of words, one line per question, as they stand above a form."""
    return "".join(f" {q.key}: {', '.join(reversed(q.words) if reverse else q.words)}\n" for q in FORM)


def lacks(record: dict[str, Any]) -> list[str]:
    """The labels of the form that a record lacks altogether.

    A vector that people labelled in part keeps its gaps: a label has one origin, and a gap is never passed off as theirs.
    """
    return [name for name in dict.fromkeys(q.label for q in FORM) if record[name] is None]
