"""ETHICS (Hendrycks et al. 2021): utilitarianism, deontology, virtue, justice and commonsense morality. MIT.

PATH holds the five folders; those that are there are read, each whole. Only train and test are published: a tenth of the training groups
(rows about one situation, see `_group`) becomes dev. Feeds
    utilitarianism  text, contrast_text, preference; the file lists the more pleasant scenario first, a coin by hash swaps the sides
    deontology      ethics.deontological: is the excuse or duty reasonable; text = scenario and excuse
    justice         ethics.justice: is the reason fair
    virtue          ethics.virtue: does the trait show; text = "scenario (trait: NAME)"
    commonsense     acceptability (1 - label), test only; the ambiguous texts, on which people disagree, have no label and are left out
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from redheart.data.sources.records import InvalidRecord
from redheart.data.sources.rows import LeftOut, Row, choice, coin, converted, dev_of_train, need, table
from redheart.schema import ETHICS, RedHeartError

SEPARATOR = " [SEP] "
AMBIGUOUS = "people disagree on it by design: no label"


def read(path: Path) -> Iterator[Row]:
    parts = [name for name in READERS if (path / name).is_dir()]
    if not parts:
        raise RedHeartError(f"ethics={path}: none of {', '.join(READERS)} is there")
    for name in parts:
        yield from READERS[name](path / name)


def _utilitarianism(split: str, row: dict[str, str], place: str) -> dict[str, Any]:
    better, worse = row["0"], row["1"]
    first = coin(better + worse)
    text, contrast = (better, worse) if first else (worse, better)
    return {
        "text": text, "contrast_text": contrast, "preference": float(first), "split": _split(split, _first_words(better)),
    }  # fmt: skip


def _theory(
    file: str, entry: str, columns: tuple[str, ...], text_of: Callable[[dict[str, str]], str], group_of: Callable[[dict[str, str]], str]
) -> Callable[[Path], Iterator[Row]]:  # fmt: skip
    def labelled(split: str, row: dict[str, str], place: str) -> dict[str, Any]:
        label = choice(row["label"], ("0", "1"), place, "label")
        empty = [c for c in columns if not row[c].strip()]
        if empty:
            raise InvalidRecord(f"{place}: {empty[0]} is empty")
        if file == "virtue" and SEPARATOR not in row["scenario"]:
            raise InvalidRecord(f"{place}: {SEPARATOR.strip()} and the trait are missing")
        ethics = [float(label) if name == entry else None for name in ETHICS]
        return {"text": text_of(row), "ethics": ethics, "split": _split(split, group_of(row))}

    return partial(_both_splits, file, ("label", *columns), labelled)


def _both_splits(
    file: str, header: tuple[str, ...] | None, convert: Callable[[str, dict[str, str], str], dict[str, Any]], path: Path
) -> Iterator[Row]:
    for split in ("train", "test"):
        yield from converted(_rows(path / f"{file}_{split}.csv", header), partial(convert, split))


def _commonsense(path: Path) -> Iterator[Row]:
    yield from converted(_rows(path / "cm_test.csv", ("label", "input")), _acceptable)
    yield from converted(_rows(path / "cm_ambig.csv", None, columns=1), lambda row, place: LeftOut(AMBIGUOUS))


def _acceptable(row: dict[str, str], place: str) -> dict[str, Any]:
    label = choice(row["label"], ("0", "1"), place, "label")
    return {"text": row["input"], "acceptability": 1.0 - float(label), "split": "test"}


def _rows(
    path: Path, header: tuple[str, ...] | None, columns: int = 2
) -> Iterator[tuple[str, dict[str, str] | InvalidRecord]]:
    return table(need(path, f"ethics={path.parent.parent}"), header, columns=columns)


def _split(published: str, group: str) -> str:
    return "test" if published == "test" else dev_of_train(group)


def _trait(row: dict[str, str]) -> str:
    scenario, _, trait = row["scenario"].partition(SEPARATOR)
    return f"{scenario} (trait: {trait})"


def _first_words(text: str) -> str:
    return " ".join(text.lower().split()[:5])


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "utilitarianism": partial(_both_splits, "util", None, _utilitarianism),
    "deontology": _theory(
        "deontology", "deontological", ("scenario", "excuse"), lambda r: f"{r['scenario'].strip()} {r['excuse'].strip()}",
        lambda r: r["scenario"],
    ),
    "virtue": _theory("virtue", "virtue", ("scenario",), _trait, lambda r: r["scenario"].partition(SEPARATOR)[0]),
    "justice": _theory("justice", "justice", ("scenario",), lambda r: r["scenario"], lambda r: _first_words(r["scenario"])),
    "commonsense": _commonsense,
}  # fmt: skip
