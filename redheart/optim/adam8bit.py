"""AdamW on the CPU with one byte per moment: `CPUAdamW8bit`, a torch optimizer around the fused C++ step in csrc/.

States of a parameter with n elements: two codes a piece (n bytes each) and two fp32 scales per block of 256: 2.03 bytes per
element where fp32 Adam keeps 8. Decoupled weight decay (Loshchilov and Hutter 2019); block-wise 8-bit states after Dettmers et
al. (2022), "8-bit Optimizers via Block-wise Quantization", with other codes and stochastic rounding (csrc/adam8bit.cpp says why).
The kernel is compiled once by DeepSpeed's op builder, and cached.

Root mean square relative error of the codes by decade below a block's largest value (`redheart bench optimizer`):

                                     1 to 0.1   0.01   1e-3   1e-4   1e-5   1e-6
    m, rounded stochastically           0.038  0.037  0.038  0.038   0.12    1.2
    m, bitsandbytes' dynamic map        0.018  0.035  0.066   0.12   0.22   0.40
    root of v, stochastically           0.019  0.019  0.019  0.019   0.48     10
    root of v, dynamic map of v         0.007  0.026  0.093   0.79    1.0    1.0

In the last decade a root of v is read as the smallest code, which is too large: the step is too short there, never too long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from redheart.optim.building import built_alone
from redheart.schema import RedHeartError

BLOCK = 256
CODES = 2  # the meaning of the codes; another number is another kernel's
STATES = ("exp_avg_8bit", "exp_avg_sq_8bit", "exp_avg_scale", "exp_avg_sq_scale")


@cache
def kernel(lanes: int = 0) -> Any:
    """The compiled extension; the first call on a machine compiles it. `lanes`: other vectors than this processor's, for tests."""
    from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

    source = Path(__file__).parent / "csrc" / "adam8bit.cpp"
    texts = b"".join(path.read_bytes() for path in sorted(source.parent.iterdir()))
    version = hashlib.sha256(texts).hexdigest()[:8]  # two checkouts share a cache, not a kernel

    class Adam8bitBuilder(CPUOpBuilder):
        BUILD_VAR = "DS_BUILD_REDHEART_ADAM8BIT"
        NAME = f"redheart_adam8bit_{version}" + (f"_{lanes}" if lanes else "")

        def __init__(self) -> None:
            super().__init__(name=self.NAME)

        def absolute_name(self) -> str:
            return f"redheart.optim.{self.NAME}_op"

        def sources(self) -> list[str]:
            return [str(source)]

        def include_paths(self) -> list[str]:
            return []

        def cxx_args(self) -> list[str]:
            # without the first two gcc keeps scalar square roots and comparisons; neither changes a result
            extra = ["-fno-math-errno", "-fno-trapping-math", *([f"-DREDHEART_LANES={lanes}"] if lanes else [])]
            return [*super().cxx_args(), *extra]

    builder = Adam8bitBuilder()
    return built_alone(builder.NAME, lambda: builder.load(verbose=False))


class CPUAdamW8bit(torch.optim.Optimizer):
    """AdamW for fp32 parameters in host memory. `seed` draws the rounding noise: same seed, same run, bit for bit."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
    ):
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise RedHeartError(
                f"CPUAdamW8bit: lr {lr}, betas {betas}, eps {eps} or weight_decay {weight_decay} is out of range"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "codes": CODES}
        super().__init__(params, defaults)
        self.seed = seed
        self._kernel = kernel()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        copies: dict[torch.Tensor, torch.Tensor] | None = None,
        on_written: Callable[[int, int], None] | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """One update of every parameter that has a gradient; `copies[p]` (bfloat16, as many elements) is rewritten in the same pass.

        `on_written(start, stop)` is told of every stretch of a copy that is finished. A gradient that is not finite raises
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
        for _, p in given:
            _check(p, copies.get(p))
        if check_finite and not all(self._kernel.all_finite(p.grad.data_ptr(), p.numel()) for _, p in given):
            raise FloatingPointError("a gradient is not finite: the optimizer has changed nothing")
        left = 0
        for group, p in given:
            left += self._update(p, group, copies.get(p))
            if on_written is not None:
                on_written(0, p.numel())
        if left:
            raise FloatingPointError(
                f"gradients of {left} blocks of {BLOCK} are not finite: these were left as they were"
            )
        return loss

    def _update(self, p: torch.Tensor, group: dict[str, Any], copy: torch.Tensor | None) -> int:
        """How many blocks were left alone, for their gradient is not finite."""
        state = self.state[p]
        state.setdefault("step", 0)
        if STATES[0] not in state:
            state.update(_empty_states(p.numel()))
        # which noise it draws: ZeRO shows one group at a time, so a place in param_groups would not tell them apart
        state.setdefault("number", 1 + max(other.get("number", 0) for other in self.state.values()))
        state["step"] += 1
        gradient, address = p.grad, 0 if copy is None else copy.data_ptr()
        assert gradient is not None
        left: int = self._kernel.step(
            p.data_ptr(), gradient.data_ptr(), self._pointers(state), address, p.numel(), group["lr"], *group["betas"],
            group["eps"], group["weight_decay"], int(state["step"]), self.seed * 1_000_003 + state["number"],
        )  # fmt: skip
        return left

    def _pointers(self, state: dict[str, Any]) -> Any:
        return self._kernel.States(*(state[name].data_ptr() for name in STATES))

    def adopt_moments(self) -> None:
        """Codes `exp_avg` and `exp_avg_sq` that DeepSpeed has put into the state into 8 bits; `step` stays."""
        for p, state in self.state.items():
            if "exp_avg" in state:
                state["step"] = int(state["step"])
                self.set_moments(p, state.pop("exp_avg"), state.pop("exp_avg_sq"))

    def moments(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and second moments of a parameter as fp32 tensors of its shape."""
        m, v = torch.empty(p.shape), torch.empty(p.shape)
        self._kernel.expand(self._pointers(self.state[p]), m.data_ptr(), v.data_ptr(), p.numel())
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
                raise RedHeartError(
                    f"CPUAdamW8bit: moments must be {left} finite float32 numbers in host memory, "
                    f"these are {x.numel()} of {x.dtype} on {x.device}: check the checkpoint"
                )
        if (v < 0).any():
            raise RedHeartError("CPUAdamW8bit: a second moment is negative: check the checkpoint")
        state = self.state[p]
        if STATES[0] not in state:
            state.update(_empty_states(p.numel()))
        block = start // BLOCK
        part = {name: state[name][start if state[name].numel() == p.numel() else block :] for name in STATES}
        self._kernel.compress(self._pointers(part), m.data_ptr(), v.data_ptr(), m.numel())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn the codes into floats: types and values stay as they were saved.

        Raises RedHeartError for codes of another meaning.
        """
        if state_dict["state"] and any(g.get("codes") != CODES for g in state_dict["param_groups"]):
            raise RedHeartError(
                "this checkpoint holds 8-bit optimizer states of another version of Red Heart, whose codes mean other numbers: go "
                "on with that version, or start from its weights with --init"
            )
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            for name in STATES:
                self.state[order[index]][name] = saved[name].clone()


def expand_states(state: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second) moments of a parameter's 8-bit state as flat fp32 tensors."""
    n = state[STATES[0]].numel()
    m, v = torch.empty(n), torch.empty(n)
    states = kernel().States(*(state[name].data_ptr() for name in STATES))
    kernel().expand(states, m.data_ptr(), v.data_ptr(), n)
    return m, v


def _empty_states(n: int) -> dict[str, torch.Tensor]:
    blocks = -(-n // BLOCK)
    sizes, kinds = (n, n, blocks, blocks), (torch.int8, torch.uint8, torch.float32, torch.float32)
    return {name: torch.zeros(s, dtype=k) for name, s, k in zip(STATES, sizes, kinds, strict=True)}


def _check(p: torch.Tensor, copy: torch.Tensor | None) -> None:
    gradient = p.grad
    assert gradient is not None
    for what, x in (("parameter", p), ("gradient", gradient)):
        if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
            raise RedHeartError(
                f"CPUAdamW8bit needs contiguous float32 tensors in host memory, this {what} is {x.dtype} on {x.device}, "
                f"strides {x.stride()}: use it under ZeRO with the optimizer offloaded, or bitsandbytes' AdamW8bit on a GPU"
            )
    if copy is not None and (
        copy.device.type != "cpu"
        or copy.dtype != torch.bfloat16
        or not copy.is_contiguous()
        or copy.numel() != p.numel()
    ):
        raise RedHeartError(
            f"CPUAdamW8bit writes copies as contiguous bfloat16 in host memory, {p.numel()} elements here: this one is "
            f"{copy.dtype} on {copy.device}, {copy.numel()} elements"
        )
