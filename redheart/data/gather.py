"""`--source NAME=PATH` -> validated records of the schema, with every source's licence and every unused row's reason.

NAME=PATH is one of
    everyday                      the shipped corpus
    goemotions=DIRECTORY          a corpus of data/sources/catalogue.py, through its converter
    mine=FILE                     .json, .jsonl, .csv, .tsv or .parquet (data/sources/tabular.py)
    mine=hub:OWNER/NAME[:CONFIG]  a data set of the hub (data/sources/hub.py); `hub:` may be left out where no such path exists
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from redheart.config import DataConfig
from redheart.console import console
from redheart.data.sources import everyday, hub, tabular
from redheart.data.sources.catalogue import SOURCES
from redheart.data.sources.records import InvalidRecord, normalised, parse_record
from redheart.data.sources.rows import LeftOut
from redheart.files import check_name, write_text
from redheart.schema import LABELS, SPLITS, RedHeartError

ENOUGH = 10  # texts of dev and of test: where the ids give a small table fewer, its texts are dealt
FEW = 0.01  # share of a published corpus that may be unreadable without a word from the user
SKIP = "`redheart prepare --skip-invalid` leaves such records out, and `train --data` takes what it makes"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True)
class Gathered:
    """All records, and per source its licence, origin and counts: rows read, kept, rejected (broken) and left out, with reasons.

    rows_read = rows_kept + rows_rejected + the sum of left_out.
    """

    records: list[dict[str, Any]]
    sources: dict[str, dict[str, Any]]
    refused: list[dict[str, Any]]  # source, place, reason and content of each rejected row
    places: dict[str, str]  # where a record stands, by its id
    published: frozenset[str]  # sources that are not the user's own


@dataclass(frozen=True)
class _Opened:
    """A source about to be read. `rows` yields (place, raw record or why there is none)."""

    name: str
    origin: str  # the last part of the path, or the hub id
    licence: str
    rows: Iterator[tuple[str, Any]]
    lang: str = "en"
    non_commercial: bool = False
    may_repeat: bool = False  # published data hold a few texts more than once, and all of them are theirs


def gather(sources: Sequence[str], config: DataConfig, skip_invalid: bool) -> Gathered:
    """Reads the sources in turn; ids are unique over all of them, and the same in every call. Writes nothing.

    The first invalid record stops everything, or, with skip_invalid, is kept with its reason in `refused`.
    """
    tabular.check_columns(config.columns)
    opened = [_open(spec, config) for spec in sources]
    names = [source.name for source in opened]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise RedHeartError(f"--source {twice[0]} is given twice: give each source a name of its own")
    unknown = [name for name in config.columns if name not in names]
    if unknown:
        raise RedHeartError(f"data.columns names {unknown[0]!r}, and the sources are {', '.join(names)}")
    records: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    places: dict[str, str] = {}
    drawn: set[str] = set()
    facts = {source.name: _read(source, skip_invalid, records, refused, places, drawn) for source in opened}
    keep_together(records, drawn)
    count = Counter((record["source"], record["split"]) for record in records)
    for name, of in facts.items():
        of["splits"] = {split: count[name, split] for split in SPLITS}
    published = frozenset(source.name for source in opened if source.may_repeat)
    return _not_empty(Gathered(records, facts, refused, places, published))


def digest_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Of what was read, before anything is made of it: kept in the index as `read`."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def look_at(sources: Sequence[str], config: DataConfig) -> None:
    """Raises RedHeartError where a source is not what it should be, without reading a row."""
    for spec in sources:
        _open(spec, config)


def set_aside(
    gathered: Gathered, records: list[dict[str, Any]], reasons: Mapping[str, str], skip_invalid: bool, encoder: str
) -> tuple[Gathered, list[dict[str, Any]]]:
    """Rejects those of `records` that `encoder` cannot read, with the `reasons` by id; returns what was gathered and the others.

    Raises RedHeartError unless skip_invalid is given, or they are a few of a published corpus, which nobody can be asked to mend.
    """
    if not reasons:
        return gathered, records
    count = Counter(r["source"] for r in records)
    bad = Counter(r["source"] for r in records if r["id"] in reasons)
    facts = {name: dict(f) for name, f in gathered.sources.items()}
    refused = list(gathered.refused)
    for record in records:
        name, reason = record["source"], reasons.get(record["id"])
        if reason is None:
            continue
        of, place = facts[name], gathered.places[record["id"]]
        if not skip_invalid and (name not in gathered.published or bad[name] > FEW * count[name]):
            raise RedHeartError(
                f"source {name}: {bad[name]} of {count[name]} records cannot be read by encoder {encoder}, the first in {place}: {reason}. "
                f"Choose an encoder that reads them (--set data.encoder.name=…); {SKIP}"
            )
        why = f"encoder {encoder} cannot read it: {reason}"
        refused.append({"source": name, "place": place, "reason": f"{place}: {why}", "content": record["text"]})
        of["rows_kept"] -= 1
        of["rows_rejected"] += 1
        of["splits"] = {**of["splits"], record["split"]: of["splits"][record["split"]] - 1}
        of["rejected"] = {**of["rejected"], _kind(why, ""): of["rejected"].get(_kind(why, ""), 0) + 1}
    for name, number in bad.items():
        console.print(f"{number} of {count[name]} records of {name} are left out: encoder {encoder} cannot read them")
    left = [r for r in gathered.records if r["id"] not in reasons]
    rest = _not_empty(replace(gathered, records=left, sources=facts, refused=refused))
    return rest, [r for r in records if r["id"] not in reasons]


def write_rejected(refused: Sequence[Mapping[str, Any]], file: Path) -> None:
    """One JSON line per rejected row: source, place, reason, content."""
    lines = (json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in refused)
    # half a surrogate pair, which a refused record may hold, is written as the escape that JSON has for it
    write_text(file, "".join(lines).encode("utf-8", "backslashreplace").decode("utf-8"))
    console.print(f"{len(refused)} records rejected, with their reasons in {file}")


def _not_empty(gathered: Gathered) -> Gathered:
    empty = {name: facts for name, facts in gathered.sources.items() if not facts["rows_kept"]}
    if empty:
        reasons = Counter[str]()
        for facts in empty.values():
            reasons.update(facts["rejected"] | facts["left_out"])
        why = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        names = ", ".join(f"{name} ({facts['origin']})" for name, facts in empty.items())
        raise RedHeartError(f"no record is left of {names}: " + (why or "the data set is empty"))
    return gathered


def _read(
    source: _Opened,
    skip_invalid: bool,
    records: list[dict[str, Any]],
    refused: list[dict[str, Any]],
    places: dict[str, str],
    drawn: set[str],
) -> dict[str, Any]:
    """Appends a source's rows to `records` or `refused`, and to `drawn` the ids of those that came without a split; returns the facts
    about it, but for its splits."""
    left_out, reasons, occurrences = Counter[str](), Counter[str](), Counter[str]()
    own: list[dict[str, Any]] = []
    read, says_splits = 0, False
    for place, raw in _rows(source):
        read += 1
        if isinstance(raw, LeftOut):
            left_out[raw.reason] += 1
            continue
        try:
            record = parse_record({"lang": source.lang, **raw} if isinstance(raw, dict) else raw, place, source.name)
            if source.may_repeat:
                record["id"] = _distinct(record["id"], occurrences)
            if record["id"] in places:
                what = f"the id {record['id']!r}" if raw.get("id") else "the same text"
                raise InvalidRecord(f"{place}: {what} stands in {places[record['id']]} already")
        except InvalidRecord as error:
            if not skip_invalid:
                raise RedHeartError(f"{error} ({SKIP})") from None
            reasons[_kind(str(error), place)] += 1
            content = str(raw) if isinstance(raw, InvalidRecord) else raw
            refused.append({"source": source.name, "place": place, "reason": str(error), "content": content})
            continue
        if raw.get("split") is None:
            drawn.add(record["id"])
        else:
            says_splits = True
        places[record["id"]] = place
        own.append(record)
    if not source.may_repeat and not says_splits and own:
        keep_together(own, drawn)
        deal_few(own, source.name)
    records += own
    return {
        "origin": source.origin,
        "licence": source.licence,
        "non_commercial": source.non_commercial,
        "rows_read": read,
        "rows_kept": len(own),
        "rows_rejected": sum(reasons.values()),
        "rejected": dict(reasons),
        "left_out": dict(left_out),
    }


def keep_together(records: Sequence[dict[str, Any]], drawn: Set[str]) -> None:
    """Rows of one text, or of the same two in either order, share a split as far as it was `drawn`: the one that such a row was given,
    else that of the smallest id. A text that stands once keeps its own."""
    for rows in _by_text(records) if drawn else ():
        given = [row["split"] for row in rows if row["id"] not in drawn]
        split = min(given, key=SPLITS.index) if given else min(rows, key=lambda row: row["id"])["split"]
        for row in rows:
            if row["id"] in drawn:
                row["split"] = split


def _by_text(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(sorted(_texts(record))), []).append(record)
    return list(groups.values())


def _texts(record: Mapping[str, Any]) -> list[str]:
    return [normalised(text) for text in (record["text"], record["contrast_text"]) if text is not None]


def tell_crossing(records: Sequence[Mapping[str, Any]]) -> None:
    """Says how many texts stand in more than one split, where the data, or pairs that share one of their texts, have it so."""
    held: dict[str, set[str]] = {}
    for record in records:
        for text in _texts(record):
            held.setdefault(text, set()).add(record["split"])
    crossing = [(text, sorted(splits, key=SPLITS.index)) for text, splits in held.items() if len(splits) > 1]
    if crossing:
        text, splits = crossing[0]
        shown = text if len(text) <= 60 else text[:59] + "…"
        console.print(
            f"texts that stand in more than one split, which flatters what is measured: {len(crossing)}, such as {shown!r} in "
            f"{' and '.join(splits)}; --set data.dedup=true leaves such rows out, those of test apart"
        )


def deal_few(rows: list[dict[str, Any]], name: str) -> None:
    """Deals rows without splits where chance, by their ids, left dev or test fewer than ENOUGH texts: to each a sixth of the labelled
    texts, at most ENOUGH, spread over their labels, none of them the last that would train with what it says. Says so."""
    groups = _by_text(rows)
    count = Counter(group[0]["split"] for group in groups)
    if min(count["dev"], count["test"]) >= ENOUGH:
        return
    labelled = []
    for group in groups:
        if row := next((row for row in group if any(row[label] is not None for label in LABELS)), None):
            labelled.append((json.dumps([row[label] for label in LABELS]), _share(row["id"]), group))
    labelled.sort(key=lambda entry: entry[:2])
    each = min(ENOUGH, max(1, len(labelled) // 6)) if len(labelled) >= len(SPLITS) else 0
    for row in rows:
        row["split"] = "train"
    says = _says([group for *_, group in labelled])
    training = Counter(value for values in says for value in values)
    for number in range(each):
        stretch = list(range(number * len(labelled) // each, (number + 1) * len(labelled) // each))
        for split in ("dev", "test"):
            place = next((p for p in stretch if all(training[value] > 1 for value in says[p])), stretch[0])
            stretch.remove(place)
            training.subtract(says[place])
            for row in labelled[place][-1]:
                row["split"] = split
    dealt = Counter(row["split"] for row in rows)
    why = "" if each else f" ({len(labelled)} of them with a label): too few to choose a checkpoint by, or to judge it"
    console.print(
        f"{name} has no column `split`: {dealt['train']} rows in train"
        + (f", {dealt['dev']} in dev, {dealt['test']} in test" if each else why)
    )


def _says(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[set[tuple[str, int, float]]]:
    """(label, entry, value) of each group's labels; not of entries with about as many values as rows, which nothing can be kept of."""
    says = [
        {
            (name, entry, value)
            for row in group
            for name in LABELS
            for entry, value in enumerate(row[name] if isinstance(row[name], list) else [row[name]])
            if value is not None
        }
        for group in groups
    ]
    rows = Counter(key for values in says for key in {value[:2] for value in values})
    distinct = Counter(value[:2] for value in set().union(*says))
    return [{v for v in values if distinct[v[:2]] <= max(2, rows[v[:2]] // 2)} for values in says]


def _rows(source: _Opened) -> Iterator[tuple[str, Any]]:
    try:
        yield from source.rows
    except OSError as error:  # no permission, a broken disk
        file = error.filename or source.origin
        raise RedHeartError(f"source {source.name}: {file} cannot be read ({error.strerror or error})") from error


def mix(records: list[dict[str, Any]], mixture: Mapping[str, float]) -> list[dict[str, Any]]:
    """Drops training rows of the sources whose mixing weight is below 1: that share of them stays, chosen by the ids' hashes."""
    known = {r["source"] for r in records}
    unknown = [name for name in mixture if name not in known]
    if unknown:
        raise RedHeartError(f"data.mixture names {unknown[0]!r}, and the sources are {', '.join(sorted(known))}")
    return [r for r in records if r["split"] != "train" or _share(r["id"]) < mixture.get(r["source"], 1.0)]


def take(records: list[dict[str, Any]], num_samples: int | None) -> list[dict[str, Any]]:
    """`num_samples` records by the ids' hashes, splits in proportion, dev and test with at least one where there is room; what a split
    lacks the next one gives."""
    if num_samples is None or num_samples >= len(records):
        return records
    by_split = {s: sorted((r for r in records if r["split"] == s), key=lambda r: _share(r["id"])) for s in SPLITS}
    quota = {s: num_samples * len(rows) // len(records) for s, rows in by_split.items()}
    if num_samples >= len(SPLITS):
        quota = {s: max(q, 1 if by_split[s] else 0) for s, q in quota.items()}
    quota["train"] = 0
    for split, rows in by_split.items():
        quota[split] += min(len(rows) - quota[split], num_samples - sum(quota.values()))
    return [r for s in SPLITS for r in by_split[s][: quota[s]]]


def _open(spec: str, config: DataConfig) -> _Opened:
    """Decides what a `--source` is; nothing of it is read yet."""
    name, _, given = spec.partition("=")
    known = SOURCES.get(name)
    if not name or (not given and name != everyday.NAME):
        raise RedHeartError(
            f"--source {spec!r}: write it as NAME=PATH (only {everyday.NAME!r} needs no path; known: {', '.join(SOURCES)})"
        )
    if re.search(r"[\0-\x1f\x7f\ud800-\udfff]", name):
        raise RedHeartError(f"--source {spec!r}: the name of a source has nothing in it that cannot be shown")
    if "+" in name:
        raise RedHeartError(f"--source {spec!r}: a name has no '+', which marks rows that the LLM wrote (--augment)")
    path, columns = Path(given), config.columns.get(name, {})
    if known is not None and (not given or path.is_dir()):
        if columns:
            raise RedHeartError(f"data.columns.{name}: {name} has a converter: name the source otherwise to map it")
        rows = known.read(path if given else everyday.folder())
        origin = path.name if given else "shipped with redheart"
        return _Opened(name, origin, known.licence, rows, known.lang, known.non_commercial, known.published)
    looks_like_hub = (
        known is None and HUB_ID.fullmatch(given) is not None and path.suffix.lower() not in tabular.SUFFIXES
    )
    if given.startswith("hub:") or (looks_like_hub and not path.exists()):
        identity = given.removeprefix("hub:")
        if not identity:
            raise RedHeartError(f"--source {spec!r}: write it as NAME=hub:OWNER/NAME")
        rows = hub.read(identity, columns)
        barred = known is not None and known.non_commercial
        return _Opened(name, given, f"see the card of {identity}", rows, non_commercial=barred, may_repeat=True)
    files = f"a {', '.join(tabular.SUFFIXES[:-1])} or {tabular.SUFFIXES[-1]} file, or hub:OWNER/NAME"
    if path.is_dir():
        raise RedHeartError(
            f"source {name}: {given} is a directory, and only {', '.join(SOURCES)} are read from one: give {files}"
        )
    check_name(path, f"source {name}:")
    if not path.is_file():
        what = "the directory of the corpus" if known is not None else files
        raise RedHeartError(f"source {name}: {given} does not exist: give {what}")
    rows = tabular.read(path, name, columns)
    return _Opened(name, path.name, "the user's own", rows, config.encoder.reads[0] if config.encoder.reads else "en")


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
