"""Whose files the --out of `prepare` and `dedup` holds: claimed by name before anything is written there (owned.py)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from redheart.data.shards import INDEX, content_digest
from redheart.data.store import Store, verify_shard
from redheart.files import read_text
from redheart.owned import adopt, disown_others, own, owned, remove
from redheart.schema import SPLITS, RedHeartError

KIND = "data"
CARD, REJECTED, WORK = "README.md", "rejected.jsonl", "work"


def claim(out: Path, shards: Iterable[str], rejected: bool = False) -> None:
    """Says that the names of a data directory with these shards are ours; RedHeartError where the user has one of them."""
    own(out, KIND, _names(shards, rejected))


def start_afresh(out: Path) -> None:
    """Removes unfinished work in `out`. A result that is there stays until the new one is ready to take its place (`make_room`)."""
    ours = written(out)
    if ours and not owned(out, KIND):
        adopt(out, KIND, ours)  # a copy without its marker
    if WORK in ours:
        remove(out / WORK)


def make_room(out: Path, shards: Iterable[str]) -> None:
    """Removes the result of an earlier preparation from `out`, and nothing else, before these shards are written."""
    ours = [name for name in written(out) if name not in (WORK, REJECTED)]
    for name in sorted(ours, key=lambda n: n != INDEX):  # the index goes first: without it the rest is unfinished work
        remove(out / name)
    disown_others(out, KIND, _names(shards, rejected=True))


def _names(shards: Iterable[str], rejected: bool) -> list[str]:
    files = [INDEX, CARD, *([REJECTED] if rejected else []), *shards]
    return [*files, *(f"{name}.tmp" for name in files), WORK]


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
