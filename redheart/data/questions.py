"""What the LLM is asked about a text: one question per label entry, answered on a scale of one digit, 0 to 9."""

from __future__ import annotations

from typing import Any

from redheart.schema import LABELS

INSTRUCTION = (
    "Read the text and rate it on a scale from 0 (not at all) to 9 (extremely). Answer with one digit.\n\nText: "
)

QUESTIONS: dict[str, dict[str, str]] = {
    "emotion": {
        **{e: f"How much {e} does the person in the text feel?" for e in LABELS["emotion"].names if e != "neutral"},
        "neutral": "How calm and unemotional is the text?",
    },
    "culture": {
        "jeong": "How much warm attachment, grown through shared time and small acts of care, is in the text?",
        "han": "How much long unresolved sorrow and grievance is in the text?",
        "chemyeon": "How much does keeping face before other people matter in the text?",
    },
    "bentham": {
        "intensity": "How strong is the pleasure or pain in the text?",
        "duration": "How long will the pleasure or pain last?",
        "certainty": "How certain is it that the pleasure or pain happens?",
        "propinquity": "How soon does the pleasure or pain come?",
        "fecundity": "How likely is it to lead to more feelings of the same kind?",
        "purity": "How unmixed is it with the opposite feeling?",
        "extent": "How many people are affected?",
    },
    "ethics": {
        "utilitarian": "How acceptable is the act if only the happiness of everyone counts?",
        "deontological": "How acceptable is the act if duties and promises count?",
        "virtue": "How much does the act show a good character?",
        "justice": "How fair is the act to everyone concerned?",
    },
    "acceptability": {"acceptability": "How morally acceptable is what the person does?"},
    "regret": {"regret": "How much regret does the person feel, or will the person feel?"},
    "regret_views": {
        "optimistic": "How much regret would an optimist feel in this situation?",
        "neutral": "How much regret would an ordinary person feel in this situation?",
        "pessimistic": "How much regret would a pessimist feel in this situation?",
    },
}
assert all(tuple(q) == LABELS[name].names for name, q in QUESTIONS.items())


def missing_questions(record: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(label, entry, question) for every label the record lacks altogether and the LLM can answer.

    A vector that people labelled in part keeps its gaps: a label has one origin, and a gap is never passed off as theirs.
    """
    return [
        (name, entry, question)
        for name, questions in QUESTIONS.items()
        if record[name] is None
        for entry, question in enumerate(questions.values())
    ]
