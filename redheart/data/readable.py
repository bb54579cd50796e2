"""Whether a frozen encoder can read a text at all, told by its tokenizer alone.

Features are made of any text, but of one whose words the tokenizer does not know, or spells letter by letter, they say nothing:
opposite sentences get the same ones. Nothing here depends on what language somebody says a text is in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redheart.config import EncoderConfig
from redheart.console import quiet_libraries
from redheart.data.pretrained import encoder_path, naming_model
from redheart.schema import RedHeartError

# share of letters in pieces of two letters or more; GoEmotions under MiniLM: 0.95; Korean under it: 0, under e5: 0.82 and more
LEAST_COVERED = 0.2
FEWEST_LETTERS = 8  # of a text that is judged by that share
PLAIN = "Something wonderful happened yesterday afternoon"  # a tokenizer that spells this spells everything
AT_ONCE = 4096  # texts


@dataclass(frozen=True)
class Reading:
    """What the tokenizer makes of a text: its `tokens`, special ones included and before any cut, and why it cannot be read."""

    tokens: int
    reason: str = ""  # empty where it can be read


class Reader:
    """`Reader(tokenizer)(texts)` -> one Reading per text."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        names = [name or "" for name in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        if any(name.startswith("Ġ") for name in names):  # pieces of bytes, spelled in a code of its own
            names = [tokenizer.convert_tokens_to_string([name]) for name in names]
        special = np.isin(np.arange(len(names)), tokenizer.all_special_ids)
        unknown = np.arange(len(names)) == (-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id)
        word = np.array([any(c.isalnum() for c in name) for name in names]) & ~special
        letters = np.array([sum(map(_is_letter, name)) for name in names])
        syllables = np.array(
            [any("\uac00" <= c <= "\ud7a3" for c in name) for name in names]
        )  # of Hangul: two letters or three
        covered = np.where(((letters > 1) | syllables) & word, letters, 0)
        self._of_piece = np.stack([~special | unknown, unknown, word, covered]).astype(np.int64)
        self._spells = False
        self._spells = bool(self([PLAIN])[0].reason)

    def __call__(self, texts: Sequence[str]) -> list[Reading]:
        return [one for start in range(0, len(texts), AT_ONCE) for one in self._batch(texts[start : start + AT_ONCE])]

    def _batch(self, texts: Sequence[str]) -> list[Reading]:
        rows = self._tokenizer(list(texts), truncation=False, add_special_tokens=True, verbose=False)["input_ids"]
        row = np.repeat(np.arange(len(rows)), [len(ids) for ids in rows])
        ids = np.fromiter((i for ids in rows for i in ids), np.int64, len(row))
        counts = [np.bincount(row, kind, len(rows)).astype(int).tolist() for kind in self._of_piece[:, ids]]
        return [Reading(len(r), self._reason(t, *c)) for t, r, *c in zip(texts, rows, *counts, strict=True)]

    def _reason(self, text: str, pieces: int, unknown: int, words: int, covered: int) -> str:
        if not pieces:
            return "none of its characters are known"
        if unknown > words:
            return f"{unknown} of its {pieces} pieces are unknown"
        letters = sum(map(_is_letter, text))
        if letters >= FEWEST_LETTERS and covered < LEAST_COVERED * letters and not self._spells:
            return f"its {letters} letters become {pieces} pieces, spelled rather than read"
        return ""


def _is_letter(character: str) -> bool:
    """Of an alphabet. An ideograph is a word, or a part of one, by itself."""
    return character.isalpha() and not (
        "\u3400" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff" or character >= "\U00020000"
    )


def unreadable(records: Sequence[Mapping[str, Any]], config: EncoderConfig) -> dict[str, str]:
    """By id: why the encoder cannot read a record, that is its text or its contrast text."""
    reader = Reader(_tokenizer(config))
    reasons = {}
    for field in ("contrast_text", "text"):
        rows = [r for r in records if r[field] is not None]
        for record, reading in zip(rows, reader([r[field] for r in rows]), strict=True):
            if reading.reason:
                reasons[record["id"]] = reading.reason
    known = _known(config)
    for record in records:
        if record["lang"] not in config.reads:
            reasons[record["id"]] = f"its language is {record['lang']!r}, and data.encoder.languages names {known}"
    return reasons


def check_languages(records: Sequence[Mapping[str, Any]], config: EncoderConfig, sample: int = 1000) -> None:
    """Raises if records are in a language that the encoder was not made for; says how badly its tokenizer reads them."""
    foreign = Counter(r["lang"] for r in records if r["lang"] not in config.reads)
    if not foreign:
        return
    lang, count = foreign.most_common(1)[0]
    tokenizer = _tokenizer(config)
    texts = [r["text"] for r in records if r["lang"] == lang][:sample]
    pieces = [i for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in ids]
    unknown = sum(i == tokenizer.unk_token_id for i in pieces) / max(len(pieces), 1)
    raise RedHeartError(
        f"{count} records are in {lang!r}, which encoder {config.name} was not made for (data.encoder.languages: "
        f"{_known(config)}): {unknown:.1%} of their pieces are unknown to it, {len(pieces) / len(texts):.0f} pieces a "
        "text. Choose a multilingual encoder (--set data.encoder.name=package:e5-small-ko), or add the language there if it really reads it"
    )


def _known(config: EncoderConfig) -> str:
    few = config.reads[:8]
    return ", ".join(few) + (f" and {len(config.reads) - len(few)} more" if len(config.reads) > len(few) else "")


def _tokenizer(config: EncoderConfig) -> Any:
    from transformers import AutoTokenizer

    quiet_libraries()
    with naming_model(config.name):
        return AutoTokenizer.from_pretrained(encoder_path(config.name))
