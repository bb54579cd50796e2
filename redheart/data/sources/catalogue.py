"""The corpora that `--source NAME=PATH` knows: how each is read and under which licence. To add one, add a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from redheart.data.sources import amazon, emobank, ethics, everyday, goemotions, kote, moral_stories, social_chem
from redheart.data.sources.rows import Row


@dataclass(frozen=True)
class Source:
    """A corpus with a converter. `read` yields its rows from a directory (the shipped one: from its file).

    Non-commercial ones enter only where they are named. A `published` corpus holds a few texts more than once, and all of them
    are kept; anywhere else a text that is there twice is a mistake.
    """

    name: str
    read: Callable[[Path], Iterator[Row]]
    licence: str
    non_commercial: bool = False
    lang: str = "en"
    published: bool = True


_ALL = (
    Source("everyday", everyday.read, "MIT (written for Red Heart)", published=False),
    Source("goemotions", goemotions.read, "Apache-2.0"),
    Source("emobank", emobank.read, "CC BY-SA 4.0"),
    Source("kote", kote.read, "MIT", lang="ko"),
    Source("ethics", ethics.read, "MIT"),
    Source("moral_stories", moral_stories.read, "MIT"),
    Source("social_chem", social_chem.read, "CC BY-SA 4.0"),
    Source("amazon_counterfactual", amazon.read, "CC BY-NC 4.0", non_commercial=True),
)
SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
