"""What the processes of one run ask each other. On a single process every function is a no-op."""

from __future__ import annotations

from collections.abc import Sequence


def _group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if _group() else 0


def world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if _group() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if _group():
        import torch.distributed as dist

        dist.barrier()


def sum_over_ranks(values: Sequence[float], device: str = "cpu") -> list[float]:
    """Element-wise sums over all ranks, in float64. Collective: every rank calls it with as many values."""
    if not _group():
        return [float(v) for v in values]
    import torch
    import torch.distributed as dist

    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def launched_world_size() -> int:
    """The number of processes the launcher started, before any process group exists (1 without a launcher)."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's number as the launcher gave it, before any process group exists (0 without a launcher)."""
    import os

    return int(os.environ.get("RANK", "0"))
