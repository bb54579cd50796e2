"""GoEmotions (Demszky et al. 2020): 54k Reddit comments with 27 emotions and neutral, several per text. Apache-2.0.

Reads PATH/ekman/{train,dev,test}.tsv (7 classes) and PATH/original/… (28 classes), aligned by line and id; one of them is enough.
Feeds `emotion` (ours orders the seven otherwise), `emotion_fine`, and `regret`: 1 where an annotator chose remorse, else 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from redheart.data.sources.records import InvalidRecord
from redheart.data.sources.rows import Row, converted, label_ids, need, tsv
from redheart.schema import EMOTIONS, EMOTIONS_FINE, SPLITS, RedHeartError

EKMAN = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")  # the order of ekman/labels.txt
Both = tuple[tuple[str, list[str] | InvalidRecord] | None, ...]  # a line of each file: (place, cells)


def read(path: Path) -> Iterator[Row]:
    kinds = [k for k in ("ekman", "original") if (path / k).is_dir()]
    if not kinds:
        raise RedHeartError(
            f"goemotions={path}: neither ekman/train.tsv nor original/train.tsv is there; dev.tsv and test.tsv belong beside it"
        )
    for split in SPLITS:
        files = [tsv(need(path / k / f"{split}.tsv", f"goemotions={path}"), 3) for k in kinds]
        aligned = ((next(row[0] for row in both if row), both) for both in zip_longest(*files))
        yield from converted(aligned, partial(_record, kinds, split))


def _record(kinds: list[str], split: str, both: Both, place: str) -> dict[str, Any]:
    record: dict[str, Any] = {"split": split}
    seen = set()
    for kind, row in zip(kinds, both, strict=True):
        if row is None:
            raise InvalidRecord(f"{place}: ekman and original have different numbers of rows")
        if isinstance(row[1], InvalidRecord):
            raise row[1]
        text, ids, name = row[1]
        seen.add((text, name))
        names = EKMAN if kind == "ekman" else EMOTIONS_FINE
        chosen = {names[i] for i in label_ids(ids, len(names), place)}
        record["text"] = text
        if kind == "ekman":
            record["emotion"] = [float(e in chosen) for e in EMOTIONS]
        else:
            record["emotion_fine"] = [float(e in chosen) for e in EMOTIONS_FINE]
            record["regret"] = float("remorse" in chosen)
    if len(seen) > 1:
        raise InvalidRecord(f"{place}: ekman and original are not aligned (texts or ids differ)")
    return record
