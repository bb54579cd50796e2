"""How master weights are kept, and what becomes of the loss: the same steps with each, over several seeds.

    python tests/benchmarks/masters.py --data DIR --work DIR --out FILE.json [--preset base --steps 2000 --seeds 5 --batch 4]

fp32    CPUAdamW8bit on fp32 weights, which writes the bfloat16 ones in its pass (optimizer.master: fp32)
split   CPUAdamW8bit on bfloat16 and a byte of remainder (optimizer.master: split)
bf16    DeepSpeedCPUAdam on bfloat16 weights and states, all rounded to the nearest (DeepSpeed's #8010)

The network computes with bfloat16 weights and gives bfloat16 gradients, as training in bf16 does; its arithmetic is fp32, so that a
processor without bf16 can do it. A seed draws initial weights, order, dropout and rounding, the same for all three. Judged is the dev
loss of the weights after the last step. A finished leg is not run again; one of other data or settings is refused. Legs can be run
side by side, by calls with --only for each; a call without it then finds them done.
"""

from __future__ import annotations

import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from legs import configured, kept, options

from redheart.config import RunConfig
from redheart.console import console, progress
from redheart.data.stream import SampleStream
from redheart.evaluation.evaluate import evaluate
from redheart.files import write_json
from redheart.losses.combine import factors
from redheart.model.build import build_model
from redheart.optim import CPUAdamW8bit
from redheart.tasks import constant_losses, task_weights
from redheart.train import stages
from redheart.train.engine import compile_kernels
from redheart.train.engine.base import adamw_arguments, parameter_groups

MASTERS = ("fp32", "split", "bf16")
CPU = torch.device("cpu")


class Host:
    """The optimizer of a way to keep masters; the network's fp32 parameters hold the bfloat16 weights that it wrote."""

    def __init__(self, kept: str, model: torch.nn.Module, config: RunConfig, seed: int):
        groups = parameter_groups(model, config.optimizer.weight_decay)
        self.weights = [p for group in groups for p in group["params"]]
        self.masters = [
            torch.nn.Parameter(w.detach().clone().to(torch.float32 if kept == "fp32" else torch.bfloat16))
            for w in self.weights
        ]
        pairs = iter(self.masters)
        own = [{**group, "params": [next(pairs) for _ in group["params"]]} for group in groups]
        self.gradients = [torch.empty_like(w, dtype=torch.bfloat16) for w in self.weights]
        self.copies: dict[torch.Tensor, torch.Tensor] = {}
        settings = adamw_arguments(config.optimizer)
        if kept == "bf16":
            compile_kernels()
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            self.optimizer: Any = DeepSpeedCPUAdam(own, **settings, adamw_mode=True, fp32_optimizer_states=False)
        else:
            self.optimizer = CPUAdamW8bit(own, **settings, seed=seed, master=kept)
        if kept == "fp32":
            self.copies = {m: torch.empty_like(m, dtype=torch.bfloat16) for m in self.masters}
        if kept == "split":
            for master, weight in zip(self.masters, self.weights, strict=True):
                self.optimizer.set_master_weights(master, weight.detach())
        self._show()

    @torch.no_grad()
    def step(self, rate: float, scale: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        gradients = [weight.grad for weight in self.weights]
        torch._foreach_mul_(gradients, scale)
        torch._foreach_copy_(self.gradients, gradients)
        torch._foreach_zero_(gradients)
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient.to(master.dtype)
        self.optimizer.step(**({"copies": self.copies} if self.copies else {}))
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        written = self.copies and all(master in self.optimizer.state for master in self.masters)
        shown = list(self.copies.values()) if written else [master.bfloat16() for master in self.masters]
        torch._foreach_copy_(self.weights, shown)


def leg(kept: str, config: RunConfig, data: str, note: str) -> dict[str, Any]:
    """{dev_loss, train_loss: of the last tenth, seconds}"""
    settings, steps = config.training, config.training.max_steps
    assert steps is not None
    train, dev = SampleStream(data, "train"), SampleStream(data, "dev")
    torch.manual_seed(settings.seed)
    model = build_model(config, train.encoder).train()
    scales = constant_losses(*train.label_sample(), config.loss)
    weights = factors(task_weights(config.loss), scales, config.loss.constant_floor)
    host = Host(kept, model, config, settings.seed)
    micro, _ = stages.split_global_batch(settings.global_batch_size, settings.micro_batch_size, 1)
    rows = settings.evaluate_rows
    started, late = time.perf_counter(), []
    with progress(note, steps) as (bar, task):
        for step in range(steps):
            window = stages.open_window(
                train.window(step, settings.seed, settings.global_batch_size, micro, 0, 1), stop=False
            )
            total = 0.0
            for batch in window.batches:
                outputs = stages.forward(model, batch.to(CPU, torch.float32))
                loss, _ = stages.compute(outputs, batch, window.counts, weights, 1, config.loss)
                loss.backward()
                total += float(loss.detach())
            norm = torch.nn.utils.get_total_norm([p.grad for p in host.weights])
            most = config.optimizer.max_grad_norm
            host.step(stages.learning_rate_at(step, steps, config.optimizer), min(1.0, most / (float(norm) + 1e-6)))
            if step >= steps - steps // 10:
                late.append(total)
            bar.update(task, completed=step + 1, note=f"loss {total:.3f}")
    seconds = time.perf_counter() - started
    found = evaluate(model, dev, config.loss, weights, CPU, max_rows=rows)
    found.check_finite()
    return {
        "dev_loss": found.total,
        "train_loss": statistics.fmean(late),
        "seconds": seconds,
    }


def main() -> None:
    parser = options(__doc__, seeds=5, steps=2000, batch=4)
    parser.add_argument("--preset", default="base")
    a = parser.parse_args()
    if a.seeds < 2:
        parser.error("--seeds: two at least, for a deviation between them")
    a.work.mkdir(parents=True, exist_ok=True)
    index = SampleStream(a.data, "train").index
    legs: dict[str, dict[str, Any]] = {way: {} for way in MASTERS}
    for seed in range(a.seeds):
        for way in MASTERS:
            done = a.work / f"{way}-{seed}.json"
            if a.only and done.stem not in a.only:
                continue
            config = configured(a.preset, seed, a.steps, a.batch)
            legs[way][str(seed)] = found = kept(done, config, index, partial(leg, way, config, a.data, f"{way} {seed}"))
            console.print(f"{way}, seed {seed}: dev {found['dev_loss']:.4f}, {found['seconds']:.0f} s")
    if a.only or not a.out:
        return
    ends = {way: [leg["dev_loss"] for leg in of_it.values()] for way, of_it in legs.items()}
    write_json(
        a.out,
        {
            "preset": a.preset, "steps": a.steps, "batch": a.batch, "data": Path(a.data).name, "threads": os.environ.get("OMP_NUM_THREADS"),
            "dev_loss": {way: {"mean": statistics.fmean(x), "sd": statistics.stdev(x)} for way, x in ends.items()},
            "legs": legs,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
