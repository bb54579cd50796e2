"""`--source NAME=PATH` -> validated records of the schema, with every source's licence and every unused row's reason."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redheart.config import DataConfig
from redheart.console import console
from redheart.data.sources import everyday
from redheart.data.sources.catalogue import SOURCES
from redheart.data.sources.records import InvalidRecord, parse_record, read_records
from redheart.data.sources.rows import LeftOut
from redheart.data.sources.tabular import csv_rows, hub_rows, map_columns, parquet_rows
from redheart.files import write_text
from redheart.schema import SPLITS, RedHeartError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?$")


@dataclass
class Gathered:
    """All records, and per source its licence and counts: rows read, kept, rejected (broken) and left out, with reasons."""

    records: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejected: int = 0


def gather(sources: Sequence[str], config: DataConfig, skip_invalid: bool, rejected_file: Path) -> Gathered:
    """Reads `NAME=PATH` sources; `everyday` alone names the shipped corpus.

    The first invalid record stops everything, or, with skip_invalid, is written to `rejected_file` with its reason.
    """
    gathered, refused, ids = Gathered(), [], set[str]()
    for spec in sources:
        name, published, licence, rows = _open(spec)
        if name in gathered.sources:
            raise RedHeartError(f"--source {name} is given twice: give each source a name of its own")
        left_out, reasons, split_rows, occurrences = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        read = 0
        for place, raw in rows:
            read += 1
            if isinstance(raw, LeftOut):
                left_out[raw.reason] += 1
                continue
            try:
                record = parse_record(map_columns(raw, config.columns.get(name, {}), place), place, name)
                if published:  # published corpora hold a few texts more than once: all are theirs
                    record["id"] = _distinct(record["id"], occurrences)
                if record["id"] in ids:
                    raise InvalidRecord(f"{place}: its id {record['id']} (or its text) is there already")
                ids.add(record["id"])
                gathered.records.append(record)
                split_rows[record["split"]] += 1
            except InvalidRecord as error:
                if not skip_invalid:
                    raise RedHeartError(f"{error} (--skip-invalid leaves such records out)") from None
                reasons[_kind(str(error), place)] += 1
                content = raw if isinstance(raw, dict) else str(raw)
                refused.append({"source": name, "place": place, "reason": str(error), "content": content})
        gathered.sources[name] = {
            "licence": licence,
            "non_commercial": name in SOURCES and published and SOURCES[name].non_commercial,
            "rows_read": read,
            "rows_kept": sum(split_rows.values()),
            "splits": {s: split_rows[s] for s in SPLITS},
            "rejected": dict(reasons),
            "left_out": dict(left_out),
        }
    if refused:
        lines = (json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in refused)
        write_text(rejected_file, "".join(lines))
        console.print(f"{len(refused)} records rejected, with their reasons in {rejected_file}")
    gathered.rejected = len(refused)
    if not gathered.records:
        raise RedHeartError(f"no record is left of {', '.join(sources)}: the data set is empty")
    return gathered


def mix(records: list[dict[str, Any]], mixture: Mapping[str, float]) -> list[dict[str, Any]]:
    """Drops training rows of the sources whose mixing weight is below 1: that share of them stays, chosen by the ids' hashes."""
    known = {r["source"] for r in records}
    unknown = [name for name in mixture if name not in known]
    if unknown:
        raise RedHeartError(f"data.mixture names {unknown[0]!r}, and the sources are {', '.join(sorted(known))}")
    return [r for r in records if r["split"] != "train" or _share(r["id"]) < mixture.get(r["source"], 1.0)]


def take(records: list[dict[str, Any]], num_samples: int | None) -> list[dict[str, Any]]:
    """`num_samples` records, splits and sources in proportion, by the ids' hashes; each split keeps at least one where there is room."""
    if num_samples is None or num_samples >= len(records):
        return records
    by_split = {s: sorted((r for r in records if r["split"] == s), key=lambda r: _share(r["id"])) for s in SPLITS}
    quota = {s: num_samples * len(rows) // len(records) for s, rows in by_split.items()}
    if num_samples >= len(SPLITS):
        quota = {s: max(q, 1 if by_split[s] else 0) for s, q in quota.items()}
    quota["train"] = min(len(by_split["train"]), num_samples - quota["dev"] - quota["test"])
    return [r for s in SPLITS for r in by_split[s][: quota[s]]]


def _open(spec: str) -> tuple[str, bool, str, Iterator[tuple[str, Any]]]:
    """(name, is it a published corpus, licence, rows) of a `--source`."""
    name, _, given = spec.partition("=")
    if not given and name != everyday.NAME:
        known = ", ".join([everyday.NAME, *SOURCES])
        raise RedHeartError(
            f"--source {spec!r}: write it as NAME=PATH (only {everyday.NAME!r} needs no path; known: {known})"
        )
    if not given:
        return name, False, everyday.LICENCE, _records(everyday.path(), name)
    path, licence = Path(given), "the user's own"
    if name in SOURCES and path.is_dir():
        return name, True, SOURCES[name].licence, SOURCES[name].read(path)
    if given.startswith("hub:") or (not path.exists() and HUB_ID.match(given)):
        identity = given.removeprefix("hub:")
        return name, False, f"see the card of {identity}", hub_rows(identity)
    if not path.is_file():
        what = (
            "the directory of the corpus" if name in SOURCES else "a .json, .jsonl, .csv or .parquet file, or a hub id"
        )
        raise RedHeartError(f"source {name}: {given} does not exist: give {what}")
    if path.suffix == ".csv":
        return name, False, licence, csv_rows(path)
    if path.suffix == ".parquet":
        return name, False, licence, parquet_rows(path)
    return name, False, licence, _records(path, name)


def _records(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    return ((f"{path}: record {number}", raw) for number, raw in read_records(path, name))


def _distinct(identity: str, occurrences: Counter[str]) -> str:
    occurrences[identity] += 1
    if occurrences[identity] == 1:
        return identity
    return hashlib.sha256(f"{identity}\0{occurrences[identity]}".encode()).hexdigest()[:20]


def _share(identity: str) -> float:
    """A number in [0, 1) that is the id's own, apart from the one that chose its split."""
    return int(hashlib.sha256(f"share\0{identity}".encode()).hexdigest()[:8], 16) / 2**32


def _kind(message: str, place: str) -> str:
    """An error without its place and with its numbers blurred: what rejected rows are counted under."""
    return re.sub(r"\d+", "N", message.removeprefix(place).lstrip(":, "))[:120]
