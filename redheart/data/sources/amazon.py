"""Amazon Multilingual Counterfactual Dataset (O'Neill et al. 2021), its English parts. CC BY-NC 4.0: read only when it is named.

Reads PATH/data/{EN,EN-ext}_{train,valid,test}.tsv. Feeds `counterfactual`. The sentences are quoted as in a CSV.
EN-ext holds nearly all of EN again under other splits, as published: more than half of the dev and test sentences are in training too, so
that a score on them, with both parts in training, says little about new sentences.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from redheart.data.sources.rows import Row, choice, converted, need, table


def read(path: Path) -> Iterator[Row]:
    root = path / "data" if (path / "data").is_dir() else path
    for part in ("EN", "EN-ext"):
        for split, name in (("train", "train"), ("dev", "valid"), ("test", "test")):
            file = need(root / f"{part}_{name}.tsv", f"amazon_counterfactual={path}")
            rows = table(file, ("sentence", "is_counterfactual"), delimiter="\t")
            yield from converted(rows, partial(_record, split))


def _record(split: str, row: dict[str, str], place: str) -> dict[str, Any]:
    label = choice(row["is_counterfactual"], ("0", "1"), place, "is_counterfactual")
    return {"text": row["sentence"], "counterfactual": float(label), "split": split}
