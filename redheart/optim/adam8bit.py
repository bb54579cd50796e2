"""AdamW on the CPU with one byte per moment: `CPUAdamW8bit`, a torch optimizer around the fused C++ step in csrc/.

States of a parameter with n elements: two codes a piece (n bytes each) and nine bytes per block of 256: 2.04 bytes per element
where fp32 Adam keeps 8. Decoupled weight decay (Loshchilov and Hutter 2019); block-wise 8-bit states after Dettmers et al. (2022),
"8-bit Optimizers via Block-wise Quantization", with other codes (csrc/adam8bit.cpp says which and why): the root of the second
moment with as many mantissa bits as the block's range leaves, the first moment over that root, both rounded stochastically.
Weights are fp32, or with `master="split"` bfloat16 and a byte of remainder: 3 bytes that hold 16 significant bits.
The kernel is compiled once by DeepSpeed's op builder, and cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from redheart.device import tell_deepspeed
from redheart.optim.building import build_root, built_alone
from redheart.optim.state import (
    BARE,
    BLOCK,
    CODE_STATES,
    CODES,
    MASTERS,
    REMAINDER,
    STATES,
    OptimizerValueError,
    check_settings,
    check_state,
    check_state_dict,
    check_states,
    check_step,
    empty_states,
)

# elements that a step does before it tells of them (`on_written`): 8 MiB in bfloat16, under a ms of PCIe
STRETCH = 2**22


@cache
def kernel(lanes: int = 0) -> Any:
    """The compiled extension; the first call on a machine compiles it. `lanes`: other vectors than this processor's, for tests."""
    tell_deepspeed()
    from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

    written = {path.name: path.read_bytes() for path in sorted((Path(__file__).parent / "csrc").iterdir())}
    # compiled from a copy that is named by its content: two checkouts share a cache, and a kernel if they are alike
    version = hashlib.sha256(b"".join([*written.values(), torch.__file__.encode()])).hexdigest()[:8]

    class Adam8bitBuilder(CPUOpBuilder):
        BUILD_VAR = "DS_BUILD_REDHEART_ADAM8BIT"
        NAME = f"redheart_adam8bit_{version}" + (f"_{lanes}" if lanes else "")

        def __init__(self) -> None:
            super().__init__(name=self.NAME)

        def absolute_name(self) -> str:
            return f"redheart.optim.{self.NAME}_op"

        def sources(self) -> list[str]:
            return [str(copy / "adam8bit.cpp")]

        def include_paths(self) -> list[str]:
            return []

        def cxx_args(self) -> list[str]:
            # without the first two gcc keeps scalar square roots and comparisons; neither changes a result
            extra = ["-fno-math-errno", "-fno-trapping-math", *([f"-DREDHEART_LANES={lanes}"] if lanes else [])]
            return [*super().cxx_args(), *extra]

    builder = Adam8bitBuilder()
    copy = build_root() / f"{builder.NAME}_source"

    def build() -> Any:
        copy.mkdir(exist_ok=True)
        for name, content in written.items():
            if not (copy / name).is_file() or (copy / name).read_bytes() != content:
                (copy / name).write_bytes(content)
        return builder.load(verbose=False)

    return built_alone(builder.NAME, build)


class CPUAdamW8bit(torch.optim.Optimizer):
    """AdamW for parameters in host memory. `seed` draws the rounding noise: same seed, same run, bit for bit.

    Parameters are fp32, or with `master="split"` bfloat16: each is then the rounded half of a weight of 16 significant bits, and
    the state keeps the other half as one byte (`master_weights`, `set_master_weights`). Gradients are fp32 or bfloat16.

    `gradient_scale` is what gradients count times in steps to come: clipping without a pass of its own.
    What AdamW refuses, it refuses with an error of the same type, and before it writes anything: the kernel is given addresses,
    so that every tensor is looked at first. `lr` and `betas` may be tensors of one element, as for AdamW.
    """

    gradient_scale = 1.0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
        master: str = "fp32",
    ):
        check_settings(lr, betas, eps, weight_decay)
        if master not in MASTERS:
            raise OptimizerValueError(f"Invalid master: {master!r} is neither fp32 nor split")
        # the seed is kept in the groups, which are what copies, pickles and checkpoints carry
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "codes": CODES,
            "seed": seed,
            "master": master,
        }
        super().__init__(params, defaults)
        assert self._kernel  # compiled now, not within the first step

    @cached_property
    def _kernel(self) -> Any:  # not among what copies and pickles carry
        return kernel()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("seed", self.defaults.get("seed", 0))  # of checkpoints before there was one
            group.setdefault("master", self.defaults.get("master", "fp32"))

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        copies: dict[torch.Tensor, torch.Tensor] | None = None,
        on_written: Callable[[int, int], None] | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """One update of every parameter that has a gradient, which counts times `gradient_scale`.

        `copies[p]` (bfloat16, as many elements, of fp32 parameters) is rewritten in the same pass.

        `on_written(start, stop)` is told of every stretch of a parameter that is finished, STRETCH elements at most, while the
        next has not begun: it may be on its way by then. A gradient that is not finite raises
        FloatingPointError. By default all gradients are looked at first and nothing has changed then. A caller that has looked
        already saves that pass with `check_finite=False`; the step then still leaves every block of 256 with such a gradient as
        it was, and raises, but has updated the other blocks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        copies = copies or {}
        given = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        for group, p in given:
            check_step(p, copies.get(p), group["master"])
            if self.state.get(p, {}).keys() - BARE:
                check_states(self.state[p], p.numel())
            if REMAINDER in self.state.get(p, {}):
                check_state(self.state[p], REMAINDER, p.numel(), p.numel())
        if check_finite and not all(
            self._kernel.all_finite(p.grad.data_ptr(), p.numel(), p.grad.dtype == torch.bfloat16) for _, p in given
        ):
            raise FloatingPointError("a gradient is not finite: the optimizer has changed nothing")
        left = 0
        for group, p in given:
            left += self._update(p, group, copies.get(p), on_written)
        if left:
            raise FloatingPointError(
                f"gradients of {left} blocks of {BLOCK} are not finite: these were left as they were"
            )
        return loss

    def _update(
        self,
        p: torch.Tensor,
        group: dict[str, Any],
        copy: torch.Tensor | None,
        on_written: Callable[[int, int], None] | None,
    ) -> int:
        """How many blocks were left alone, for their gradient is not finite."""
        state, n = self.state[p], p.numel()
        if STATES[0] not in state:
            state.update(empty_states(n))
        # which noise it draws: ZeRO shows one group at a time, so a place in param_groups would not tell them apart
        state.setdefault("number", 1 + max(other.get("number", 0) for other in self.state.values()))
        state["step"] = int(state.get("step", 0)) + 1
        left, size = 0, max(n, 1) if on_written is None else STRETCH
        for start in range(0, max(n, 1), size):
            stop = min(start + size, n)
            left += self._kernel.step(
                *self._arrays(p, copy, start), self._pointers(state, start), stop - start, start // BLOCK, self.gradient_scale,
                float(group["lr"]), *(float(beta) for beta in group["betas"]), float(group["eps"]), float(group["weight_decay"]),
                state["step"], _key(group["seed"], state["number"]),
            )  # fmt: skip
            if on_written is not None:
                on_written(start, stop)
        return left

    def _arrays(self, p: torch.Tensor, copy: torch.Tensor | None, start: int = 0) -> tuple[Any, ...]:
        """Addresses of fp32 weights, of 16-bit weights, of the remainders, of the gradient, and whether that is bfloat16; of the
        elements from `start` on, a multiple of BLOCK."""
        gradient = p.grad
        assert gradient is not None

        def at(x: torch.Tensor) -> int:
            return x.data_ptr() + start * x.element_size()

        gradients = at(gradient), gradient.dtype == torch.bfloat16
        if p.dtype == torch.bfloat16:
            return 0, at(p), at(self._remainder(p)), *gradients
        return at(p), 0 if copy is None else at(copy), 0, *gradients

    def pass_over(self, p: torch.Tensor, copy: torch.Tensor | None = None) -> None:
        """Touches what a step of `p` touches and does no arithmetic: a bound of its time. It spoils a bit of everything, in turns."""
        self._kernel.pass_over(*self._arrays(p, copy), self._pointers(self.state[p]), p.numel())

    def _pointers(self, state: dict[str, Any], start: int = 0) -> Any:
        begins = (state[name][start if name in CODE_STATES else start // BLOCK :] for name in STATES)
        return self._kernel.States(*(begin.data_ptr() for begin in begins))

    def _remainder(self, p: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        if REMAINDER not in state:
            state[REMAINDER] = torch.zeros(p.numel(), dtype=torch.int8, device="cpu")
        remainder: torch.Tensor = state[REMAINDER]
        return remainder

    @torch.no_grad()
    def master_weights(self, p: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """A parameter as fp32 (in `into`, of as many elements, if it is given): of a split one all its 16 significant bits."""
        w = torch.empty(p.shape, dtype=torch.float32, device="cpu") if into is None else into
        if p.dtype == torch.float32:
            return w.copy_(p)
        self._kernel.join_weights(p.data_ptr(), self._remainder(p).data_ptr(), w.data_ptr(), p.numel())
        return w

    @torch.no_grad()
    def set_master_weights(self, p: torch.Tensor, w: torch.Tensor, start: int = 0) -> None:
        """The inverse: the elements of p from `start` on become the nearest to w, fp32, in host memory.

        What `master_weights` gave comes back bit for bit. Elements beyond w's end stay.
        """
        w = w.detach().contiguous()
        if w.dtype != torch.float32 or not 0 <= start <= p.numel() - w.numel() or w.device.type != "cpu":
            raise OptimizerValueError(
                f"CPUAdamW8bit: weights must be at most {p.numel() - start} float32 numbers in host memory, these are {w.numel()} of "
                f"{w.dtype} on {w.device}"
            )
        if p.dtype == torch.float32:
            p.view(-1)[start : start + w.numel()].copy_(w.view(-1))
        elif not self._kernel.split_weights(
            p.data_ptr(), self._remainder(p).data_ptr(), w.data_ptr(), start, w.numel(), p.numel()
        ):
            raise OptimizerValueError(
                "CPUAdamW8bit: a weight is not finite, or beyond bfloat16's range: check the checkpoint"
            )

    def moments(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and second moments of a parameter as fp32 tensors of its shape."""
        if not self.state.get(p, {}).keys() - BARE:
            raise OptimizerValueError("CPUAdamW8bit: this parameter has no moments yet: it has never been stepped")
        check_states(self.state[p], p.numel())
        m, v = (x.view(p.shape) for x in expand_states(self.state[p]))
        return m, v

    def set_moments(self, p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, start: int = 0) -> None:
        """The inverse of `moments`: the nearest codes. What `moments` gave comes back bit for bit; `state["step"]` stays.

        m, v: fp32, finite, v not negative: the elements of p from `start`, a multiple of 256, to its end or a whole number of
        blocks. A v above zero stays above zero.
        """
        left = p.numel() - start
        fits = m.numel() == v.numel() and (m.numel() == left or (m.numel() < left and m.numel() % BLOCK == 0))
        m, v = m.detach().contiguous(), v.detach().contiguous()
        for x in (m, v):
            if (
                not fits
                or start % BLOCK
                or x.dtype != torch.float32
                or x.device.type != "cpu"
                or not x.isfinite().all()
            ):
                raise OptimizerValueError(
                    f"CPUAdamW8bit: moments must be {left} finite float32 numbers in host memory, "
                    f"these are {x.numel()} of {x.dtype} on {x.device}: check the checkpoint"
                )
        if (v < 0).any():
            raise OptimizerValueError("CPUAdamW8bit: a second moment is negative: check the checkpoint")
        state = self.state[p]
        if STATES[0] not in state:
            state.update(empty_states(p.numel()))
        check_states(state, p.numel())
        self._kernel.compress(self._pointers(state, start), m.data_ptr(), v.data_ptr(), m.numel())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn the codes into floats: types and values stay as they were saved.

        Raises an error for the state of another optimizer, for codes of another meaning, and for states that do not fit.
        """
        given: dict[str, Any] = {}
        order = [p for group in self.param_groups for p in group["params"]]

        def look(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            """After every pre-hook of the user's, which may have made another state dict."""
            numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
            if len(numbers) == len(order):  # or torch raises
                check_state_dict(state_dict, {number: p.numel() for number, p in zip(numbers, order, strict=True)})
                given.update(
                    {number: (p, state_dict["state"].get(number, {})) for number, p in zip(numbers, order, strict=True)}
                )

        def restore(_: torch.optim.Optimizer) -> None:
            """Before every post-hook of the user's."""
            for group in self.param_groups:
                group["master"] = self.defaults["master"]  # how weights are kept here, whatever it was there
            for p, saved in given.values():
                for name in saved.keys() & {*STATES, REMAINDER}:
                    self.state[p][name] = saved[name].detach().clone()

        handles = (
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()


def _key(seed: int, number: int) -> int:
    """What the noise of a parameter is drawn from, as the kernel's 64 bits with a sign, whatever the seed."""
    return (seed * 1_000_003 + number + 2**63) % 2**64 - 2**63


def expand_states(state: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second) moments of a parameter's 8-bit state as flat fp32 tensors."""
    n = state[STATES[0]].numel()
    check_states(state, n)
    m, v = (torch.empty(n, dtype=torch.float32, device="cpu") for _ in range(2))
    states = kernel().States(*(state[name].data_ptr() for name in STATES))
    kernel().expand(states, m.data_ptr(), v.data_ptr(), n)
    return m, v
