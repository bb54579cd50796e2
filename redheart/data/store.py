"""Where prepared data lie: a local directory, or any URL that fsspec knows (http, s3, gs, hf …).

A shard is handed out as a local file that was verified against the index. A remote one is fetched whole into the cache
($XDG_CACHE_HOME/redheart/shards, named by its sha256, the oldest removed beyond `remote_cache_gib`); a stalled, failing or
cut transfer is tried again with growing pauses, then ends with an error that names the shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redheart.caches import cache_directory, writable
from redheart.config import RemoteConfig
from redheart.console import console
from redheart.data.shards import FORMAT_VERSION, INDEX, check_index
from redheart.files import check_name, check_sealed_json, read_json, sha256_of
from redheart.schema import SPLITS, PassingError, RedHeartError

BLOCK = 1 << 20


class Store:
    """A data directory, local or remote; `index` is its index, checked for its version."""

    def __init__(self, location: str | Path, remote: RemoteConfig | None = None):
        self.location = str(location).rstrip("/")
        self.is_remote = "://" in self.location
        self.settings = remote or RemoteConfig()
        self._filesystem: Any = None
        self._root = ""
        if not self.is_remote:
            check_name(self.location, "data directory")
        else:
            self._filesystem, self._root = _open_filesystem(self.location, self.settings)
        self.index: dict[str, Any] = self._read_index()

    def shards(self, split: str) -> list[dict[str, Any]]:
        """The index entries of a split's shards."""
        if split not in SPLITS:
            raise RedHeartError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        return self.index["splits"].get(split, {"shards": []})["shards"]

    def fetch(self, entry: Mapping[str, Any]) -> Path:
        """The verified local file of a shard."""
        if not self.is_remote:
            path = Path(self.location) / entry["file"]
            verify_shard(path, entry)
            return path
        path = cache_directory() / "shards" / f"{entry['sha256']}.arrow"
        if path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]:
            os.utime(path)
            return path
        writable(path.parent)
        self._retry(f"shard {entry['file']}", lambda: self._download(entry, path))
        self._shrink_cache(path)
        return path

    def _read_index(self) -> dict[str, Any]:
        where = f"{self.location}/{INDEX}"
        if self.is_remote:
            content = self._retry(INDEX, lambda: self._filesystem.cat_file(f"{self._root}/{INDEX}"))
            try:
                index = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise RedHeartError(f"{where} is not valid JSON ({error}): is this a data directory?") from None
        else:
            if Path(self.location).is_file():
                raise RedHeartError(
                    f"{self.location} is a file, and what is wanted is a directory made from it: run `redheart prepare --source "
                    f"{shlex.quote(f'NAME={self.location}')} --out DIR` and give that DIR"
                )
            index = read_json(
                Path(where), f"run `redheart prepare --source NAME=PATH --out {shlex.quote(self.location)}` first"
            )
        if not isinstance(index, dict) or index.get("version") != FORMAT_VERSION:
            version = index.get("version") if isinstance(index, dict) else None
            raise RedHeartError(
                f"{where} has version {version}, this program reads {FORMAT_VERSION}: prepare the data again"
            )
        check_index(check_sealed_json(index, where, "prepare the data again"), where)
        return index

    def _download(self, entry: Mapping[str, Any], path: Path) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        digest = hashlib.sha256()
        try:
            with self._filesystem.open(f"{self._root}/{entry['file']}", "rb", block_size=0) as source:
                with temporary.open("wb") as target:
                    while block := source.read(BLOCK):
                        digest.update(block)
                        target.write(block)
                if digest.hexdigest() != entry["sha256"]:
                    size = temporary.stat().st_size
                    raise OSError(f"{size} bytes with another sha256 than the index says ({entry['bytes']} bytes)")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _retry(self, what: str, action: Any) -> Any:
        """`action()`, tried `attempts` times with pauses of 0.5, 1, 2 … s; the last failure names `what`."""
        for attempt in range(1, self.settings.attempts + 1):
            try:
                return action()
            except Exception as error:  # fsspec's file systems raise many kinds; the last one is reported
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                if attempt == self.settings.attempts:
                    raise PassingError(
                        f"{what} of {self.location} cannot be read after {attempt} attempts ({reason}): check the "
                        "store and the network, then go on with --resume"
                    ) from error
                pause = 0.5 * 2 ** (attempt - 1)
                console.print(f"{what}: {reason}; attempt {attempt + 1} in {pause:g} s")
                time.sleep(pause)
        raise AssertionError

    def _shrink_cache(self, newest: Path) -> None:
        """Removes the files used longest ago beyond the limit. A file that is still mapped stays readable until it is closed."""
        files = sorted(newest.parent.glob("*.arrow"), key=lambda p: p.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > self.settings.cache_gib * 2**30 and path != newest:
                path.unlink(missing_ok=True)


def verify_shard(path: Path, entry: Mapping[str, Any]) -> None:
    """Raises RedHeartError, naming the shard, unless the file is what the index says."""
    if not path.is_file():
        raise RedHeartError(f"shard {path} is missing although {INDEX} names it: prepare the data again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise RedHeartError(
            f"shard {path} is damaged ({size} bytes, {INDEX} says {entry['bytes']}): prepare the data again"
        )
    if sha256_of(path) != entry["sha256"]:
        raise RedHeartError(f"shard {path} is damaged (its sha256 differs from {INDEX}): prepare the data again")


def _open_filesystem(location: str, settings: RemoteConfig) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    if location.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.timeout_s, sock_read=settings.timeout_s)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        return fsspec.core.url_to_fs(location, **options)
    except (ImportError, ValueError) as error:
        raise RedHeartError(f"{location}: {error}") from error
