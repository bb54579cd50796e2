"""The four analyzers: learned queries that read the tokens themselves, beside the heads that read one pooled feature.

tokens [B, T, D], mask [B, T] -> a reading per analyzer, with a state [B, D] for the fusion. Few queries (4 to 8) with deep
layers: D² weights are used once per query, not once per token (layers.FoldedAttention).
"""

from __future__ import annotations

from itertools import chain, combinations
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from redheart.causality.levels import LEVELS
from redheart.model.axes import COPY, FIXED, MATCH, Width
from redheart.model.layers import MLP, Linear, Masks, Norm, QueryStack, full_precision, query
from redheart.schema import BENTHAM, EMOTIONS, EMOTIONS_FINE, LABELS

NUM_STAKEHOLDERS = 6
NUM_STATES = 4  # factual ones, and as many counterfactual ones
SOURCES = ("emotion", "bentham", "context")  # what the SURD analyzer conditions on
SUBSETS = tuple(chain.from_iterable(combinations(range(len(SOURCES)), k) for k in range(len(SOURCES) + 1)))
# people's ratings deviate by about this: the layer that reads them then works in units of one deviation
VAD_SCALE = 0.15


class EmotionAnalysis(NamedTuple):
    fine_logits: torch.Tensor  # [B, 28]
    vad_raw: torch.Tensor  # [B, 3]; tanh gives valence, arousal, dominance
    trajectory: torch.Tensor  # [B, T, 7] logits of each emotion's intensity at each token, latent
    emotion_logits: torch.Tensor  # [B, 7]: the trajectory's smooth maximum over the tokens
    state: torch.Tensor  # [B, D]


class EmotionAnalyzer(nn.Module):
    """Seven emotion queries and one for the whole read the tokens; the emotions' final states score every token.

    An emotion of the text is the log-mean-exp of its trajectory over the real tokens: one strong place is enough.
    """

    def __init__(self, width: Width, heads: int, layers: int, dropout: float):
        super().__init__()
        self.query = query(len(EMOTIONS) + 1, width)
        self.layers = QueryStack(layers, width, heads, dropout)
        self.norm = Norm(width)
        self.place = Linear(width, width, makes=MATCH)
        self.level = Linear(width, 1)
        self.sharpness = nn.Parameter(torch.ones(len(EMOTIONS)))
        self.fine = MLP(width, 2 * width, len(EMOTIONS_FINE), dropout=dropout)
        self.vad = MLP(width, 2 * width, LABELS["vad"].size, dropout=dropout)
        self.axes = {"query": (FIXED, COPY), "sharpness": (FIXED,)}

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor, masks: Masks) -> EmotionAnalysis:
        x = self.norm(self.layers(self.query, tokens, bias, masks))
        (emotions, whole), state = x.split([len(EMOTIONS), 1], 1), x.mean(1)
        scores = torch.bmm(self.place(tokens), emotions.mT) * tokens.shape[-1] ** -0.5
        trajectory = full_precision(scores + self.level(emotions).transpose(1, 2))
        sharp = F.softplus(full_precision(self.sharpness))
        masked = (trajectory * sharp).masked_fill(~mask[..., None], float("-inf"))
        peak = (masked.logsumexp(1) - mask.sum(1, keepdim=True).log()) / sharp
        return EmotionAnalysis(
            self.fine(state, masks), VAD_SCALE * self.vad(whole.squeeze(1), masks), trajectory, peak, state
        )


class BenthamAnalysis(NamedTuple):
    bentham_logits: torch.Tensor  # [B, 7], the stakeholders' variables weighed by their presence
    utility: torch.Tensor  # [B, 1], the felicific sum, unbounded
    acceptability_logits: torch.Tensor  # [B, 1]
    presence: torch.Tensor  # [B, 6] in [0, 1], sums to one, latent
    state: torch.Tensor  # [B, D]


class BenthamCalculator(nn.Module):
    """Stakeholder slots read the tokens; each has seven hedonic variables and a signed pleasure; utility is their sum.

    u = Σ_s presence_s · pleasure_s · Π_k σ(x_sk)^θ_k, θ ≥ 0: Bentham (1789), ch. IV, §V, "sum up all the values of all the
    pleasures on the one side, and of all the pains on the other", with learned exponents for the seven circumstances.
    """

    def __init__(self, width: Width, heads: int, layers: int, dropout: float):
        super().__init__()
        self.query = query(NUM_STAKEHOLDERS, width)
        self.layers = QueryStack(layers, width, heads, dropout)
        self.norm = Norm(width)
        self.presence = MLP(width, 2 * width, 1, dropout=dropout, last_bias=False)  # the softmax ignores a constant
        self.variables = MLP(width, 3 * width, len(BENTHAM), dropout=dropout)
        self.pleasure = MLP(width, 3 * width, 1, dropout=dropout)
        self.exponents = nn.Parameter(torch.full((len(BENTHAM),), -2.0))
        self.acceptability = MLP(width, 4 * width, 1, dropout=dropout)
        self.axes = {"query": (FIXED, COPY), "exponents": (FIXED,)}

    def forward(self, tokens: torch.Tensor, bias: torch.Tensor, masks: Masks) -> BenthamAnalysis:
        x = self.norm(self.layers(self.query, tokens, bias, masks))
        presence = full_precision(self.presence(x, masks)).softmax(1)  # [B, 6, 1]
        variables = full_precision(self.variables(x, masks))
        exponents = F.softplus(full_precision(self.exponents))
        circumstances = (F.logsigmoid(variables) @ exponents)[..., None].exp()
        utility = (presence * full_precision(self.pleasure(x, masks)) * circumstances).sum(1)
        state = (presence.to(x.dtype) * x).sum(1)
        acceptability = self.acceptability(state, masks) + utility
        return BenthamAnalysis((presence * variables).sum(1), utility, acceptability, presence.squeeze(-1), state)


class RegretAnalysis(NamedTuple):
    regret_logits: torch.Tensor  # [B, 1]: utility foregone minus utility had, minus a threshold
    counterfactual_logits: torch.Tensor  # [B, 1]
    utilities: torch.Tensor  # [B, 2]: had, foregone; latent
    state: torch.Tensor  # [B, D]


class RegretAnalyzer(nn.Module):
    """What happened and what might have: regret is the utility foregone minus the utility had (Loomes and Sugden 1982).

    Factual and counterfactual states read the tokens, then each other.
    """

    def __init__(self, width: Width, heads: int, layers: int, dropout: float):
        super().__init__()
        self.query = query(2 * NUM_STATES, width)
        self.layers = QueryStack(layers, width, heads, dropout, sides=2)
        self.norm = Norm(width)
        # a constant cancels in the difference
        self.utility = MLP(width, 2 * width, 1, dropout=dropout, last_bias=False)
        self.threshold = nn.Parameter(torch.zeros(1))
        self.counterfactual = MLP(width + width, width, 1, dropout=dropout)
        self.axes = {"query": (FIXED, COPY), "threshold": (FIXED,)}

    def forward(self, tokens: torch.Tensor, bias: torch.Tensor, masks: Masks) -> RegretAnalysis:
        x = self.norm(self.layers(self.query, tokens, bias, masks))
        states = x.unflatten(1, (2, NUM_STATES)).mean(2)  # [B, 2, D]: factual, imagined
        utilities = full_precision(self.utility(states, masks)).squeeze(-1)
        had, foregone = utilities.split(1, 1)
        counterfactual = self.counterfactual(states.flatten(1), masks)
        return RegretAnalysis(foregone - had - self.threshold, counterfactual, utilities, states.mean(1))


class SurdAnalysis(NamedTuple):
    density_logits: torch.Tensor  # [B, 8, 3]: regret's level given each subset of the sources (order: SUBSETS)
    surd_logits: torch.Tensor  # [B, 4]: as of the SURD head
    state: torch.Tensor  # [B, D]


class SurdAnalyzer(nn.Module):
    """Conditional densities of regret's level given every subset of (emotion, Bentham, context), and what they tell.

    A source that is not in the subset is replaced by a learned vector. From the densities follow the pointwise information
    terms i_j(t) = log₂ p(t | a_j) / p(t) and the SURD ladder on them (causality/surd.py), averaged over t ~ p(t | all);
    a learned scale and offset turn them into the shares' logits.
    """

    def __init__(self, width: Width, dropout: float):
        super().__init__()
        count = len(SOURCES)
        together = width + width + width
        self.sources = MLP(width, width, width, dropout=dropout, count=count)
        self.unknown = query(count, width)
        self.density = MLP(together, 11 * width // 2, 3 * width, dropout=dropout)
        self.level = Linear(3 * width, LEVELS)
        self.norm = Norm(3 * width)
        self.state = Linear(3 * width, width)
        self.scale = nn.Parameter(torch.ones(4))
        self.offset = nn.Parameter(torch.zeros(4))
        inside = torch.tensor([[i in subset for i in range(count)] for subset in SUBSETS])
        self.register_buffer("inside", inside)  # [8, 3]
        self.axes = {"unknown": (FIXED, COPY), "scale": (FIXED,), "offset": (FIXED,), "inside": (FIXED, FIXED)}

    inside: torch.Tensor

    def forward(
        self, emotion: torch.Tensor | None, bentham: torch.Tensor | None, context: torch.Tensor, masks: Masks
    ) -> SurdAnalysis:
        """The sources' states [B, D]; None: of a module that is left out, and then in no subset."""
        sources = (emotion, bentham, context)
        x = self.sources(torch.stack([torch.zeros_like(context) if s is None else s for s in sources], 1), masks)
        inside = self.inside
        if absent := [i for i, source in enumerate(sources) if source is None]:
            # an absent source is never looked at; it passes through so that every parameter has a gradient
            x = x.index_fill(1, torch.tensor(absent, device=x.device), 0.0) + 0.0 * x
            inside = inside.index_fill(1, torch.tensor(absent, device=x.device), False)
        subsets = torch.where(inside[None, :, :, None], x[:, None], self.unknown.to(x.dtype)).flatten(2)  # [B, 8, 3·D]
        hidden = self.norm(self.density(subsets, masks))
        density = full_precision(self.level(hidden))
        shares, leak = pointwise_ladder(density.log_softmax(-1))
        scale, offset = full_precision(self.scale), full_precision(self.offset)
        raw = torch.cat([(shares + 1e-3).log(), torch.logit(leak, eps=1e-4)], -1)
        return SurdAnalysis(density, raw * scale + offset, self.state(hidden[:, -1]))


def pointwise_ladder(log_density: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(level | subset) [B, 8, L] (order: SUBSETS) -> (shares [B, 3]: redundant, unique, synergistic; leak [B, 1]).

    Per level: i_j = log p(t | a_j) - log p(t), floored at zero. Single sources in ascending order: increments are redundant, the last
    one unique. Larger subsets count for what they tell beyond the smaller ones and beyond each other: synergistic. The sums
    are averaged over p(t | all); where nothing is told the shares are equal. leak = 1 - Σ_t p(t | all)².
    """
    of_none, of_some = log_density.split([1, 7], 1)
    singles, together = F.relu(of_some - of_none).split([3, 4], 1)  # [B, subsets, L]
    _, redundant, largest = singles.sort(1).values.split(1, 1)
    most = together.amax(1, keepdim=True).maximum(largest)
    weight = of_some[:, -1:].exp()
    kinds = (torch.cat([redundant, largest - redundant, most - largest], 1) * weight).sum(-1) + 1e-4
    return kinds / kinds.sum(-1, keepdim=True), 1 - weight.square().sum(-1)
