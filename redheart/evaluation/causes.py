"""What regret hangs together with: SURD of the model's own answers on held-out texts, to be shown to the user.

Target: predicted regret. Agents, as in DESIGN §4a: emotion (valence), Bentham (net value), context (where the text lies along the main
direction of the pooled features). All in thirds, above a shuffled-target null. Derived from predictions: it says how the
answers inform one another, not what causes regret in people.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from redheart.causality.synergy import Informing, informing
from redheart.data.stream import SampleStream
from redheart.evaluation.evaluate import forward, predict_all
from redheart.evaluation.page import Picture
from redheart.model.analyzers import masked_mean
from redheart.model.redheart import RedHeartModel
from redheart.schema import EMOTIONS

MAX_ROWS = 4096
LEAST = 200  # texts below which three levels of three agents say nothing
NEGATIVE = [EMOTIONS.index(e) for e in ("sadness", "anger", "fear", "disgust")]


@torch.no_grad()
def causes_of_regret(model: RedHeartModel, stream: SampleStream) -> Informing | None:
    """SURD in bits over at most 4,096 rows; None for fewer than 200 rows, or where the network lacks one of the answers."""
    if stream.num_rows < LEAST:
        return None
    rows, pooled = [], []
    for batch in stream.in_order(64, max_rows=MAX_ROWS):
        moved = batch.to("cpu", torch.float32)
        answers = predict_all(forward(model, moved))
        if not {"regret", "emotion", "bentham"} <= answers.keys():
            return None
        emotion = answers["emotion"]
        valence = emotion[:, EMOTIONS.index("joy")] - emotion[:, NEGATIVE].amax(-1)
        rows.append(torch.stack([answers["regret"][:, 0], valence, answers["bentham"].mean(-1)]))
        pooled.append(masked_mean(moved.features, moved.mask))
    regret, emotion, bentham = torch.cat(rows, 1).double()
    return informing(
        "regret", regret, {"emotion": emotion, "bentham": bentham, "context": main_direction(torch.cat(pooled))}
    )


def main_direction(x: torch.Tensor) -> torch.Tensor:
    """Where each row of [N, n] lies along the first principal component, [N], fp64; its sign makes the mean of cubes positive."""
    centred = x.double() - x.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    place = centred @ vectors[:, -1]
    return place * (1.0 if place.pow(3).sum() >= 0 else -1.0)


def picture(causes: Informing) -> Picture:
    """Bars of every term in bits."""
    size = (4.6, 0.9 + 0.35 * max(len(causes.rows()), 1))
    return Picture("causes_of_regret.png", f"what informs {causes.target}", [partial(_panel, causes)], size)


def _panel(causes: Informing, axes: Any) -> None:
    colours = {"redundant": "tab:blue", "unique": "tab:orange", "synergistic": "tab:green"}
    rows = causes.rows()
    names, bits = [f"{kind}: {agents}" for kind, agents, _ in rows], [v for *_, v in rows]
    axes.barh(names, bits, color=[colours[kind] for kind, *_ in rows])
    axes.invert_yaxis()
    axes.set(xlabel=f"bits about {causes.target}, of {causes.mutual_information:.3f} in all")
