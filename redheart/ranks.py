"""What the processes of one run ask each other. On a single process every function is a no-op.

Also how they run out of memory: together (`together`), so that all of them can do something about it.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from redheart.schema import PassingError, RedHeartError

T = TypeVar("T")


def _group() -> Any:
    """torch.distributed, where this process has a group with others; else None."""
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def launch_file() -> str | None:
    """The DeepSpeed file that `accelerate launch` was given, without its folder and ending; None without one."""
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    return None if named in ("", "none") else Path(named).stem


def rank() -> int:
    return dist.get_rank() if (dist := _group()) else 0


def world_size() -> int:
    return dist.get_world_size() if (dist := _group()) else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist := _group():
        dist.barrier()


def leave() -> None:
    """Ends the process group, where there is one: the last thing of a process in which nothing failed, since NCCL waits here for
    what other ranks still have to answer."""
    if "torch.distributed" not in sys.modules:
        return
    import torch.distributed as dist

    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()  # with the groups that DeepSpeed has made of it, which another run in this process would ask
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def leaving() -> Iterator[None]:
    """Around a command, which says by SystemExit how it ended: where it ended well, the process leaves its group."""
    try:
        yield
    except SystemExit as end:
        if not end.code:
            leave()
        raise


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sums over all ranks, in float64. Collective: every rank calls it with as many values."""
    if not (dist := _group()):
        return [float(v) for v in values]
    import torch

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # each backend moves tensors of one kind
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def any_rank(mine: bool) -> bool:
    """Whether it is true on any rank. Collective."""
    return sum_over_ranks([float(mine)])[0] > 0


class OutOfMemory(Exception):
    """Some rank ran out of memory, and all of them know: raised on every rank, outside of any collective."""


@contextmanager
def together(has_collectives: bool = False) -> Iterator[None]:
    """Where the block runs out of memory on any rank, OutOfMemory follows on every rank. Collective.

    `has_collectives`: the block holds collectives, inside of which the others would wait for a rank that left it. On several
    ranks such a rank cannot call the others out, and ends the run with a RedHeartError instead.
    """
    reason = None
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    if has_collectives and _group():
        if reason is not None:
            raise RedHeartError(
                f"rank {rank()} ran out of memory where the other ranks cannot follow ({reason}): "
                "go on with --resume and half of training.micro_batch_size"
            )
    elif any_rank(reason is not None):
        raise OutOfMemory(reason or "on another rank")


@contextmanager
def failing_together() -> Iterator[None]:
    """What fails in the block fails on every rank; where others wait in a collective of the block then, on this one. Collective."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    try:
        others = any_rank(failed is not None)
    except RuntimeError as error:
        if failed is None or not is_lost_rank(error):
            raise
        raise failed from None  # the others stand in a collective of the block, which ends for them in its time
    if others:
        raise failed or RedHeartError(f"rank {rank()} ends because another rank failed, and says why")


FULL = re.compile(
    r"DefaultCPUAllocator: can't allocate"  # the host, by torch
    r"|CUDA out of memory"  # torch's allocator, raised anew by a library
    r"|CUDA (driver )?error: out of memory"  # beside torch's allocator: page-locked host memory, segments that grow
    r"|(CUBLAS|CUBLASLT|CUSOLVER|CUSPARSE|CUDNN|CUFFT)_(STATUS_)?ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate"  # a handle's workspace
    r"|cuda(Error)?MemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
    r"|Cuda failure (\d+ )?'out of memory'"  # NCCL's own buffers
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a device or of the host, whoever found out: torch's allocators, CUDA, its libraries or NCCL, each with words of its own."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or FULL.search(str(error)) is not None


LOST = (
    "gloo",
    "pair closure",
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank did not answer. Under gloo that is a bare RuntimeError with its own words."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(words in str(error) for words in LOST)


def _place(error: BaseException) -> str:
    """Where in this program, beside this file, a collective was asked for."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(Path(__file__).parent) and f.filename != __file__]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} ({ours[-1].name})" if ours else "a collective"


@contextmanager
def naming_lost_ranks(remedy: str, when: Callable[[], str] = str) -> Iterator[None]:
    """Turns the failure of a collective into a PassingError that says so: which rank, `when`, in what; and names the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not (_group() and is_lost_rank(error)):
            raise
        raise PassingError(
            f"rank {rank()} of {world_size()}{when()} lost another rank in {_place(error)}: a process or a node ended or stands "
            f"still, or the network between them broke "
            f"({str(error).splitlines()[0]}); {remedy}"
        ) from error


def gathered(mine: T) -> list[T]:
    """What every rank gave, in the order of ranks. Collective."""
    if not (dist := _group()):
        return [mine]
    theirs: list[Any] = [None] * world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def after_main(action: Callable[[], str]) -> str:
    """Runs `action` in the launch's first process; the others wait for it, and get its result or its RedHeartError.

    For commands that need no process group otherwise: makes one for this, and takes it down again.
    """
    if launched_world_size() == 1:
        return action()
    import torch.distributed as dist

    _join_for_a_moment()
    said: list[str | None] = [None, None]  # result, error
    try:
        if dist.get_rank() == 0:
            try:
                said[0] = action()
            except RedHeartError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said, src=0)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if said[0] is None:
        raise RedHeartError(said[1] or "the first process of this launch failed")
    return said[0]


_stores: list[Any] = []  # of groups that were only for a moment


def _join_for_a_moment() -> None:
    """A process group whose addresses stand in the launch's store under names of their own.

    A launcher's store outlives a group, and torch writes every first group of a process under the same names: those of this one would
    answer for the next, which an engine makes, wherever a rank asks before the other has written anew. The store itself is kept: where
    rank 0 holds it, the next group finds it there.
    """
    import torch.distributed as dist

    store, rank, size = next(dist.rendezvous("env://"))
    _stores.append(store)
    mine = dist.PrefixStore(f"redheart/{len(_stores)}", store)
    dist.init_process_group("gloo", store=mine, rank=rank, world_size=size)


def launched_world_size() -> int:
    """The number of processes the launcher started, before any process group exists (1 without a launcher)."""
    return _launch()[1] if is_launched() else 1


def launched_rank() -> int:
    """This process's number as the launcher gave it, before any process group exists (0 without a launcher)."""
    return _launch()[0] if is_launched() else 0


def is_launched() -> bool:
    """Whether a launcher started this process: only where all of LAUNCH are set and fit together."""
    return not _missing() and _contradiction() is None


def check_launch() -> None:
    """Raises RedHeartError where variables of a launcher are half set or contradict themselves, so that it is open how many
    processes this run has. What can only mean one process (RANK=0 alone, an empty one, MASTER_PORT alone) is ignored."""
    if is_launched():
        return
    if wrong := _contradiction():
        raise RedHeartError(f"{wrong}: {_REMEDY}")
    said = [n for n, least in (("WORLD_SIZE", 1), ("RANK", 0)) if _number(n, least) > least]
    if said:
        shown = " and ".join(f"{n}={os.environ[n]}" for n in said)
        raise RedHeartError(
            f"{shown} is set without {', '.join(_missing())}, so that nobody knows how many processes this run has: "
            f"`unset {' '.join(said)}` if it is left over, else {_REMEDY}"
        )
    for name in STARTERS:
        if os.environ.get(name, "").strip().isdecimal() and int(os.environ[name]) > 1:
            raise RedHeartError(
                f"{name}={os.environ[name]}: several processes were started side by side, and none was told its RANK and "
                f"WORLD_SIZE: `unset {name}` if only one runs this, else {_REMEDY}"
            )


LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torch, accelerate and deepspeed read
STARTERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # of mpirun and srun
_REMEDY = "start several processes with `accelerate launch`, `deepspeed` or `torchrun`, which set all of them"


def _missing() -> list[str]:
    """Those of LAUNCH that are not set; an empty one is not."""
    return [name for name in LAUNCH if not os.environ.get(name, "").strip()]


def _number(name: str, absent: int) -> int:
    """A variable as a whole number; `absent` where it is not set, -1 where it is no such number."""
    text = os.environ.get(name, "").strip()
    return absent if not text else int(text) if text.isdecimal() else -1


def _launch() -> tuple[int, int]:
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def _contradiction() -> str | None:
    """What is wrong with the variables that are set, each for itself and, where all are set, with each other."""
    for name, least, most in (
        ("RANK", 0, None),
        ("LOCAL_RANK", 0, None),
        ("WORLD_SIZE", 1, None),
        ("MASTER_PORT", 0 if _number("WORLD_SIZE", 1) == 1 else 1, 65535),
    ):
        value = _number(name, least)
        if value < least or (most is not None and value > most):
            return f"{name}={os.environ[name]!r} is no number from {least} up" + (f" to {most}" if most else "")
    rank, world_size = _launch()
    if not _missing() and max(rank, _number("LOCAL_RANK", 0)) >= world_size:
        return f"RANK={rank} and LOCAL_RANK={_number('LOCAL_RANK', 0)} do not lie below WORLD_SIZE={world_size}"
    return None
