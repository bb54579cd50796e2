"""The corpus that ships with the package: 360 short English texts written and labelled for this project (MIT).

Everyday decisions, conflicts, promises and losses, many on jeong 정, han 한 and chemyeon 체면; 101 are pairs. Emotion, culture,
regret, acceptability and preference are labelled by the author; the hedonic values are left to the LLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from redheart.data.sources.records import read_records
from redheart.data.sources.rows import Row

NAME = "everyday"


def path() -> Path:
    return Path(str(resources.files("redheart.data").joinpath("corpus", "everyday.json")))


def read(file: Path) -> Iterator[Row]:
    for number, raw in read_records(file, NAME):
        yield f"{file.name}: record {number}", raw
