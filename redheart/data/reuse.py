"""Token features of texts that prepared directories hold already, so that data sets share what an encoder has read once.

A directory (or URL) serves where its encoder is the wanted one: the same name, revision and max_tokens. Of a single encoder it may hold
more hidden layers than are wanted, and they may stand in another order: the wanted ones are taken out of it. Shards are verified and stay
memory-mapped; a text is found by the hash of its bytes, whether it was a `text` or a `contrast_text`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from redheart.config import RemoteConfig
from redheart.console import console, progress
from redheart.data.shards import Shard, content_digest, open_shard
from redheart.data.store import Store
from redheart.schema import SPLITS, RedHeartError

SETTING = "data.features_from (--features-from)"


class KnownFeatures:
    """`of(text)` gives the features of a text, float16 [T, E], as the first of `directories` that holds it has them; None where none does.

    RedHeartError where a directory's encoder is not the one of `fingerprint` (data/fingerprint.py).
    """

    def __init__(self, directories: Sequence[str], fingerprint: Mapping[str, Any], remote: RemoteConfig):
        self._shards: list[tuple[Shard, np.ndarray | slice]] = []
        self._places: dict[bytes, tuple[int, int, bool]] = {}  # by text: shard, row, whether it is the contrast there
        self._asked = self._found = 0
        stores = [Store(directory, remote) for directory in directories]
        columns = [columns_of(store, fingerprint) for store in stores]
        entries = [(s, c, e) for s, c in zip(stores, columns, strict=True) for split in SPLITS for e in s.shards(split)]
        if not entries:
            return
        with progress("known features", len(entries)) as (bar, task):
            for store, chosen, entry in entries:
                self._add(open_shard(store.fetch(entry), store.index["encoder"]["width"]), chosen)
                bar.advance(task)

    def _add(self, shard: Shard, columns: np.ndarray | slice) -> None:
        number = len(self._shards)
        self._shards.append((shard, columns))
        for column, is_contrast in (("text", False), ("contrast_text", True)):
            for row, text in enumerate(shard.table[column].to_pylist()):
                if text is not None:
                    self._places.setdefault(_key(text), (number, row, is_contrast))

    def of(self, text: str) -> np.ndarray | None:
        self._asked += 1
        place = self._places.get(_key(text))
        if place is None:
            return None
        self._found += 1
        number, row, is_contrast = place
        shard, columns = self._shards[number]
        features = (shard.contrasts if is_contrast else shard.features)[row]
        assert features is not None  # a text that is there has features
        return features[:, columns]

    def tell(self) -> None:
        """How many texts were known, of those that were asked for."""
        if self._shards:
            console.print(f"features of {self._found} of {self._asked} texts were taken from {SETTING}")


def contents_of(directories: Sequence[str], remote: RemoteConfig) -> list[str]:
    """What identifies the content of every directory: one plan gives features with other last bits on another machine."""
    return [content_digest(Store(directory, remote).index) for directory in directories]


def refuse_itself(directories: Sequence[str], out: Path) -> None:
    """What is being made can hold nothing yet, and what lies there is removed for it."""
    for directory in directories:
        if Path(directory).resolve() == out.resolve():
            raise RedHeartError(f"{SETTING}: {directory} is --out itself: choose another --out")


def columns_of(store: Store, wanted: Mapping[str, Any]) -> np.ndarray | slice:
    """Which columns of the directory's features are what `wanted` would give, in its order."""
    theirs = store.index["encoder"]
    if theirs == wanted:
        return slice(None)
    same = all(theirs.get(key) == wanted[key] for key in ("name", "revision", "max_tokens"))
    several = "encoders" in theirs or "encoders" in wanted
    if several or not same or not set(wanted["layers"]) <= set(theirs["layers"]):
        had, want = (f"{e['name']}, layers {e['layers']}, max_tokens {e['max_tokens']}" for e in (theirs, wanted))
        raise RedHeartError(
            f"{SETTING}: {store.location} has features of another encoder: of {had}, and wanted are those of "
            + (want if had != want else "another version of it")
        )
    width = theirs["width"] // len(theirs["layers"])
    starts = [width * theirs["layers"].index(layer) for layer in wanted["layers"]]
    return np.concatenate([np.arange(start, start + width) for start in starts])


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
