"""Where a training step's time goes: every module alone, the backbone beside torch's own encoder, FLOPs as counted.

    redheart bench model --preset 330m --json

Features are random numbers of the right shape: speed does not depend on their values. Times are medians of interleaved
repetitions of forward + backward; FLOPs are FlopCounterMode's, and one multiply-add counts as two.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from redheart.bench.timing import interleaved
from redheart.config import RunConfig, load_config
from redheart.console import console
from redheart.device import compute_device
from redheart.losses.combine import combine
from redheart.model.build import build_model
from redheart.model.redheart import RedHeartModel
from redheart.options import Preset, Repeats, Set
from redheart.tasks import loss_counts, task_losses, task_weights
from redheart.train.measure import synthetic_batch

GEMM = 2048  # edge of the matrix product whose speed the modules' is compared with


def bench_model(
    preset: Preset = "330m",
    set_: Set = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=512)] = 64,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1)] = 16,
    repeats: Repeats = 5,
) -> dict[str, Any]:
    """Seconds and FLOPs of a training step, module by module; the backbone beside torch's TransformerEncoder."""
    config = load_config(preset, set_ or ())
    device = compute_device()
    dtype = torch.bfloat16 if config.training.precision == "bf16" and device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    console.print(f"building {config.preset} on {device} in {str(dtype).removeprefix('torch.')} …")
    model = nn.Module.to(build_model(config, None), device=device, dtype=dtype)
    step = _step(model, config, tokens, micro_batch, device, dtype)
    inputs = _capture(model, step)
    encoder = _encoder(config).to(device=device, dtype=dtype).train()
    x = torch.randn(micro_batch, tokens, config.model.width, device=device, dtype=dtype, requires_grad=True)
    hidden = torch.zeros(micro_batch, tokens, dtype=torch.bool, device=device)
    a, b = (torch.randn(GEMM, GEMM, device=device, dtype=dtype) for _ in range(2))
    runs: dict[str, Callable[[], Any]] = {
        "step": step,
        "torch encoder": lambda: _backward(encoder(x, src_key_padding_mask=hidden)),
        "matmul": lambda: a @ b,
        **{name: _alone(model.get_submodule(name), inputs[name]) for name in model.built},
    }
    flops = {}  # forward and backward
    for name in ("step", *model.built):
        with FlopCounterMode(display=False) as counter:
            runs[name]()
        flops[name] = counter.get_total_flops()
    seconds = {name: median(taken) for name, taken in interleaved(runs, repeats).items()}
    modules = {
        name: {
            "seconds": seconds[name],
            "share_of_step": seconds[name] / seconds["step"],
            "flops_per_sample": flops[name] // micro_batch,
            "gflop_per_s": flops[name] / seconds[name] / 1e9,
        }
        for name in model.built
    }
    return {
        "preset": config.preset,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "precision": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "micro_batch_size": micro_batch,
        "step_s": seconds["step"],
        "samples_per_s": micro_batch / seconds["step"],
        "flops_per_sample": flops["step"] // micro_batch,
        "gflop_per_s": {"step": flops["step"] / seconds["step"] / 1e9, "matmul": 2 * GEMM**3 / seconds["matmul"] / 1e9},
        "backbone_s": {"redheart": seconds["backbone"], "torch": seconds["torch encoder"]},
        "ratio_to_torch_encoder": seconds["backbone"] / seconds["torch encoder"],
        "dsp_and_kalman_share": sum(modules[m]["share_of_step"] for m in ("aux.dsp", "aux.kalman")),
        "modules": modules,
    }


def _step(
    model: RedHeartModel, config: RunConfig, tokens: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward, losses and backward of a micro-batch in which everything is labelled, without contrast texts."""
    batch = synthetic_batch(rows, tokens, config.model.encoder_width).to(device, dtype)
    counts, factors = loss_counts(batch.weights, rows), task_weights(config.loss)

    def step() -> None:
        outputs = model(batch.features, batch.mask, sample_keys=batch.keys)
        losses = task_losses(outputs, batch.labels, batch.weights, config.loss)
        combine({n: v for n, (v, _) in losses.items()}, counts, factors, 1).backward()
        model.zero_grad(set_to_none=True)

    return step


def _encoder(config: RunConfig) -> nn.TransformerEncoder:
    c = config.model
    layer = nn.TransformerEncoderLayer(
        c.width, c.heads, 4 * c.width, c.dropout, "gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, c.layers, nn.LayerNorm(c.width), enable_nested_tensor=False)


def _capture(model: RedHeartModel, step: Callable[[], None]) -> dict[str, Any]:
    """What each module is given in a step, as leaves that take gradients."""
    inputs: dict[str, Any] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_()
        return value

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, tree_map(leaf, args))
        )
        for name in model.built
    ]
    step()
    for hook in hooks:
        hook.remove()
    return inputs


def _alone(module: nn.Module, inputs: Any) -> Callable[[], None]:
    def run() -> None:
        _backward(module(*inputs))
        module.zero_grad(set_to_none=True)
        for value in tree_leaves(inputs):
            if isinstance(value, torch.Tensor):
                value.grad = None

    return run


def _backward(outputs: Any) -> None:
    leaves = [v for v in tree_leaves(outputs) if isinstance(v, torch.Tensor) and v.requires_grad]
    torch.stack([v.float().sum() for v in leaves]).sum().backward()
