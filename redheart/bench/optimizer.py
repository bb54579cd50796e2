"""`redheart bench optimizer`: a step of the 8-bit Adam beside DeepSpeed's, torch's and bitsandbytes', in turns.

Every round times one step of each on the same fp32 parameters and gradients (`num_params` elements, ns per element, medians
over the rounds), and what goes with it: DeepSpeed's cast of the parameters to bfloat16, which ours writes in its own pass, our
pass that looks for gradients that are not finite, and a plain copy, whose bytes per second say how near a step is to what the
memory allows. bitsandbytes is so slow on a CPU that it gets fewer elements.

Temporaries are the growth of the process' largest resident size during one step after the first (VmHWM in /proc/self/status,
reset through /proc/self/clear_refs, with the C library's free memory given back before).
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Annotated, Any

import torch
import typer

from redheart.bench.timing import interleaved
from redheart.device import tell_deepspeed
from redheart.memory.budget import PEAKS, forget_peaks, resident_peak
from redheart.memory.malloc import trim
from redheart.optim import CPUAdamW8bit
from redheart.optim.adam8bit import BLOCK
from redheart.options import Rounds
from redheart.schema import RedHeartError

OURS, DEEPSPEED, TORCH, BITSANDBYTES = "cpu_adamw_8bit", "deepspeed_cpu_adam", "torch_fused_adamw", "bitsandbytes_cpu"
MOST_BITSANDBYTES = 4_000_000  # elements; 30 to 60 ns each
DECADES = 6
# bytes a step must move per element: it reads and writes parameters and states, and reads gradients; ours writes the copy
BYTES = {OURS: 4 + 2 * 4 + 2 * 2 + 2 + 2 * 8 / BLOCK, DEEPSPEED: 4 + 2 * 12.0, TORCH: 4 + 2 * 12.0}


def bench_optimizer(
    params: Annotated[
        int, typer.Option("--params", min=1024, help="fp32 parameters that every step updates.")
    ] = 64_000_000,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 2,
    rounds: Rounds = 9,
) -> dict[str, Any]:
    """A step of the 8-bit Adam on the CPU, beside DeepSpeed's, torch's and bitsandbytes', in turns; a ratio is our time over theirs.

    ratio_to_deepspeed: our step, which writes the 16-bit copy, over DeepSpeed's, which does not; `_with_copy` counts
    DeepSpeed's cast too; `_checked` also counts our look for gradients that are not finite (the optimizer's default; a
    training run's own guard has looked already).
    """
    if not PEAKS.exists():
        raise RedHeartError("bench optimizer measures temporaries through /proc: run it on Linux")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _bench(params, threads, rounds)
    finally:
        torch.set_num_threads(before)


def _bench(n: int, threads: int, rounds: int) -> dict[str, Any]:
    few = min(n, MOST_BITSANDBYTES)
    p, small = parameter(n), parameter(few)
    copy, scratch = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n)
    ours = CPUAdamW8bit([p])
    others = {
        DEEPSPEED: _deepspeed_adam(p),
        TORCH: torch.optim.AdamW([p], lr=1e-4, fused=True),
        BITSANDBYTES: _bitsandbytes_adam(small),
    }
    sizes = {BITSANDBYTES: few}
    timed: dict[str, Callable[[], object]] = {
        OURS: lambda: ours.step(copies={p: copy}, check_finite=False),
        **{name: optimizer.step for name, optimizer in others.items()},
        "cast": lambda: copy.copy_(p.detach()),
        "checked": lambda: ours.step(copies={p: copy}),
        "copy": lambda: scratch.copy_(p.detach()),
    }
    seconds = interleaved(timed, rounds)  # the first round makes the states
    per_param = {name: median(taken) / sizes.get(name, n) * 1e9 for name, taken in seconds.items()}
    optimizers: dict[str, torch.optim.Optimizer] = {OURS: ours, **others}
    bandwidth = 8 / per_param["copy"]
    with_cast = per_param[DEEPSPEED] + per_param["cast"]
    return {
        "params": n,
        "threads": threads,
        "ns_per_param": {name: per_param[name] for name in optimizers},
        "state_bytes_per_param": {name: _state_bytes(o) / sizes.get(name, n) for name, o in optimizers.items()},
        "peak_temporary_bytes_per_param": {
            name: _temporary_bytes(timed[name]) / sizes.get(name, n) for name in optimizers
        },
        "ratio_to_deepspeed": per_param[OURS] / per_param[DEEPSPEED],
        "ratio_to_bitsandbytes": per_param[OURS] / per_param[BITSANDBYTES],
        "ratio_to_deepspeed_with_copy": per_param[OURS] / with_cast,
        "ratio_to_deepspeed_with_copy_checked": per_param["checked"] / with_cast,
        "ns_per_param_checked": per_param["checked"],
        "ns_per_param_deepspeed_cast": per_param["cast"],
        "copy_bandwidth_gb_per_s": bandwidth,
        "bytes_per_param": BYTES,
        "share_of_bandwidth": {name: moved / per_param[name] / bandwidth for name, moved in BYTES.items()},
        "relative_error_by_decade": relative_error_by_decade(),
        "bitsandbytes_params": few,
        "rounds": rounds,
    }


def parameter(n: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.empty(n).normal_(0, 0.02, generator=generator))
    p.grad = torch.empty(n).normal_(0, 1e-3, generator=generator)
    return p


def _deepspeed_adam(p: torch.nn.Parameter) -> torch.optim.Optimizer:
    tell_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam([p], lr=1e-4, adamw_mode=True)


def _bitsandbytes_adam(p: torch.nn.Parameter) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([p], lr=1e-4)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors in the state that are not single numbers."""
    tensors = {
        x.data_ptr(): x.numel() * x.element_size()
        for state in optimizer.state.values()
        for x in state.values()
        if isinstance(x, torch.Tensor) and x.numel() > 1
    }
    return sum(tensors.values())


def _temporary_bytes(step: Callable[[], object]) -> int:
    """By how much the resident size peaked above where it began, during one step."""
    trim()
    forget_peaks()
    began = resident_peak()
    step()
    return max(0, resident_peak() - began)


def relative_error_by_decade(blocks: int = 4096) -> dict[str, dict[str, list[float]]]:
    """Root mean square relative errors of codes, for values 10^-(i+1) to 10^-i of the largest in their block, i = 0, 1, ….

    exp_avg: of a first moment; exp_avg_sq_root: of the root of a second. Ours as a step leaves them (rounded stochastically)
    and as `set_moments` does (to nearest); bitsandbytes' dynamic map and evenly spaced codes, to nearest.
    """
    import bitsandbytes.functional as bnb

    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(blocks, BLOCK, generator=generator) * DECADES
    x = 10**-depth * torch.rand(blocks, 1, generator=generator).exp()  # scales of no special mantissa
    x[:, 0] = 10 ** depth[:, 0] * x[:, 0]
    depth[:, 0] = 0
    p = torch.nn.Parameter(torch.zeros(x.numel()))
    p.grad = x.flatten()
    optimizer = CPUAdamW8bit([p], lr=0.0, betas=(0.0, 0.0))  # the moments are then the gradient and its square
    optimizer.step()
    stochastic = optimizer.moments(p)
    optimizer.set_moments(p, p.grad, p.grad.square())
    nearest = optimizer.moments(p)
    largest = x.amax(1, keepdim=True)
    signed, unsigned = bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)
    coded = {
        "exp_avg": {
            "ours": stochastic[0].view_as(x),
            "ours_nearest": nearest[0].view_as(x),
            "dynamic_map": _nearest(x / largest, signed) * largest,
            "linear": _nearest(x / largest, torch.linspace(-1, 1, 255)) * largest,
        },
        "exp_avg_sq_root": {
            "ours": stochastic[1].view_as(x).sqrt(),
            "ours_nearest": nearest[1].view_as(x).sqrt(),
            "dynamic_map": _nearest((x / largest).square(), unsigned).sqrt() * largest,
            "linear": _nearest(x / largest, torch.linspace(0, 1, 256)) * largest,
        },
    }
    in_decade = [depth.floor() == d for d in range(DECADES)]
    return {
        moment: {
            code: [float((y / x - 1)[rows].square().mean().sqrt()) for rows in in_decade] for code, y in codes.items()
        }
        for moment, codes in coded.items()
    }


def _nearest(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    code = code.sort().values
    return code[torch.bucketize(x, (code[1:] + code[:-1]) / 2)]
