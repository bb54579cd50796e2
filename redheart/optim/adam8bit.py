"""AdamW on the CPU with one byte per moment: `CPUAdamW8bit`, a torch optimizer around the fused C++ step in csrc/.

States of a parameter with n elements: two codes a piece (n bytes each) and two fp32 scales per block of 256: 2.03 bytes per
element where fp32 Adam keeps 8. Decoupled weight decay (Loshchilov and Hutter 2019); block-wise 8-bit states after Dettmers et
al. (2022), "8-bit Optimizers via Block-wise Quantization", with other codes and stochastic rounding (csrc/adam8bit.cpp says why).
The kernel is compiled once by DeepSpeed's op builder, and cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from redheart.schema import RedHeartError

BLOCK = 256
STATES = ("exp_avg_8bit", "exp_avg_sq_8bit", "exp_avg_scale", "exp_avg_sq_scale")
_kernel: Any = None


def kernel() -> Any:
    """The compiled extension; the first call on a machine compiles it (about half a minute)."""
    global _kernel
    if _kernel is None:
        from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

        class Adam8bitBuilder(CPUOpBuilder):
            BUILD_VAR = "DS_BUILD_REDHEART_ADAM8BIT"
            NAME = "redheart_adam8bit"

            def __init__(self) -> None:
                super().__init__(name=self.NAME)

            def absolute_name(self) -> str:
                return f"redheart.optim.{self.NAME}_op"

            def sources(self) -> list[str]:
                return [str(Path(__file__).parent / "csrc" / "adam8bit.cpp")]

            def include_paths(self) -> list[str]:
                return []

            def cxx_args(self) -> list[str]:
                # without these two gcc keeps scalar square roots and comparisons; neither changes a result
                return [*super().cxx_args(), "-fno-math-errno", "-fno-trapping-math"]

        _kernel = Adam8bitBuilder().load(verbose=False)
    return _kernel


class CPUAdamW8bit(torch.optim.Optimizer):
    """AdamW for fp32 parameters in host memory. `seed` draws the rounding noise: same seed, same run, bit for bit.

    A step with a gradient that is not finite changes nothing and raises FloatingPointError.
    """

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
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
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

        `on_written(start, stop)` is told of every stretch of a copy that is finished. `check_finite=False`: the gradients
        have been looked at already.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in parameters:
            _check(p)
        if check_finite and not all(self._kernel.all_finite(p.grad) for p in parameters):
            raise FloatingPointError("a gradient is not finite: the optimizer has changed nothing")
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is not None:
                    copy = (copies or {}).get(p, torch.empty(0, dtype=torch.bfloat16))
                    self._update(p, group, number, copy)
                    if on_written is not None:
                        on_written(0, p.numel())
        return loss

    def _update(self, p: torch.Tensor, group: dict[str, Any], number: int, copy: torch.Tensor) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            blocks = -(-p.numel() // BLOCK)
            for name in STATES[:2]:
                state[name] = torch.zeros(p.numel(), dtype=torch.uint8)
            for name in STATES[2:]:
                state[name] = torch.zeros(blocks, dtype=torch.float32)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        self._kernel.step(
            p.data, p.grad, *(state[name] for name in STATES), copy,
            group["lr"], beta1, beta2, group["eps"], group["weight_decay"], state["step"], self.seed * 1_000_003 + number,
        )  # fmt: skip

    def adopt_moments(self) -> None:
        """Codes `exp_avg` and `exp_avg_sq` that DeepSpeed has put into the state into 8 bits; `step` stays."""
        for p, state in self.state.items():
            if "exp_avg" in state:
                state["step"] = int(state["step"])
                self.set_moments(p, state.pop("exp_avg"), state.pop("exp_avg_sq"))

    def moments(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and second moments of a parameter as fp32 tensors of its shape."""
        state = self.state[p]
        m, v = torch.empty(p.numel()), torch.empty(p.numel())
        self._kernel.expand(*(state[name] for name in STATES), m, v)
        return m.view_as(p), v.view_as(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn the codes into floats: types and values stay as they were saved."""
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            for name in STATES:
                self.state[order[index]][name] = saved[name].clone()


def expand_states(state: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second) moments of a parameter's 8-bit state as flat fp32 tensors."""
    n = state[STATES[0]].numel()
    m, v = torch.empty(n), torch.empty(n)
    kernel().expand(*(state[name] for name in STATES), m, v)
    return m, v


def _check(p: torch.Tensor) -> None:
    gradient = p.grad
    assert gradient is not None
    for what, x in (("parameter", p), ("gradient", gradient)):
        if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
            raise RedHeartError(
                f"CPUAdamW8bit needs contiguous float32 tensors in host memory, this {what} is {x.dtype} on {x.device}: "
                "use it under ZeRO with the optimizer offloaded, or bitsandbytes' AdamW8bit on a GPU"
            )
