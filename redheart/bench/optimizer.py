"""`redheart bench optimizer`: a step of the 8-bit Adam beside DeepSpeed's two, torch's and bitsandbytes', in turns.

Every round times one step of each on as many parameters (`num_params` elements, ns per element, medians over the rounds), and
what goes with it: DeepSpeed's cast of fp32 parameters to bfloat16, which ours writes in its own pass, our pass that looks for
gradients that are not finite, and a pass over the very arrays of our step, in its order and by as many threads, that does nothing
to them but flip a bit: how fast memory lets any step be. `upload` is what the link to the GPU has left to do when a step ends which
gives it every stretch of 16-bit weights once it is finished. Without a GPU the link is one of a rate that is assumed, at no cost to
the processor.
DeepSpeed's bf16 kernel keeps weights, gradients and states in bfloat16
(bf16_optimizer_states), and needs no cast. bitsandbytes is so slow on a CPU that it gets fewer elements.

With --instructions avx2 a process of its own compiles ours and DeepSpeed's kernels for x86-64-v3, beside those of the processor, and
torch's follow its switch ATEN_CPU_CAPABILITY: what a processor without AVX-512 does, at this one's clock and memory.

Temporaries are the growth of the process' largest resident size during one step after the first (VmHWM in /proc/self/status,
reset through /proc/self/clear_refs, with the C library's free memory given back before).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Annotated, Any

import torch
import typer

from redheart.bench.timing import interleaved
from redheart.device import compute_device, has_gpu, variables_kept
from redheart.memory.budget import PEAKS, forget_peaks, resident_peak
from redheart.memory.malloc import trim
from redheart.optim import CPUAdamW8bit
from redheart.optim.adam8bit import kernel
from redheart.optim.building import build_root
from redheart.optim.state import BLOCK, MASTERS
from redheart.options import Rounds
from redheart.schema import RedHeartError
from redheart.train.engine.machinery import import_machinery

OURS, TORCH, BITSANDBYTES = "cpu_adamw_8bit", "torch_fused_adamw", "bitsandbytes_cpu"
DEEPSPEED, DEEPSPEED_BF16 = "deepspeed_cpu_adam", "deepspeed_cpu_adam_bf16"
MOST_BITSANDBYTES = 4_000_000  # elements; 30 to 60 ns each
DECADES = 8
LINK = 12e9  # B/s: PCIe, as `redheart plan` assumes
# bytes a step must move per element: parameters and states both ways, gradients, and the copy of fp32 weights
CODES_BYTES = 2 * 2 + 2 * 9 / BLOCK
BYTES = {
    "split": 2 * 3 + 2 + CODES_BYTES,
    "fp32": 2 * 4 + 4 + 2 + CODES_BYTES,
    DEEPSPEED: 4 + 2 * 12.0,
    DEEPSPEED_BF16: 2 + 2 * 6.0,
    TORCH: 4 + 2 * 12.0,
}


def bench_optimizer(
    params: Annotated[
        int, typer.Option("--params", min=1024, help="fp32 parameters that every step updates.")
    ] = 64_000_000,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 2,
    rounds: Rounds = 9,
    master: Annotated[
        str, typer.Option("--master", help="Of our weights: split (bfloat16 and a byte) or fp32, with a bfloat16 copy.")
    ] = "split",
    instructions: Annotated[
        str, typer.Option("--instructions", help="native: all that the processor has; avx2: no AVX-512 in any kernel.")
    ] = "native",
) -> dict[str, Any]:
    """A step of the 8-bit Adam on the CPU, beside DeepSpeed's, torch's and bitsandbytes', in turns; a ratio is our time over theirs.

    ratio_to_deepspeed: our step, which writes the 16-bit weights, over DeepSpeed's with fp32 states, which does not; `_with_copy`
    counts DeepSpeed's cast too; `_checked` also counts our look for gradients that are not finite (the optimizer's default; a
    training run's own guard has looked already); ratio_to_deepspeed_bf16: over its kernel of bfloat16 weights and states.
    share_of_bandwidth: the time of a bare pass over our step's arrays over the step's.
    """
    if master not in MASTERS:
        raise RedHeartError(f"--master {master}: choose split or fp32")
    if not PEAKS.exists():
        raise RedHeartError("bench optimizer measures temporaries through /proc: run it on Linux")
    if instructions == "native":
        return _bench(params, threads, rounds, master, instructions)
    if instructions != "avx2":
        raise RedHeartError(f"--instructions {instructions}: choose native or avx2")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise RedHeartError("--instructions avx2: this processor has no AVX2")
    with variables_kept():
        # read when a process first computes, and when it first builds
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "TORCH_EXTENSIONS_DIR": str(build_root() / "avx2")}
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            return fresh.submit(_bench, params, threads, rounds, master, instructions).result()


def _bench(n: int, threads: int, rounds: int, master: str, instructions: str) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with variables_kept():  # no process group comes of it
            import_machinery()  # else every optimizer of DeepSpeed's asks for the processor anew, for more than a second
        if instructions == "avx2":
            _build_for_avx2()
        return _timed(n, threads, rounds, master) | {"instructions": instructions}
    finally:
        torch.set_num_threads(before)


def _build_for_avx2() -> None:
    """What this process compiles from here on, ours (a builder of DeepSpeed's) and DeepSpeed's own."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    OpBuilder.cpu_arch = lambda builder: "-march=x86-64-v3"
    OpBuilder.simd_width = lambda builder: "-D__AVX256__"


def _timed(n: int, threads: int, rounds: int, master: str) -> dict[str, Any]:
    from bitsandbytes.optim import AdamW8bit

    few = min(n, MOST_BITSANDBYTES)
    p, half, small = parameter(n), parameter(n, torch.bfloat16), parameter(few)
    copy = torch.zeros(n, dtype=torch.bfloat16)
    mine = half if master == "split" else p
    ours = CPUAdamW8bit([mine], master=master)
    copies: dict[torch.Tensor, torch.Tensor] = {} if master == "split" else {p: copy}
    others = {
        DEEPSPEED: _deepspeed_adam(p),
        DEEPSPEED_BF16: _deepspeed_adam(parameter(n, torch.bfloat16), fp32_optimizer_states=False),
        TORCH: torch.optim.AdamW([p], lr=1e-4, fused=True),
        BITSANDBYTES: AdamW8bit([small], lr=1e-4),
    }
    sizes = {BITSANDBYTES: few}
    link = _Link(copies.get(mine, mine.detach()))
    timed: dict[str, Callable[[], object]] = {
        OURS: lambda: ours.step(copies=copies, check_finite=False),
        "stream": lambda: ours.pass_over(mine, copies.get(mine)),
        **{name: optimizer.step for name, optimizer in others.items()},
        "cast": lambda: copy.copy_(p.detach()),
        "checked": lambda: ours.step(copies=copies),
        "in_stretches": lambda: link.used_by(
            lambda send: ours.step(copies=copies, on_written=send, check_finite=False)
        ),
    }
    if link.on_gpu:
        timed["upload"] = link.whole
    seconds = interleaved(timed, rounds)  # the first round makes the states
    per_param = {name: median(taken) / sizes.get(name, n) * 1e9 for name, taken in seconds.items()}
    optimizers: dict[str, torch.optim.Optimizer] = {OURS: ours, **others}
    moved = {OURS: BYTES[master], **{name: BYTES[name] for name in (DEEPSPEED, DEEPSPEED_BF16, TORCH)}}
    with_cast = per_param[DEEPSPEED] + per_param["cast"]
    return {
        "params": n,
        "threads": threads,
        "master": master,
        "lanes": kernel().lanes,
        "ns_per_param": {name: per_param[name] for name in optimizers},
        "state_bytes_per_param": {name: _state_bytes(o) / sizes.get(name, n) for name, o in optimizers.items()},
        "peak_temporary_bytes_per_param": {
            name: _temporary_bytes(timed[name]) / sizes.get(name, n) for name in optimizers
        },
        "ratio_to_deepspeed": per_param[OURS] / per_param[DEEPSPEED],
        "ratio_to_deepspeed_bf16": per_param[OURS] / per_param[DEEPSPEED_BF16],
        "ratio_to_bitsandbytes": per_param[OURS] / per_param[BITSANDBYTES],
        "ratio_to_deepspeed_with_copy": per_param[OURS] / with_cast,
        "ratio_to_deepspeed_with_copy_checked": per_param["checked"] / with_cast,
        "ns_per_param_checked": per_param["checked"],
        "ns_per_param_deepspeed_cast": per_param["cast"],
        "bytes_per_param": moved,
        "gb_per_s": {name: size / per_param[name] for name, size in moved.items()},
        "stream_gb_per_s": BYTES[master] / per_param["stream"],
        "share_of_bandwidth": {OURS: per_param["stream"] / per_param[OURS]},
        "upload": link.told(per_param[OURS], median(seconds.get("upload", [2 * n / LINK])), n),
        "relative_error_by_decade": relative_error_by_decade(),
        "bitsandbytes_params": few,
        "rounds": rounds,
    }


class _Link:
    """Between the host and the GPU, or one of rate LINK where there is no GPU: 16-bit weights [n] of the host, page-locked for it."""

    def __init__(self, weights: torch.Tensor):
        self.on_gpu = has_gpu()
        self.steps, self.left = list[float](), list[float]()  # seconds of steps, and of the link after them
        self._free = 0.0  # when the assumed link will be
        if self.on_gpu:
            torch.cuda.cudart().cudaHostRegister(weights.data_ptr(), weights.nbytes, 0)
            self._host, self._there = weights, torch.empty_like(weights, device=compute_device())

    def used_by(self, step: Callable[[Callable[[int, int], None]], object]) -> None:
        """`step` is given what it has to tell of stretches that are finished."""
        self._free, started = 0.0, time.perf_counter()
        step(self._send if self.on_gpu else self._give)
        ended = time.perf_counter()
        if self.on_gpu:
            torch.cuda.synchronize()
        self.steps.append(ended - started)
        self.left.append(max(self._free, time.perf_counter() if self.on_gpu else ended) - ended)

    def whole(self) -> None:
        self._send(0, len(self._host))

    def told(self, step_ns: float, whole_s: float, n: int) -> dict[str, Any]:
        """Given ns per parameter of a step in one piece and seconds of the whole copy. `hidden_share`: how much of it is over when the
        step ends."""
        return {
            "link": torch.cuda.get_device_name() if self.on_gpu else "assumed",
            "gb_per_s": 2 * n / whole_s / 1e9,
            "hidden_share": 1 - median(self.left[1:]) / whole_s,
            "step_in_stretches": median(self.steps[1:]) / n * 1e9 / step_ns,
        }

    def _send(self, start: int, stop: int) -> None:
        self._there[start:stop].copy_(self._host[start:stop], non_blocking=True)

    def _give(self, start: int, stop: int) -> None:
        self._free = max(self._free, time.perf_counter()) + 2 * (stop - start) / LINK


def parameter(n: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.empty(n).normal_(0, 0.02, generator=generator).to(dtype))
    p.grad = torch.empty(n).normal_(0, 1e-3, generator=generator).to(dtype)
    return p


def _deepspeed_adam(p: torch.nn.Parameter, **settings: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam([p], lr=1e-4, adamw_mode=True, **settings)


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
