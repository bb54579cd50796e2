"""What the state of an 8-bit parameter holds, and what is refused before the kernel is given an address of it."""

from __future__ import annotations

from typing import Any

import torch

from redheart.schema import RedHeartError

BLOCK = 256
CODES = 3  # the meaning of the codes; another number is another kernel's
CODE_STATES = {"exp_avg_8bit": torch.int8, "exp_avg_sq_8bit": torch.uint8}  # [n]
SCALE_STATES = ("exp_avg_scale", "exp_avg_sq_scale")  # float32 [ceil(n / BLOCK)], powers of two or zero
MANTISSA = "exp_avg_sq_mantissa"  # uint8 [ceil(n / BLOCK)], bits of it in a block's second moments
STATES = (*CODE_STATES, *SCALE_STATES, MANTISSA)
REMAINDER = "weight_remainder"  # int8 [n], of split weights: in 1/256 of the bfloat16's last place, in the codes' order
BARE = {"step", "number", REMAINDER}  # what a state may hold before it has moments
MOST_MANTISSA_BITS = 6
MASTERS = {"fp32": torch.float32, "split": torch.bfloat16}


class OptimizerValueError(RedHeartError, ValueError):
    """Where torch.optim.AdamW raises ValueError: a setting out of range, a state that does not fit."""


class OptimizerRuntimeError(RedHeartError, RuntimeError):
    """Where torch.optim.AdamW raises RuntimeError: tensors that do not fit one another in a step."""


def empty_states(n: int) -> dict[str, torch.Tensor]:
    """Whatever torch's default dtype and device are, which the kernel could not know."""
    sizes = _sizes(n)
    return {name: torch.zeros(sizes[name], dtype=dtype_of(name), device="cpu") for name in STATES}


def _sizes(n: int) -> dict[str, int]:
    return {name: n if name in CODE_STATES else -(-n // BLOCK) for name in STATES}


def dtype_of(name: str) -> torch.dtype:
    """Of one of STATES, or of the remainders."""
    return {**CODE_STATES, MANTISSA: torch.uint8, REMAINDER: torch.int8}.get(name, torch.float32)


def check_states(state: dict[str, Any], n: int) -> None:
    """Raises unless a parameter's state is one that the kernel can be given, for `n` elements."""
    for name, size in _sizes(n).items():
        check_state(state, name, size, n)
    step = state.get("step", 0)
    if int(step) != step or step < 0:
        raise OptimizerValueError(
            f"CPUAdamW8bit: the state's step is {step}, not a number of steps: check the checkpoint"
        )


def check_state(state: dict[str, Any], name: str, size: int, n: int) -> None:
    x = state.get(name)
    if not isinstance(x, torch.Tensor):
        raise OptimizerValueError(f"CPUAdamW8bit: the state has no {name}: {_whose(state)}")
    if x.dtype != dtype_of(name) or x.numel() != size or x.device.type != "cpu" or not x.is_contiguous():
        raise OptimizerRuntimeError(
            f"CPUAdamW8bit: {name} must be {size} contiguous numbers of {dtype_of(name)} in host memory for a parameter of "
            f"{n} elements, this is {x.numel()} of {x.dtype} on {x.device}: was the parameter resized, or the state another's?"
        )


def check_state_dict(state_dict: dict[str, Any], sizes: dict[Any, int]) -> None:
    """Of what may be loaded: our codes, of this version, for parameters of `sizes`, with scales that are powers of two or zero."""
    states = {number: state for number, state in state_dict["state"].items() if state.keys() - BARE}
    for number, state in states.items():
        if not any(name in state for name in STATES):
            raise OptimizerValueError(f"CPUAdamW8bit cannot load the state of parameter {number}: {_whose(state)}")
    if states and any(g.get("codes") != CODES for g in state_dict["param_groups"]):
        raise OptimizerValueError(
            "this checkpoint holds 8-bit optimizer states of another version of Red Heart, whose codes mean other numbers: go "
            "on with that version, or start from its weights with --init"
        )
    for number, state in states.items():
        check_states(state, sizes[number])
        damaged = f"of parameter {number} is damaged: check the checkpoint"
        if (state[MANTISSA] > MOST_MANTISSA_BITS).any():
            raise OptimizerValueError(f"CPUAdamW8bit: {MANTISSA} {damaged}")
        for name in SCALE_STATES:
            mantissa = torch.frexp(state[name]).mantissa
            if not ((mantissa == 0.5) | (mantissa == 0.0)).all():  # NaN, infinities and negative ones are neither
                raise OptimizerValueError(f"CPUAdamW8bit: {name} {damaged}")


def _whose(state: dict[str, Any]) -> str:
    """What a state that is not ours seems to be."""
    keys = set(state)
    if {"exp_avg", "exp_avg_sq"} <= keys:
        return "it is AdamW's in fp32 (exp_avg, exp_avg_sq); set_moments codes such moments into 8 bits"
    if {"state1", "state2"} & keys:
        return "it is bitsandbytes' (state1, state2), whose codes mean other numbers; start from its weights"
    return f"it is another optimizer's, with {', '.join(sorted(map(str, keys))) or 'nothing in it'}"


def check_settings(lr: Any, betas: Any, eps: float, weight_decay: float) -> None:
    """AdamW's rules and words, and eps above zero, without which an element that never had a gradient becomes NaN."""
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise OptimizerValueError("Tensor lr must be 1-element")
    if len({isinstance(beta, torch.Tensor) for beta in betas}) != 1:
        raise OptimizerValueError("betas must be either both floats or both Tensors")
    if not 0 <= float(lr) < float("inf"):
        raise OptimizerValueError(f"Invalid learning rate: {float(lr)} is out of range")
    for index, beta in enumerate(betas):
        if isinstance(beta, torch.Tensor) and beta.numel() != 1:
            raise OptimizerValueError(f"Tensor betas[{index}] must be 1-element")
        if not 0 <= float(beta) < 1:
            raise OptimizerValueError(f"Invalid beta parameter at index {index}: {float(beta)} is out of range")
    if not 0 < eps < float("inf"):
        raise OptimizerValueError(f"Invalid epsilon value: {eps} is out of range")
    if not 0 <= weight_decay < float("inf"):
        raise OptimizerValueError(f"Invalid weight_decay value: {weight_decay} is out of range")


def check_step(p: torch.Tensor, copy: torch.Tensor | None, master: str) -> None:
    gradient = p.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise OptimizerRuntimeError("CPUAdamW8bit does not support sparse gradients, as AdamW does not")
    weights = MASTERS[master]
    for what, x, dtypes in (("parameter", p, (weights,)), ("gradient", gradient, (torch.float32, torch.bfloat16))):
        if x.device.type != "cpu" or x.dtype not in dtypes or not x.is_contiguous():
            raise OptimizerRuntimeError(
                f'CPUAdamW8bit(master="{master}") needs contiguous {str(weights)[6:]} tensors in host memory, this {what} is {x.dtype} '
                f"on {x.device}, strides {x.stride()}: use it under ZeRO with the optimizer offloaded, or bitsandbytes' AdamW8bit "
                "on a GPU"
            )
    if gradient.shape != p.shape:
        raise OptimizerRuntimeError(
            f"CPUAdamW8bit: a parameter is {tuple(p.shape)} and its gradient {tuple(gradient.shape)}: was the parameter resized "
            "after the backward pass?"
        )
    if copy is not None and (
        copy.device.type != "cpu"
        or copy.dtype != torch.bfloat16
        or not copy.is_contiguous()
        or copy.numel() != p.numel()
        or master == "split"
    ):
        raise OptimizerRuntimeError(
            f"CPUAdamW8bit writes copies of fp32 weights, as contiguous bfloat16 in host memory, {p.numel()} elements here: this one "
            f"is {copy.dtype} on {copy.device}, {copy.numel()} elements, of {master} weights"
        )
