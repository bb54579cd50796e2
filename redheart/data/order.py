"""The order of samples, as pure index arithmetic (DESIGN §7): no buffer, no state, the same on every rank.

Position p is one integer that runs on through the epochs: sample(p) = permutation(seed, p // N)[p mod N]. Step s of a
run with global batch G uses positions [s·G, (s+1)·G); rank r takes its slice. A resume needs the step number alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from redheart.schema import RedHeartError


@lru_cache(maxsize=4)
def permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows 0 … num_rows - 1 in an epoch, int64 [num_rows]; a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


def positions(step: int, global_batch_size: int) -> np.ndarray:
    """The positions of a step, int64 [global_batch_size]."""
    return np.arange(step * global_batch_size, (step + 1) * global_batch_size)


def samples_at(where: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """The row numbers at some positions, int64, in the same order."""
    if num_rows <= 0:
        raise RedHeartError("the training split is empty: prepare more samples, or give some of them split 'train'")
    epochs, offsets = np.divmod(where, num_rows)
    return np.array([permutation(num_rows, seed, int(e))[o] for e, o in zip(epochs, offsets)], dtype=np.int64)


def global_batch(index: Mapping[str, Any], seed: int, step: int, global_batch_size: int) -> np.ndarray:
    """Row numbers in the training split of the samples of a step, the same on every rank. `index` is a data directory's."""
    return samples_at(positions(step, global_batch_size), index["splits"]["train"]["rows"], seed)


def rank_slice(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Rank r's contiguous part of a global batch, whose size must be divisible by the world size."""
    assert len(batch) % world_size == 0
    share = len(batch) // world_size
    return batch[rank * share : (rank + 1) * share]
