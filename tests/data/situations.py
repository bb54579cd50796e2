"""Writes situations.json of the shipped corpus: short texts put together by rule from situations.yaml, labelled by the same rules.

    python -m tests.data.situations

A text is a situation, what someone did in it (or what befell them), how that turned out and what was felt of it. Each of these
choices moves the labels, so that they are known without anyone reading the text; they count as `author`. What a split is made
of is its own: dev and test share no situation, relation, outcome of chance, feeling or afterthought with training.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from redheart.data.sources import everyday

PARTS = Path(__file__).with_suffix(".yaml")
ROWS = {"train": (820, 420), "dev": (132, 68), "test": (132, 68)}  # of acts, of what befalls someone
EMOTIONS = ("joy", "sadness", "anger", "fear", "surprise", "disgust")
NEGATIVE = ("sadness", "anger", "fear", "disgust")
MAX_WORDS = 46
# pronouns and the verbs that follow: I, my, me, myself, mine
FIRST = {"I": "I", "my": "my", "me": "me", "myself": "myself", "mine": "mine"}
SHE = {"I": "she", "my": "her", "me": "her", "myself": "herself", "mine": "hers"}
HE = {"I": "he", "my": "his", "me": "him", "myself": "himself", "mine": "his"}
THIRD = {"have": "has", "am": "is", "wish": "wishes", "feel": "feels", "carry": "carries"}

# afterthought -> regret, feelings, whether it states a counterfactual, after which acts
AFTER: dict[str, tuple[float, dict[str, float], bool, str]] = {
    "deep_regret": (0.95, {"sadness": 0.7, "disgust": 0.15}, False, "wrong"),
    "regret_counterfactual": (0.9, {"sadness": 0.65}, True, "wrong"),
    "mild_regret": (0.4, {"sadness": 0.3}, False, "wrong"),
    "turned_regret": (0.75, {"joy": 0.3, "sadness": 0.55}, False, "wrong"),
    "defiant": (0.05, {"joy": 0.2, "anger": 0.1}, False, "wrong"),
    "peace": (0.02, {"joy": 0.5}, False, "right"),
    "denied": (0.05, {"joy": 0.15}, False, "right"),
    "glad_counterfactual": (0.02, {"joy": 0.35, "fear": 0.1}, True, "right"),
    "turned_relief": (0.05, {"joy": 0.6, "fear": 0.45}, False, "right"),
}
# what befalls someone -> acceptability, duration
EVENTS = {
    "joy": (0.95, 0.4), "sadness": (0.8, 0.7), "anger": (0.12, 0.3), "fear": (0.75, 0.2), "surprise": (0.9, 0.15),
    "disgust": (0.6, 0.1), "neutral": (0.95, 0.1),
}  # fmt: skip
TAILS = {"lasting": 0.2, "passing": 0.2, "unsure": 0.15}  # how often one of them is said
AROUSAL = {"joy": 0.4, "sadness": -0.4, "anger": 0.8, "fear": 0.8, "surprise": 0.7, "disgust": 0.3, "neutral": -0.5}
DOMINANCE = {"joy": 0.5, "sadness": -0.6, "anger": 0.4, "fear": -0.7, "surprise": -0.2, "disgust": 0.0, "neutral": 0.1}


class Dice:
    """Seeded choices. `random()` alone is used: its numbers are the same in every version of Python."""

    def __init__(self, seed: str):
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def one(self, of: Sequence[Any]) -> Any:
        return of[int(self._random.random() * len(of))]


class Teller:
    """Who tells or acts, and the person close to them: turns parts of situations.yaml into sentences."""

    def __init__(self, parts: dict[str, Any], dice: Dice):
        self.words, self.name = FIRST, ""
        if dice.chance(0.45):
            self.name, pronoun = dice.one(parts["names"])
            self.words = SHE if pronoun == "she" else HE
        self.who = dice.one(parts["who"])

    def text(self, *clauses: str) -> str:
        """Clauses -> sentences in this person."""
        told = ". ".join(clauses).replace("<who>", self.who)
        if self.name:
            told = re.sub(r"\bI (\w+)", lambda m: f"I {THIRD.get(m[1], m[1])}", told)
        words = {k: v for k, v in self.words.items() if k != "I"}
        for mark, word in words.items():
            told = told.replace(f"<{mark}>", word)
        if self.name:
            told = re.sub(r"\bI\b", self.name, told, count=1)
            told = re.sub(r"\bI\b", self.words["I"], told)
        return re.sub(r"(^|\. )(\w)", lambda m: m[1] + m[2].upper(), told) + "."


def records(split: str) -> list[dict[str, Any]]:
    """The records of a split, each text once."""
    parts = yaml.safe_load(PARTS.read_text(encoding="utf-8"))[split]
    dice, seen, made = Dice(split), set[str](), list[dict[str, Any]]()
    for make, number in zip((_act, _event), ROWS[split], strict=True):
        wanted = len(made) + number
        while len(made) < wanted:
            record = make(parts, dice)
            texts = [record["text"], record.get("contrast_text", "")]
            if record["text"] not in seen and all(len(t.split()) <= MAX_WORDS for t in texts):
                seen.add(record["text"])
                made.append({**record, "split": split, "label_origin": "author"})
    return made


def _act(parts: dict[str, Any], dice: Dice) -> dict[str, Any]:
    (situation, *told), (feeling, grave, duration, extent, *allowed), culture = dice.one(parts["acts"])
    teller, when = Teller(parts, dice), dice.one(parts["when"])
    situation = _dated(when, situation)
    is_right, joined, turned_out = dice.chance(0.5), dice.chance(0.4), dice.chance(0.8)

    def begin(right: bool) -> list[str]:
        act = told[0] if right else told[1]
        return [f"{situation}, {'and' if right else 'but'} {act}"] if joined else [situation, act]

    clauses, feelings, sure = begin(is_right), [{"joy": 0.15}] if is_right else [], 0.9
    by_chance = turned_out and dice.chance(0.3)
    if by_chance:
        clauses.append(dice.one(parts["unlucky" if is_right else "lucky"]))
        feelings.append({"sadness": 0.45, "anger": 0.1} if is_right else {"surprise": 0.3})
        sure = 0.6
    elif turned_out:
        clauses.append(told[2] if is_right else told[3])
        harm = {feeling: 0.35 + 0.4 * grave} | ({"sadness": 0.2} if feeling != "sadness" else {})
        feelings.append({"joy": 0.55} if is_right else harm)
    regret = (
        (0.15 if by_chance else 0.02) if is_right else 0.2 + grave * (0.45 if turned_out and not by_chance else 0.2)
    )
    counterfactual = False
    if dice.chance(0.75):
        fitting = [k for k, v in AFTER.items() if v[3] == ("right" if is_right else "wrong")]
        kind = dice.one(fitting)
        regret, felt, counterfactual, _ = AFTER[kind]
        feelings.append(felt)
        clauses.append(dice.one(parts["after"][kind]))
    tail = _tail(parts, dice, clauses)
    emotion = _emotion(feelings)
    ethics = (
        [0.7 if by_chance else 0.92, 0.95, 0.95, 0.92]
        if is_right
        else [min(1.0, allowed[0] + 0.2 * by_chance), *allowed[1:]]
    )
    labels = {
        "culture": culture if is_right else [0.4 * culture[0], *culture[1:]],
        "ethics": ethics,
        "acceptability": 0.95 if is_right else sum(allowed) / 4,
        "regret": regret,
        "regret_views": [0.6 * regret, regret, regret + (1 - regret) * (0.1 if is_right else 0.4 * grave)],
        "counterfactual": float(counterfactual),
        **_felt(emotion, 0.5 * grave + 0.5 * max(emotion[:-1]), duration, extent, sure, tail),
    }
    record = {"text": teller.text(*clauses), **_rounded(labels)}
    if dice.chance(0.6):
        other = [*begin(not is_right), *([told[3] if is_right else told[2]] if turned_out else [])]
        record |= {"contrast_text": teller.text(*other), "preference": int(is_right)}
    return record


def _event(parts: dict[str, Any], dice: Dice) -> dict[str, Any]:
    feeling = dice.one(list(EVENTS))
    acceptable, duration = EVENTS[feeling]
    teller, when = Teller(parts, dice), dice.one(parts["when"])
    event = dice.one(parts["events"][feeling])
    clauses, strength, counterfactual = [event if feeling == "neutral" else _dated(when, event)], 0.65, False
    if dice.chance(0.75):
        clauses.append(dice.one(parts["feelings"][feeling]))
        strength = 0.85
    if feeling in parts["event_counterfactual"] and dice.chance(0.35):
        clauses.append(dice.one(parts["event_counterfactual"][feeling]))
        counterfactual = True
    tail = _tail(parts, dice, clauses) if feeling != "neutral" else ""
    emotion = _emotion([{feeling: strength}] if feeling != "neutral" else [])
    regret = 0.35 if counterfactual and feeling == "sadness" else 0.02
    labels = {
        "culture": [0.3 if "<who>" in event and feeling in ("joy", "sadness") else 0.0, 0.0, 0.0],
        "ethics": [acceptable] * 4,
        "acceptability": acceptable,
        "regret": regret,
        "regret_views": [0.6 * regret, regret, regret + 0.05],
        "counterfactual": float(counterfactual),
        **_felt(emotion, max(0.05, *emotion[:-1]), duration, 0.1, 0.9, tail),
    }
    return {"text": teller.text(*clauses), **_rounded(labels)}


def _dated(when: str, clause: str) -> str:
    if not when:
        return clause
    return f"{when}, {clause if re.match('I |<', clause) else clause[0].lower() + clause[1:]}"


def _tail(parts: dict[str, Any], dice: Dice, clauses: list[str]) -> str:
    """Sometimes one more clause, about how long it lasts or whether it is sure; which."""
    for kind, share in TAILS.items():
        if len(clauses) < 4 and dice.chance(share):
            clauses.append(dice.one(parts[kind]))
            return kind
    return ""


def _emotion(feelings: Sequence[dict[str, float]]) -> list[float]:
    """Feelings that come together -> the seven emotions: none is undone by another, and what is felt little is neutral."""
    absent = dict.fromkeys(EMOTIONS, 1.0)
    for felt in feelings:
        for name, strength in felt.items():
            absent[name] *= 1 - strength
    emotion = [1 - absent[name] for name in EMOTIONS]
    return [*emotion, max(0.0, 0.9 - 1.3 * max(emotion))]


def _felt(
    emotion: list[float], intensity: float, duration: float, extent: float, sure: float, tail: str
) -> dict[str, list[float]]:
    """Emotion, valence-arousal-dominance and the hedonic values."""
    named = dict(zip((*EMOTIONS, "neutral"), emotion, strict=True))
    worst = max(named[name] for name in NEGATIVE)
    duration = {"lasting": 0.95, "passing": 0.05}.get(tail, duration)
    sure = 0.3 if tail == "unsure" else sure
    soon = {"lasting": 0.5, "unsure": 0.4}.get(tail, 0.85)
    purity = 1 - min(named["joy"], worst) / max(emotion)
    vad = [named["joy"] - worst, *(sum(by[n] * v for n, v in named.items()) for by in (AROUSAL, DOMINANCE))]
    return {
        "emotion": emotion,
        "vad": [min(1.0, max(-1.0, v)) for v in vad],
        "bentham": [intensity, duration, sure, soon, 0.3 + 0.5 * duration, purity, extent],
    }


def _rounded(labels: dict[str, Any]) -> dict[str, Any]:
    return {k: [round(x, 2) for x in v] if isinstance(v, list) else round(v, 2) for k, v in labels.items()}


def content() -> str:
    """What situations.json holds: a JSON list, one record a line."""
    rows = [json.dumps(r, ensure_ascii=False, separators=(",", ":")) for split in ROWS for r in records(split)]
    return "[\n" + ",\n".join(rows) + "\n]\n"


if __name__ == "__main__":
    (everyday.folder() / "situations.json").write_text(content(), encoding="utf-8")
