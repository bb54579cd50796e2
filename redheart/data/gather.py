"""`--source NAME=PATH` -> validated records of the schema, with every source's licence and every rejected row's reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from redheart.config import DataConfig
from redheart.data.sources import everyday
from redheart.data.sources.records import InvalidRecord, parse_record, read_records
from redheart.files import write_text
from redheart.schema import SPLITS, RedHeartError


def gather(
    sources: Sequence[str], skip_invalid: bool, rejected_file: Path
) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """(records, licence per source, number rejected) of `NAME=PATH` sources; `everyday` alone names the shipped corpus.

    The first invalid record stops everything, or, with skip_invalid, is written to `rejected_file` with its reason.
    """
    records: dict[str, dict[str, Any]] = {}
    licences, rejected = {}, []
    for spec in sources:
        name, _, given = spec.partition("=")
        if not given and name != everyday.NAME:
            raise RedHeartError(f"--source {spec!r}: write it as NAME=PATH (only {everyday.NAME!r} needs no path)")
        path = everyday.path() if name == everyday.NAME and not given else Path(given)
        licences[name] = everyday.LICENCE if path == everyday.path() else "the user's own"
        for number, raw in read_records(path, name):
            try:
                record = parse_record(raw, f"{path}: record {number}", name)
                if record["id"] in records:
                    raise InvalidRecord(
                        f"{path}: record {number}: its id {record['id']} (or its text) is there already"
                    )
                records[record["id"]] = record
            except InvalidRecord as error:
                if not skip_invalid:
                    raise RedHeartError(f"{error} (--skip-invalid leaves such records out)") from None
                rejected.append(
                    {
                        "source": name,
                        "record": number,
                        "reason": str(error),
                        "content": raw if isinstance(raw, dict) else str(raw),
                    }
                )
    if rejected:
        write_text(rejected_file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected))
    if not records:
        raise RedHeartError(f"no record is left of {', '.join(sources)}: the data set is empty")
    return list(records.values()), licences, len(rejected)


def take(records: list[dict[str, Any]], num_samples: int | None) -> list[dict[str, Any]]:
    """The first `num_samples` records, splits kept in proportion; each split keeps at least one where there is room."""
    if num_samples is None or num_samples >= len(records):
        return records
    by_split = {s: [r for r in records if r["split"] == s] for s in SPLITS}
    quota = {s: num_samples * len(rows) // len(records) for s, rows in by_split.items()}
    if num_samples >= len(SPLITS):
        quota = {s: max(q, 1 if by_split[s] else 0) for s, q in quota.items()}
    quota["train"] = min(len(by_split["train"]), num_samples - quota["dev"] - quota["test"])
    return [r for s in SPLITS for r in by_split[s][: quota[s]]]


def check_languages(records: Iterable[dict[str, Any]], config: DataConfig) -> None:
    foreign = Counter(r["lang"] for r in records if r["lang"] not in config.encoder.languages)
    if foreign:
        lang, count = foreign.most_common(1)[0]
        raise RedHeartError(
            f"{count} records are in {lang!r}, which encoder {config.encoder.name} was not made for (data.encoder.languages = "
            f"{list(config.encoder.languages)}): choose a multilingual encoder, or add the language there if it really reads it"
        )
