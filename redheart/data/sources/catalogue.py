"""The corpora that `--source NAME=PATH` knows: how each is read and under which licence. To add one, add a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from redheart.data.sources import amazon, emobank, ethics, goemotions, kote, moral_stories, social_chem
from redheart.data.sources.rows import Row


@dataclass(frozen=True)
class Source:
    """A published corpus. `read` yields its rows from a directory; `non_commercial` ones never enter by themselves."""

    read: Callable[[Path], Iterator[Row]]
    licence: str
    feeds: str
    non_commercial: bool = False


SOURCES: dict[str, Source] = {
    "goemotions": Source(goemotions.read, "Apache-2.0", "emotion, emotion_fine, regret"),
    "emobank": Source(emobank.read, "CC BY-SA 4.0", "vad"),
    "kote": Source(kote.read, "MIT", "emotion, culture (Korean)"),
    "ethics": Source(ethics.read, "MIT", "preference, ethics, acceptability"),
    "moral_stories": Source(moral_stories.read, "MIT", "preference, acceptability"),
    "social_chem": Source(social_chem.read, "CC BY-SA 4.0", "acceptability"),
    "amazon_counterfactual": Source(amazon.read, "CC BY-NC 4.0", "counterfactual", non_commercial=True),
}
