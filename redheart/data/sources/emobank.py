"""EmoBank (Buechel and Hahn 2017): 10k sentences rated for valence, arousal and dominance, 1 to 5. CC BY-SA 4.0.

Reads PATH/emobank.csv. Feeds `vad`, (x - 3) / 2 in [-1, 1], writer's and reader's ratings averaged as published.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from redheart.data.sources.records import InvalidRecord
from redheart.data.sources.rows import Row, choice, need, number, table
from redheart.schema import SPLITS


def read(path: Path) -> Iterator[Row]:
    for place, row in table(need(path / "emobank.csv", f"emobank={path}"), ("split", "V", "A", "D", "text")):
        if isinstance(row, InvalidRecord):
            yield place, row
            continue
        split = choice(row["split"], SPLITS, place, "split")
        vad = [number(row[c], 1, 5, place, c) for c in "VAD"]
        wrong = [x for x in (split, *vad) if isinstance(x, InvalidRecord)]
        record = {
            "text": row["text"],
            "split": split,
            "vad": [(x - 3) / 2 for x in vad if not isinstance(x, InvalidRecord)],
        }
        yield place, wrong[0] if wrong else record
