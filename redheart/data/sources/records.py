"""Records of the user: a JSON list (`processed_dataset.json`) or JSON lines, in the schema of DESIGN §3.

A record is {"text" or "content": …, "emotion" or "label": …, further labels …}. A vector may be a list in the order of
schema.py (null entries allowed), a mapping from names, or, for the emotion, one name (1 for it, 0 for the others).
`label_origin` is one word for the whole record or a mapping; without it the labels count as human annotations.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redheart.schema import LABELS, ORIGINS, SPLITS, RedHeartError

MAX_CHARACTERS = 20_000
ALIASES = {"content": "text", "label": "emotion"}
SPLIT_NAMES = {
    "train": "train", "training": "train", "validation": "dev", "valid": "dev", "val": "dev", "dev": "dev", "test": "test",
    "testing": "test",
}  # fmt: skip
FIELDS = {"id", "source", "split", "lang", "text", "contrast_text", "label_origin", *LABELS}


class InvalidRecord(RedHeartError):
    """One record that breaks the schema: its place, field and reason."""


@dataclass(frozen=True)
class LeftOut:
    """A row that the source holds and the project has no use for; counted under its reason, never an error."""

    reason: str


EMPTY = LeftOut("an empty line")
ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# a first line that tells a spreadsheet what parts the columns
SEPARATOR = re.compile(r'"?sep=([,;|\t])"?(?=[\r\n]|\Z)')


def encoding_of(path: Path) -> str:
    """utf-8-sig, or what the file's first bytes say: spreadsheets write UTF-16 with a mark in front."""
    with path.open("rb") as file:
        start = file.read(4)
    return next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), "utf-8-sig")


def read_records(path: Path, source: str) -> Iterator[tuple[str, Any]]:
    """(place, raw record) of a .json list or a .jsonl file; an unreadable file is an error that names it."""
    if not path.is_file():
        raise RedHeartError(f"source {source}: {path} does not exist: give a .json or .jsonl file")
    encoding = encoding_of(path)
    if path.suffix.lower() == ".jsonl" and encoding == "utf-8-sig":
        with path.open("rb") as file:  # lines end at \n alone: a text may hold other separators, such as U+2028
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", _json_line(line, f"{path}:{number}") if line.strip() else EMPTY
        return
    try:
        content = path.read_bytes().decode(encoding)
        if path.suffix.lower() == ".jsonl":
            for number, text in enumerate(content.removesuffix("\n").split("\n"), start=1):
                yield f"{path}:{number}", _json_line(text.encode(), f"{path}:{number}") if text.strip() else EMPTY
            return
        records = _json(content)
    except UnicodeDecodeError as error:
        raise RedHeartError(
            f"source {source}: {path} is not {encoding.removesuffix('-sig').upper()} ({error}): convert it first"
        ) from None
    except (ValueError, RecursionError) as error:
        hint = ": where each line is a record, call it .jsonl" if str(error).startswith("Extra data") else ""
        raise RedHeartError(f"source {source}: {path} is not valid JSON ({error}){hint}") from None
    if not isinstance(records, list):
        raise RedHeartError(f"source {source}: {path} must hold a list of records, it holds a {type(records).__name__}")
    yield from ((f"{path}: record {number}", record) for number, record in enumerate(records))


def _json(text: str) -> Any:
    """The value of a JSON text; a name that an object gives twice is an error, since one of its values would be lost."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return InvalidRecord(f"{twice!r} is given twice: keep one")
    return unique


def _json_line(line: bytes, where: str) -> Any:
    try:
        return _json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return InvalidRecord(f"{where}: not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError of its own
        return InvalidRecord(f"{where}: not valid JSON ({error})")


def parse_record(raw: Any, where: str, source: str) -> dict[str, Any]:
    """A raw record -> the fields of DESIGN §3 without features. Raises InvalidRecord with `where` and the field."""
    if isinstance(raw, InvalidRecord):
        raise raw if str(raw).startswith(where) else InvalidRecord(f"{where}: {raw}")
    if not isinstance(raw, dict):
        raise InvalidRecord(f"{where}: a record must be an object, it is a {type(raw).__name__}")
    given = {}
    for key, value in raw.items():
        name = ALIASES.get(key, key)
        if name not in FIELDS:
            raise InvalidRecord(
                f"{where}: unknown field {key!r}: the fields are text, contrast_text, {', '.join(LABELS)}; for other names "
                f"give --text and --label (`train`), or data.columns: {{{source}: {{their column: our field}}}}"
            )
        if name in given:
            raise InvalidRecord(f"{where}: {key!r} and its alias are both given: keep one")
        given[name] = value
    text = _text(given.get("text"), f"{where}, field text")
    contrast = given.get("contrast_text")
    if contrast is not None:
        contrast = _text(contrast, f"{where}, field contrast_text")
    record: dict[str, Any] = {"text": text, "contrast_text": contrast, "source": source}
    record["lang"] = _word(given.get("lang", "en"), f"{where}, field lang")
    identity = f"{source}\0{text}\0{contrast or ''}".encode()
    record["id"] = _word(given.get("id") or hashlib.sha256(identity).hexdigest()[:20], f"{where}, field id")
    split = given.get("split")
    if split is not None and our_split(split) is None:
        raise InvalidRecord(f"{where}, field split: {split!r} is none of {', '.join(SPLITS)}")
    record["split"] = _split_of(record["id"]) if split is None else our_split(split)
    for name in LABELS:
        value = given.get(name)
        record[name] = None if value is None else _label(name, value, f"{where}, field {name}")
    if record["preference"] is not None and contrast is None:
        raise InvalidRecord(
            f"{where}, field preference: it compares two texts, and contrast_text is missing: name the column of the "
            "other text, as in --label other=contrast_text (`train`), or data.columns"
        )
    record["label_origin"] = _origins(given.get("label_origin", "human"), record, where)
    return record


def normalised(text: str) -> str:
    """A text as it is compared: case folded, white space collapsed."""
    return " ".join(text.casefold().split())


def our_split(name: object) -> str | None:
    """Which of SPLITS others mean by a split's name, by its first word: `validation_matched` and `Val` are dev; None: nobody knows."""
    return SPLIT_NAMES.get(re.split(r"[^a-z]", name.lower())[0]) if isinstance(name, str) else None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRecord(f"{where}: it must be a text that is not empty")
    if len(value) > MAX_CHARACTERS:
        raise InvalidRecord(f"{where}: {len(value)} characters, at most {MAX_CHARACTERS}: cut it into passages")
    return _encodable(value.strip(), where)


def _word(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRecord(f"{where}: {value!r} is not a word")
    return _encodable(value, where)


def _encodable(value: str, where: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and cannot be hashed or written."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRecord(f"{where}: half a surrogate pair at character {error.start}") from None
    if "\0" in value:
        raise InvalidRecord(
            f"{where}: a NUL at character {value.index(chr(0))}: is the file damaged, or UTF-16 without its mark?"
        )
    return value


def _split_of(identity: str) -> str:
    """80 % train, 10 % dev, 10 % test, by the id alone; rows of one text are brought together later (data/gather.py)."""
    bucket = int(hashlib.sha256(identity.encode()).hexdigest()[:8], 16) % 10
    return "dev" if bucket == 8 else "test" if bucket == 9 else "train"


def _label(name: str, value: Any, where: str) -> Any:
    label = LABELS[name]
    if label.scalar:
        return _number(value, label, where)
    if isinstance(value, str) and name == "emotion":
        value = {**dict.fromkeys(label.names, 0.0), value: 1.0}
    if isinstance(value, dict):
        unknown = [k for k in value if k not in label.names]
        if unknown:
            raise InvalidRecord(f"{where}: {unknown[0]!r} is none of {', '.join(label.names)}")
        value = [value.get(n) for n in label.names]
    if not isinstance(value, list) or len(value) != label.size:
        raise InvalidRecord(f"{where}: it must be a list of {label.size} numbers ({', '.join(label.names)})")
    numbers = [None if v is None else _number(v, label, f"{where}[{i}]") for i, v in enumerate(value)]
    if all(v is None for v in numbers):
        return None  # as if it were not given, so that the LLM may be asked
    if label.simplex and None not in numbers[: label.simplex]:
        total = sum(v for v in numbers[: label.simplex] if v is not None)
        if abs(total - 1) > 1e-3:
            raise InvalidRecord(f"{where}: the first {label.simplex} numbers must sum to 1, they sum to {total:g}")
    return numbers


def _number(value: Any, label: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRecord(f"{where}: {value!r} is not a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRecord(f"{where}: {value!r} is not a number")
    if not label.low <= value <= label.high or (label.binary and value not in (label.low, label.high)):
        legal = f"{label.low:g} or {label.high:g}" if label.binary else f"between {label.low:g} and {label.high:g}"
        raise InvalidRecord(f"{where}: {value!r} must be {legal}")
    return float(value)


def _origins(value: Any, record: dict[str, Any], where: str) -> dict[str, str | None]:
    named = dict.fromkeys(LABELS, value) if isinstance(value, str) else value
    if not isinstance(named, dict) or any(
        n not in LABELS or o not in ORIGINS for n, o in named.items() if o is not None
    ):
        raise InvalidRecord(f"{where}, field label_origin: use one of {', '.join(ORIGINS)}, for all or by label")
    return {n: (named.get(n) or "human") if record[n] is not None else None for n in LABELS}
