"""Whose files the --out of `prepare` and `dedup` holds: claimed by name before anything is written there (owned.py)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from redheart.data.shards import INDEX, content_digest
from redheart.data.store import Store, verify_shard
from redheart.files import read_text
from redheart.owned import own, owned, remove, remove_owned
from redheart.schema import SPLITS, RedHeartError

KIND = "data"
CARD, REJECTED, WORK = "README.md", "rejected.jsonl", "work"


def claim(out: Path, shards: Iterable[str], rejected: bool = False) -> None:
    """Says that the names of a data directory with these shards are ours; RedHeartError where the user has one of them."""
    files = [INDEX, CARD, *([REJECTED] if rejected else []), *shards]
    own(out, KIND, [*files, *(f"{name}.tmp" for name in files), WORK])


def clear(out: Path) -> None:
    """Removes what earlier preparations wrote into `out`, and nothing else."""
    ours = written(out)
    for name in sorted(ours, key=lambda n: n != INDEX):  # the index goes first: without it the rest is unfinished work
        remove(out / name)
    remove_owned(out, KIND)


def written(out: Path) -> list[str]:
    """The names in `out` that we wrote: by its marker or, in a copy without one, those whose content is what its index says."""
    marked = [name for name in owned(out, KIND) if os.path.lexists(out / name)]
    if marked or not (out / INDEX).is_file():
        return marked
    try:
        store = Store(out)
    except RedHeartError:
        return []  # an index.json that we did not write, or not this version of us
    ours = [INDEX]
    for entry in (e for s in SPLITS for e in store.shards(s)):
        try:
            verify_shard(out / entry["file"], entry)
        except RedHeartError:
            continue
        ours.append(entry["file"])
    if (out / CARD).is_file() and f"content {content_digest(store.index)[:16]}" in read_text(
        out / CARD, "name another --out"
    ):
        ours.append(CARD)
    return ours


def refuse_sources_of_ours(sources: Sequence[str], out: Path) -> None:
    """A source that prepare wrote itself, such as a mended rejected.jsonl, would be replaced by what is made of it."""
    names = written(out)
    for spec in sources:
        name, _, given = spec.partition("=")
        path = Path(given).resolve()
        inside = path.relative_to(out.resolve()).parts if path.is_relative_to(out.resolve()) else ()
        if given and inside and inside[0] in names:
            raise RedHeartError(
                f"source {name}: {given} was written by `redheart prepare --out {out}` and would be replaced: copy it to another place"
            )
