"""What the processes of one run, on whatever nodes, have to agree about before the first step.

All ranks write one checkpoint together (train/checkpoint.py): the run directory has to be the same directory for all of them.
The order of samples is computed by each rank for itself: they need the same data and the same configuration.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from redheart.config import RunConfig, dump_config
from redheart.files import write_text
from redheart.ranks import any_rank, barrier, gathered, is_main, rank, world_size
from redheart.schema import RedHeartError


def agree(run: Path, config: RunConfig, index: Mapping[str, Any], source: Path | None) -> None:
    """Raises RedHeartError on every rank where they differ. Collective.

    `index`: of the data directory, with the sha256 of every shard; `source`: the checkpoint that the run goes on from.
    """
    if world_size() == 1:
        return
    _check_shared(run)
    _check_same(dump_config(config), "configuration: give every node the same preset and the same --set")
    _check_same(source.name if source else "", "checkpoint to go on from: start it again")
    content = hashlib.sha256(json.dumps(index["splits"], sort_keys=True, default=str).encode()).hexdigest()
    _check_same(content, "data: copy the directory that one node has to the others, or share it")


def _check_same(mine: str, what: str) -> None:
    if len(set(gathered(mine))) > 1:
        raise RedHeartError(f"the nodes of this run do not have the same {what}")


def _check_shared(run: Path) -> None:
    """Whether every rank sees a file that the main one just made."""
    from torch.distributed import broadcast_object_list

    name = [f".redheart-shared-{uuid4().hex}.tmp"]  # a new name: no network file system remembers that it is absent
    broadcast_object_list(name, src=0)
    marker = run / name[0]
    if is_main():
        write_text(marker, "")
    barrier()
    missing = not marker.exists()
    nobody_missing = not any_rank(missing)
    if is_main():
        marker.unlink()
    if nobody_missing:
        return
    here = f"; rank {rank()} on {socket.gethostname()} does not see what rank 0 wrote there" if missing else ""
    raise RedHeartError(
        f"the run directory {run.absolute()} is not the same on all nodes{here}: all ranks write each checkpoint together, so --out "
        "has to lie on storage that every node has mounted (NFS, Lustre …)"
    )
