"""What regret hangs together with: SURD of the model's own answers on held-out texts and of people's labels of them, to be shown.

Target: regret. Agents, as in DESIGN §4a: emotion (valence), Bentham (net value), context (where the text lies along the main
direction of the pooled features). All in thirds, above a shuffled-target null, with intervals of a bootstrap over the texts. It says how
answers, or labels, inform one another, not what causes regret in people.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from redheart.causality.synergy import Informing, informing
from redheart.data.stream import SampleStream
from redheart.evaluation.answers import JUDGES
from redheart.evaluation.evaluate import forward, predict_all
from redheart.evaluation.page import Picture
from redheart.model.layers import attention_bias, mean_of_tokens
from redheart.model.redheart import RedHeartModel
from redheart.schema import EMOTIONS, LABELS, Batch

MAX_ROWS = 4096
LEAST = 200  # texts below which three levels of three agents say nothing
RESAMPLES = 200
NEGATIVE = [EMOTIONS.index(e) for e in ("sadness", "anger", "fear", "disgust")]
AGENTS = ("emotion", "bentham")


@dataclass(frozen=True)
class Causes:
    """What informs the regret that the network predicts, of all texts; and of the `texts` on which people labelled regret and at least
    one agent as well, what informs their labels, with the predictions on these texts and by these agents beside it."""

    predicted: Informing
    labelled: Informing | None = None
    beside: Informing | None = None
    texts: int = 0
    agents: tuple[str, ...] = ()  # whose labels those are

    def rows(self) -> list[tuple[str, str, float, float]]:
        """(kind, agents, bits of the labels, bits of the predictions) of every term above 0 in either, the largest of labels first."""
        if self.labelled is None or self.beside is None:
            return []
        pairs = zip(self.labelled.terms(), self.beside.terms(), strict=True)
        rows = [(kind, agents, bits, other) for (kind, agents, bits), (*_, other) in pairs if bits > 0 or other > 0]
        return sorted(rows, key=lambda row: (-row[2], -row[3]))

    def to_json(self) -> dict[str, Any]:
        """What informs the predicted regret, and `labelled`: the same of labels, and `beside` them."""
        found = self.predicted.to_json()
        if self.labelled and self.beside:
            found["labelled"] = {"texts": self.texts, **self.labelled.to_json(), "beside": self.beside.to_json()}
        return found


@torch.no_grad()
def causes_of_regret(model: RedHeartModel, stream: SampleStream, untrained: Collection[str] = ()) -> Causes | None:
    """SURD in bits over at most 4,096 rows, by the agents that are answered and wholly trained (`untrained`: names of answers and
    entries); None for fewer than 200 rows, without regret, or without any agent."""
    silent = {name.partition(".")[0] for name in untrained}
    if stream.num_rows < LEAST:
        return None
    said: dict[str, list[torch.Tensor]] = {name: [] for name in ("regret", *AGENTS)}
    labels: dict[str, list[torch.Tensor]] = {name: [] for name in said}
    pooled = []
    for batch in stream.in_order(64, max_rows=MAX_ROWS):
        moved = batch.to("cpu", torch.float32)
        answers = predict_all(forward(model, moved))
        for name in said.keys() & answers.keys():
            said[name].append(_quantity(name, answers[name]))
        for name, found in labels.items():
            found.append(_quantity(name, _labelled(batch, name)))
        pooled.append(mean_of_tokens(moved.features, attention_bias(moved.mask, moved.features.dtype)))
    predicted = {name: torch.cat(v).double() for name, v in said.items() if v and name not in silent}
    if "regret" not in predicted or len(predicted) < 2:
        return None
    context = main_direction(torch.cat(pooled))
    told = _informing(predicted, context)
    return beside_labels(told, predicted, {name: torch.cat(v).double() for name, v in labels.items()}, context)


def beside_labels(
    told: Informing, predicted: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor], context: torch.Tensor
) -> Causes:
    """`told` with what informs the labels [N] (NaN: none) of regret, by as many of the predicted agents as 200 texts have beside it."""
    agents = [name for name in AGENTS if name in predicted]
    for chosen in (agents, *([name] for name in agents if len(agents) > 1)):
        known = ~torch.stack([labels[name] for name in ("regret", *chosen)]).isnan().any(0)
        if known.sum() >= LEAST and len(labels["regret"][known].unique()) > 1:
            of, by = ({n: x[n][known] for n in ("regret", *chosen)} for x in (labels, predicted))
            here = context[known]
            return Causes(told, _informing(of, here), _informing(by, here), int(known.sum()), tuple(chosen))
    return Causes(told)


def _informing(values: Mapping[str, torch.Tensor], context: torch.Tensor) -> Informing:
    agents = {name: values[name] for name in AGENTS if name in values} | {"context": context}
    return informing("regret", values["regret"], agents, resamples=RESAMPLES)


def _quantity(name: str, values: torch.Tensor) -> torch.Tensor:
    """Of an answer or its labels [B, size] what SURD reads, [B]: valence of emotions, the mean of the hedonic values, regret itself."""
    if name == "emotion":
        return values[:, EMOTIONS.index("joy")] - values[:, NEGATIVE].amax(-1)
    return values.mean(-1)


def _labelled(batch: Batch, name: str) -> torch.Tensor:
    """What people say of it, [B, size]; NaN where they do not."""
    by_people = torch.isin(batch.origins[:, list(LABELS).index(name)], torch.tensor(JUDGES, dtype=batch.origins.dtype))
    return batch.labels[name].masked_fill(~((batch.weights[name] > 0) & by_people[:, None]), torch.nan)


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
