"""Social Chemistry 101 (Forbes et al. 2020), the rules of thumb derived by Kiehne et al. (2022). CC BY-SA 4.0.

Reads PATH/obligatory_sc101.csv and PATH/optional_sc101.csv. Feeds `acceptability` of the action: the moral judgment from -2 (very bad)
to 2 (very good), (x + 2) / 4. The derived files hold training rows only: by hash of the situation a tenth becomes dev and a tenth test.
They also hold only judgments of 0, 1 and 2, so that acceptability lies in [0.5, 1]: this corpus alone teaches nothing about what is bad.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redheart.data.sources.rows import Row, choice, converted, need, number, table, tenth

COLUMNS = ("split", "action", "action-moral-judgment", "situation-short-id")
SPLITS = {"train": "train", "dev": "dev", "dev-extra": "dev", "test": "test", "test-extra": "test"}


def read(path: Path) -> Iterator[Row]:
    for name in ("obligatory_sc101.csv", "optional_sc101.csv"):
        yield from converted(table(need(path / name, f"social_chem={path}"), COLUMNS), _record)


def _record(row: dict[str, str], place: str) -> dict[str, Any]:
    split = choice(row["split"], tuple(SPLITS), place, "split")
    judgment = number(row["action-moral-judgment"], -2, 2, place, "action-moral-judgment")
    share = {0: "dev", 1: "test"}.get(tenth(row["situation-short-id"]), "train")
    ours = share if split == "train" else SPLITS[split]
    return {"text": row["action"], "acceptability": (judgment + 2) / 4, "split": ours}
