"""How a network reads the encoder's layers, and what an average of the weights gives: the same steps with each, over several seeds.

    redheart prepare --source goemotions=PATH --set 'data.encoder.layers=[0,1,2,3,4,5,6]' --out DIR
    python tests/benchmarks/layers.py --data DIR --work DIR --out FILE.json [--preset local] [--read 4+6 --read sums …]

I+J     hidden layers I and J of the data side by side, as a configuration names them
sum     one sum of all hidden layers, each normalized, by learned weights that add up to 1 (Peters et al. 2018, arXiv:1802.05365)
sums    two such sums side by side, as wide as I+J
all     all hidden layers side by side

The plain transformer of bench/plain.py is trained, or with --preset a preset's network, by the loop of `redheart bench control`: AdamW at
a one-cycle rate, batches, losses and looks at dev the product's. Beside every run exponential averages of its weights are kept (decays
in AVERAGES). Judged is dev: its loss with the best weights and with every average after the last step, and macro-F1 of the best. A
finished leg is not run again; one of other data or settings is refused. Legs can be run side by side, by calls with --only for each; a
call without it then finds them done.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from legs import configured, kept, options
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from redheart.bench.plain import PlainTransformer, train_control
from redheart.config import RunConfig
from redheart.console import console
from redheart.data.stream import SampleStream
from redheart.evaluation.answers import answers
from redheart.evaluation.evaluate import evaluate
from redheart.evaluation.measures import measure, over_seeds, paired
from redheart.files import write_json
from redheart.losses.combine import factors
from redheart.model.build import build_model
from redheart.model.redheart import RedHeartModel
from redheart.schema import JUDGED_ORIGINS, LABEL_COLUMNS
from redheart.tasks import constant_losses, task_weights

AVERAGES = (0.99, 0.999)
QUICK = 20.0  # the weights of a sum learn so many times faster than the rest
CPU = torch.device("cpu")


class Reading(nn.Module):
    """Features of all hidden layers side by side [B, T, L·W] -> what the network behind reads [B, T, width]."""

    def __init__(self, read: str, layers: list[int], layer_width: int):
        super().__init__()
        self.shape = (len(layers), layer_width)
        self.chosen = [] if read in ("sum", "sums") else layers if read == "all" else list(map(int, read.split("+")))
        self.places = [layers.index(layer) for layer in self.chosen]
        sums = {"sum": 1, "sums": 2}.get(read, 0)
        self.width = layer_width * (sums or len(self.places))
        self.scores = nn.Parameter(torch.randn(sums, len(layers)) / QUICK)

    def shares(self) -> torch.Tensor:
        """Of every layer [L] in each sum."""
        return (QUICK * self.scores).softmax(1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        layers = features.unflatten(-1, self.shape)
        if self.places:
            return layers[..., self.places, :].flatten(-2)
        alike = nn.functional.layer_norm(layers, self.shape[1:])
        return torch.einsum("sl,btlw->btsw", self.shares(), alike).flatten(-2)


class Reader(nn.Module):
    """A network behind a reading of the layers; called as the network is."""

    def __init__(self, reading: Reading, network: nn.Module):
        super().__init__()
        self.reading, self.network, self.seen = reading, network, 0

    def forward(
        self, features: torch.Tensor, mask: torch.Tensor, contrast: torch.Tensor, *more: Any, **named: Any
    ) -> Any:
        # whose dropout is a function of the samples' positions
        if self.training and isinstance(self.network, RedHeartModel):
            named["sample_keys"] = torch.arange(self.seen, self.seen + len(mask))
            self.seen += len(mask)
        return self.network(self.reading(features), mask, self.reading(contrast), *more, **named)


def leg(read: str, seed: int, config: RunConfig, data: str, preset: str | None, rate: float) -> dict[str, Any]:
    """{parameters, seconds, best_step, dev_loss, averages: {decay: dev loss}, metrics, shares}"""
    train, dev = SampleStream(data, "train"), SampleStream(data, "dev")
    layers = list(train.encoder["layers"])
    weights = factors(
        task_weights(config.loss), constant_losses(*train.label_sample(), config.loss), config.loss.constant_floor
    )
    entries = train.entries_by(JUDGED_ORIGINS) & dev.entries_by(JUDGED_ORIGINS)
    torch.manual_seed(seed)
    reading = Reading(read, layers, train.encoder["width"] // len(layers))
    if preset is None:
        labels = [label for label, where in LABEL_COLUMNS.items() if entries[where].any()]
        network: nn.Module = PlainTransformer(reading.width, 96, labels)
    else:
        wide = config.model.model_copy(update={"encoder_width": reading.width})
        network = build_model(config.model_copy(update={"model": wide}), {**train.encoder, "width": reading.width})
    whole = Reader(reading, network)
    averages = {a: AveragedModel(whole, multi_avg_fn=get_ema_multi_avg_fn(a), use_buffers=False) for a in AVERAGES}

    def keep_averages(trained: nn.Module, _: Any) -> None:
        if trained.training:  # before every step but the first; the last step is added below
            for average in averages.values():
                average.update_parameters(trained)

    hook = whole.register_forward_pre_hook(keep_averages)
    started = time.perf_counter()
    best = train_control(whole, (train, dev), config, weights, rate, f"{read}, seed {seed}")  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    keep_averages(whole, None)
    hook.remove()
    rows = config.training.evaluate_rows
    found = {"last": whole, **{str(a): average.module for a, average in averages.items()}}
    losses = {name: evaluate(it, dev, config.loss, weights, CPU, max_rows=rows).total for name, it in found.items()}
    whole.load_state_dict(best.weights)
    judged = answers(whole, dev)
    return {
        "parameters": sum(p.numel() for p in whole.parameters()), "seconds": seconds, "best_step": best.step,
        "dev_loss": best.value, "averages": losses,
        "metrics": {name: value for name, (_, value) in measure(judged, judged, entries, same_rows=True).items()},
        "shares": {f"sum {i}": dict(zip(map(str, layers), of.tolist(), strict=True)) for i, of in enumerate(reading.shares())},
    }  # fmt: skip


def main() -> None:
    parser = options(__doc__, seeds=3, steps=1356, batch=64)
    parser.add_argument("--preset", help="its network, and not the plain transformer")
    parser.add_argument("--read", action="append", help="[default: 4+6, sum, sums, all]")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    index, reads = SampleStream(a.data, "train").index, a.read or ["4+6", "sum", "sums", "all"]
    found: dict[str, list[dict[str, Any]]] = {read: [] for read in reads}
    for seed in range(a.seeds):
        for read in reads:
            done = a.work / f"{read}-{seed}.json"
            if a.only and done.stem not in a.only:
                continue
            looks = f"training.evaluate_every={a.steps // 8}", "training.best_metric=loss"
            config = configured(a.preset or "local", seed, a.steps, a.batch, *looks)
            run = partial(leg, read, seed, config, a.data, a.preset, a.learning_rate)
            found[read].append(kept(done, config, index, run, preset=a.preset, rate=a.learning_rate))
            console.print(f"{read}, seed {seed}: dev {found[read][-1]['dev_loss']:.4f}, {found[read][-1]['metrics']}")
    if a.only or not a.out:
        return
    values = {read: [{**run["metrics"], "dev_loss": run["dev_loss"]} for run in runs] for read, runs in found.items()}
    write_json(
        a.out,
        {
            "network": a.preset or "plain transformer of width 96", "steps": a.steps, "batch": a.batch,
            "learning_rate": a.learning_rate, "data": Path(a.data).name,
            "metrics": {r: {n: over_seeds([v[n] for v in runs]) for n in runs[0]} for r, runs in values.items()},
            "ahead": {
                r: {n: over_seeds(v) for n, v in paired(runs, values[reads[0]])} for r, runs in values.items() if r != reads[0]
            },
            "legs": found,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
