"""EmoBank (Buechel and Hahn 2017): 10k sentences rated for valence, arousal and dominance, 1 to 5. CC BY-SA 4.0.

Reads PATH/emobank.csv. Feeds `vad`, (x - 3) / 2 in [-1, 1], writer's and reader's ratings averaged as published.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redheart.data.sources.rows import Row, choice, converted, need, number, table
from redheart.schema import SPLITS


def read(path: Path) -> Iterator[Row]:
    rows = table(need(path / "emobank.csv", f"emobank={path}"), ("split", "V", "A", "D", "text"))
    yield from converted(rows, _record)


def _record(row: dict[str, str], place: str) -> dict[str, Any]:
    split = choice(row["split"], SPLITS, place, "split")
    return {"text": row["text"], "split": split, "vad": [(number(row[c], 1, 5, place, c) - 3) / 2 for c in "VAD"]}
