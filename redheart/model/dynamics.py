"""Emotions over token time: a bank of envelopes and oscillators, and a Kalman filter that fuses all readings of emotion.

Both run in fp32 whatever the network computes in. Token time: one token is 1/4 s, the pace of silent reading (about 240
words a minute, Brysbaert 2019, "How many words do we read per minute?").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from redheart.model.analyzers import masked_mean
from redheart.model.layers import MLP, Keys, full_precision
from redheart.schema import EMOTIONS
from redheart.signals.dsp import follow, ring
from redheart.signals.kalman import (
    FilterElement,
    combine,
    predict_element,
    prior_element,
    reduce_elements,
    update_element,
)

TOKEN_RATE_HZ = 4.0
RANGES = {  # of the controls, per emotion; the middle on a log scale is where they start
    "attack_s": (0.05, 4.0),
    "release_s": (0.25, 16.0),
    "frequency_hz": (0.02, 1.0),
    "decay_s": (0.25, 16.0),
}
NUM = len(EMOTIONS)


class DspSimulator(nn.Module):
    """tokens [B, T, D] and the analyzer's trajectory -> signals [B, T, 7]: how each emotion swells, fades and swings.

    A control net reads the whole text and sets, per emotion, attack and release of an envelope (seconds), frequency (Hz)
    and decay (seconds) of a damped oscillator, and the gain of both; an excitation net drives them at every token.
    """

    def __init__(self, width: int, task_width: int, dropout: float):
        super().__init__()
        k = task_width
        self.controls = MLP(width + k, 4 * k, 4 * k, 5 * k // 2, (len(RANGES) + 2) * NUM, dropout=dropout)
        self.excitation = MLP(width, width, NUM, dropout=dropout)
        self.trajectory_gain = nn.Parameter(torch.full((NUM,), 0.5))

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        feature: torch.Tensor,
        trajectory: torch.Tensor | None,
        keys: Keys,
    ) -> torch.Tensor:
        whole = torch.cat([masked_mean(tokens, mask), feature], -1)
        controls = full_precision(self.controls(whole, keys)).unflatten(-1, (-1, NUM)).unbind(1)
        attack, release, frequency, decay = (
            low * (high / low) ** torch.sigmoid(raw)
            for (low, high), raw in zip(RANGES.values(), controls[:4], strict=True)
        )
        drive = full_precision(self.excitation(tokens, keys))
        gain = full_precision(self.trajectory_gain)
        drive = drive + gain * (torch.zeros_like(drive) if trajectory is None else trajectory)
        x = (torch.tanh(drive) * mask[..., None]).transpose(1, 2)  # [B, 7, T]
        swell = follow(x, attack, release, TOKEN_RATE_HZ)
        swing = ring(x, frequency, decay, TOKEN_RATE_HZ)
        loss = -torch.expm1(-1 / (decay * TOKEN_RATE_HZ))[..., None]  # 1 - ρ, so that a steady drive stays of order one
        signals = controls[4][..., None] * swell + controls[5][..., None] * loss * swing
        return signals.transpose(1, 2) * mask[..., None]  # filters ring on behind the last token


class Fused(NamedTuple):
    emotion_logits: torch.Tensor  # [B, 7]
    covariance: torch.Tensor  # [B, 7, 7], positive definite


class KalmanFusion(nn.Module):
    """Fuses three readings of emotion (logits): the analyzer's and the DSP bank's at every token, the head's at the end.

    State [14]: seven emotions and their rates; x_t = F x_{t-1} + N(0, Q), z = H x + c + N(0, R). F, H, c and Q = LLᵀ + εI are
    learned, ‖F‖ ≤ 1 keeps any text's filter stable; R per source and time and the prior (x₀, P₀ ≤ 10) come from the
    features. The posterior after the last token is found by a tree of filter elements (signals/kalman.py), not by a loop
    over T. Latents: rates, R and the covariance; the emotion losses reach them through the gains.
    """

    def __init__(self, width: int, task_width: int, dropout: float):
        super().__init__()
        k = task_width
        step = 1 / TOKEN_RATE_HZ
        eye, zero = torch.eye(NUM), torch.zeros(NUM, NUM)
        self.transition_weight = nn.Parameter(
            torch.cat([torch.cat([eye, step * eye], 1), torch.cat([zero, 0.9 * eye], 1)])
        )
        self.observation_weight = nn.Parameter(torch.cat([eye, zero], 1).repeat(3, 1, 1))  # head, analyzer, DSP
        self.observation_bias = nn.Parameter(torch.zeros(3, NUM))
        self.process_weight = nn.Parameter(0.1 * torch.eye(2 * NUM) + 1e-3)
        self.token_noise = MLP(width, width, 2 * NUM, dropout=dropout)
        self.prior = MLP(width + k, 3 * k, 3 * k, 4 * NUM + NUM, dropout=dropout)

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        feature: torch.Tensor,
        readings: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
        keys: Keys,
    ) -> Fused:
        """`readings`: head [B, 7], analyzer [B, T, 7], DSP [B, T, 7]; None: not measured."""
        prior = full_precision(self.prior(torch.cat([masked_mean(tokens, mask), feature], -1), keys))
        mean, spread, head_noise = prior.split([2 * NUM, 2 * NUM, NUM], -1)
        noise = full_precision(self.token_noise(tokens, keys)).unflatten(-1, (2, NUM))
        head, *per_token = readings
        with torch.autocast(tokens.device.type, enabled=False):
            start = prior_element(mean, torch.diag_embed(10 * torch.sigmoid(spread)))
            vector, information = None, None
            for i, reading in enumerate(per_token):
                if reading is not None:
                    eta, j = self._information(i + 1, full_precision(reading), noise[:, :, i])
                    vector = eta if vector is None else vector + eta
                    information = j if information is None else information + j
            steps = self._steps(mask, vector, information)
            posterior = combine(start, reduce_elements(steps))
            if head is not None:
                posterior = combine(posterior, update_element(*self._information(0, full_precision(head), head_noise)))
            covariance = posterior.C[..., :NUM, :NUM]
        return Fused(posterior.b[..., :NUM], covariance)

    def _steps(
        self, mask: torch.Tensor, vector: torch.Tensor | None, information: torch.Tensor | None
    ) -> FilterElement:
        """One filter element per token [B, T]: predict, then update; the identity where there is no token."""
        weight = full_precision(self.transition_weight)
        transition = weight / torch.linalg.matrix_norm(weight, 2).clamp(min=1)
        factor = full_precision(self.process_weight).tril()
        eye = torch.eye(2 * NUM, dtype=factor.dtype, device=factor.device)
        predict = predict_element(transition, factor @ factor.mT + 1e-4 * eye)
        predict = FilterElement(*(x.expand(*mask.shape, *x.shape) for x in predict))
        if vector is not None and information is not None:
            predict = combine(predict, update_element(vector, information))
        matrix, row = mask[..., None, None], mask[..., None]
        return FilterElement(
            torch.where(matrix, predict.A, eye),
            torch.where(row, predict.b, 0.0),
            torch.where(matrix, predict.C, 0.0),
            torch.where(row, predict.eta, 0.0),
            torch.where(matrix, predict.J, 0.0),
        )

    def _information(self, source: int, z: torch.Tensor, raw_noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(HᵀR⁻¹(z - c) [..., 14], HᵀR⁻¹H [..., 14, 14]) of a reading z [..., 7]; R lies between e⁻⁴ and e⁴."""
        h, c = full_precision(self.observation_weight[source]), full_precision(self.observation_bias[source])
        precision = torch.exp(-4 * torch.tanh(raw_noise / 4))
        return (precision * (z - c)) @ h, (h.mT * precision[..., None, :]) @ h


def posterior_sd(covariance: torch.Tensor) -> torch.Tensor:
    """Standard deviations [B, 7] of a covariance [B, 7, 7]."""
    return covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12).sqrt()
