"""The corpus that ships with the package: 360 short English texts written and labelled for this project (MIT).

Everyday decisions, conflicts, promises and losses, many on jeong 정, han 한 and chemyeon 체면; 101 are pairs. Emotion, culture,
regret, acceptability and preference are labelled by the author; the hedonic values are left to the LLM.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

NAME = "everyday"
LICENCE = "MIT (written for Red Heart)"


def path() -> Path:
    return Path(str(resources.files("redheart.data").joinpath("corpus", "everyday.json")))
