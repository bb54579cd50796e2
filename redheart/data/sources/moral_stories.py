"""Moral Stories (Emelin et al. 2021), the norm-distance split as given out by Kiehne et al. (2022): MIT.

Reads PATH/original_ms/{dev,test}.jsonl, one row per action; the two actions of a story share an ID but for its last character.
Feeds `preference` (text against contrast_text, sides by a coin on the ID) and `acceptability` of `text`. The norm itself is not part
of the text. PATH/contra_ms is not read: it inverts norms, so that what it calls moral is what the norm forbids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from redheart.data.sources.records import InvalidRecord
from redheart.data.sources.rows import LeftOut, Row, coin, lines, need

SECOND = "second action of its pair: kept as contrast_text"


def read(path: Path) -> Iterator[Row]:
    for split in ("dev", "test"):
        waiting: dict[str, tuple[str, str, bool]] = {}  # by story: (place, action, is it the moral one)
        for place, line in lines(need(path / "original_ms" / f"{split}.jsonl", f"moral_stories={path}")):
            try:
                story, text, moral = _action(place, line)
            except InvalidRecord as error:
                yield place, error
                continue
            if story not in waiting:
                waiting[story] = (place, text, moral)
                continue
            first_place, other, other_moral = waiting.pop(story)
            if moral == other_moral:
                for where in (first_place, place):
                    yield where, InvalidRecord(f"{where}: both actions of story {story} have label {int(moral)}")
                continue
            yield first_place, LeftOut(SECOND)
            good, bad = (text, other) if moral else (other, text)
            heads = coin(story)
            yield place, {
                "text": good if heads else bad, "contrast_text": bad if heads else good, "preference": float(heads),
                "acceptability": float(heads), "split": split,
            }  # fmt: skip
        for story, (place, _, _) in waiting.items():
            yield place, InvalidRecord(f"{place}: story {story} has one action, not two")


def _action(place: str, line: str | InvalidRecord) -> tuple[str, str, bool]:
    """(story, action, moral) of a row."""
    if isinstance(line, InvalidRecord):
        raise line
    try:
        row = json.loads(line)
        moral = {"0": False, "1": True}[str(row["label"])]
        story, text = row["ID"], row["moral_action" if moral else "immoral_action"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidRecord(f"{place}: not a Moral Stories row ({type(error).__name__}: {error})") from None
    if not isinstance(story, str) or not isinstance(text, str):
        raise InvalidRecord(f"{place}: ID and action must be texts")
    return story[:-1], text, moral
