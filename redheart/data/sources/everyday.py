"""The corpus that ships with the package: 2,000 short English texts written and labelled for this project (MIT).

everyday.json: 360 texts by hand, of decisions, conflicts, promises and losses, many on jeong 정, han 한 and chemyeon 체면; 101 are
pairs. Emotion, culture, regret, acceptability and preference are labelled; the hedonic values are left to the LLM.
situations.json: 1,640 texts put together by the rules of tests/data/situations.py, with the labels that follow from the rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from redheart.data.sources.records import read_records
from redheart.data.sources.rows import Row

NAME = "everyday"
FILES = ("everyday.json", "situations.json")


def folder() -> Path:
    return Path(str(resources.files("redheart.data").joinpath("corpus")))


def read(corpus: Path) -> Iterator[Row]:
    for name in FILES:
        yield from read_records(corpus / name, NAME)
