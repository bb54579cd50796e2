"""Emotions over token time: a bank of envelopes and oscillators, and a Kalman filter that fuses all readings of emotion.

Both run in fp32 whatever the network computes in. Token time: one token is 1/4 s, the pace of silent reading (about 240
words a minute, Brysbaert 2019, "How many words do we read per minute?").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from redheart.model.axes import FIXED, Width
from redheart.model.layers import MLP, Masks, full_precision
from redheart.schema import EMOTIONS
from redheart.signals.dsp import bank
from redheart.signals.kalman import Measurement, contraction, last_posterior

TOKEN_RATE_HZ = 4.0
RANGES = {  # of the controls, per emotion; the middle on a log scale is where they start
    "attack_s": (0.05, 4.0),
    "release_s": (0.25, 16.0),
    "frequency_hz": (0.02, 1.0),
    "decay_s": (0.25, 16.0),
}
NUM = len(EMOTIONS)


class DspReading(NamedTuple):
    signals: torch.Tensor  # [B, T, 7], 0 at padding
    state: torch.Tensor  # [B, 14]: the signals at the last token, and the largest they were


class DspSimulator(nn.Module):
    """tokens [B, T, D] and the analyzer's trajectory -> signals [B, T, 7]: how each emotion swells, fades and swings.

    A control net reads the whole text and sets, per emotion, attack and release of an envelope (seconds), frequency (Hz)
    and decay (seconds) of a damped oscillator, and the gain of both; an excitation net drives them at every token.
    """

    def __init__(self, width: Width, task_width: Width, dropout: float):
        super().__init__()
        k = task_width
        self.controls = MLP(width + k, 4 * k, 4 * k, 5 * k // 2, (len(RANGES) + 2) * NUM, dropout=dropout)
        self.excitation = MLP(width, width, NUM, dropout=dropout)
        self.trajectory_gain = nn.Parameter(torch.full((NUM,), 0.5))
        self.axes = {"trajectory_gain": (FIXED,)}

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        pooled: torch.Tensor,
        feature: torch.Tensor,
        trajectory: torch.Tensor | None,
        masks: Masks,
    ) -> DspReading:
        whole = torch.cat([pooled, feature], -1)
        controls = full_precision(self.controls(whole, masks)).unflatten(-1, (-1, NUM))
        drive = full_precision(self.excitation(tokens, masks))
        gain = full_precision(self.trajectory_gain)
        drive = drive + gain * (torch.zeros_like(drive) if trajectory is None else trajectory)
        signals = bank(drive, mask, controls, RANGES, TOKEN_RATE_HZ)
        last = (mask.sum(1) - 1).clamp(min=0)[:, None, None].expand(-1, 1, NUM)
        return DspReading(signals, torch.cat([signals.gather(1, last)[:, 0], signals.abs().amax(1)], -1))


class Fused(NamedTuple):
    emotion_logits: torch.Tensor  # [B, 7]
    covariance: torch.Tensor  # [B, 7, 7], positive definite
    state: torch.Tensor  # [B, 14]: the logits and their standard deviations


class KalmanFusion(nn.Module):
    """Fuses three readings of emotion (logits): the analyzer's and the DSP bank's at every token, the head's at the end.

    State [14]: seven emotions and their rates; x_t = F x_{t-1} + N(0, Q), z = H x + c + N(0, R). F, H, c and Q = LLᵀ + εI are
    learned, ‖F‖ ≤ 1 keeps any text's filter stable; R per source and time and the prior (x₀, P₀ ≤ 10) come from the features.
    Latents: rates, R and the covariance; the emotion losses reach them through the gains.
    """

    def __init__(self, width: Width, task_width: Width, dropout: float):
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
        self.axes = {
            **dict.fromkeys(("transition_weight", "process_weight", "observation_bias"), (FIXED, FIXED)),
            "observation_weight": (FIXED, FIXED, FIXED),
        }

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        pooled: torch.Tensor,
        feature: torch.Tensor,
        head: torch.Tensor | None,
        trajectory: torch.Tensor | None,
        signals: torch.Tensor | None,
        masks: Masks,
    ) -> Fused:
        """Readings of the head [B, 7], of the analyzer and of the DSP bank [B, T, 7]; None: not measured."""
        prior = full_precision(self.prior(torch.cat([pooled, feature], -1), masks))
        mean, spread, head_noise = prior.split([2 * NUM, 2 * NUM, NUM], -1)
        noise = full_precision(self.token_noise(tokens, masks))  # [B, T, 14]
        with torch.autocast(tokens.device.type, enabled=False):
            weights = full_precision(self.observation_weight).split([1, 2])
            biases = full_precision(self.observation_bias).split([1, 2])
            posterior, covariance = last_posterior(
                mean,
                10 * torch.sigmoid(spread),
                contraction(full_precision(self.transition_weight)),
                self._process_noise(),
                _measurement((trajectory, signals), noise, weights[1], biases[1]),
                _measurement((head,), head_noise, weights[0], biases[0]),
                mask,
            )
        logits, covariance = posterior[..., :NUM], covariance[..., :NUM, :NUM]
        return Fused(logits, covariance, torch.cat([logits, posterior_sd(covariance)], -1))

    def _process_noise(self) -> torch.Tensor:
        factor = full_precision(self.process_weight).tril()
        floor = 1e-4 * torch.eye(2 * NUM, dtype=factor.dtype, device=factor.device)
        return torch.addmm(floor, factor, factor.mT)


def _measurement(
    readings: Sequence[torch.Tensor | None], raw_noise: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> Measurement:
    """n readings [*, 7] at once, with raw_noise [*, 7 n], weight [n, 7, 14], bias [n, 7]. R lies between e⁻⁴ and e⁴; what was not
    measured has no precision."""
    precision = torch.exp(-4 * torch.tanh(raw_noise / 4))
    if any(z is None for z in readings):
        each = zip(precision.split(NUM, -1), readings, strict=True)
        precision = torch.cat([0 * p if z is None else p for p, z in each], -1)
    z = torch.cat([torch.zeros_like(raw_noise[..., :NUM]) if z is None else full_precision(z) for z in readings], -1)
    return Measurement(weight.flatten(0, 1), z - bias.flatten(), precision)


def posterior_sd(covariance: torch.Tensor) -> torch.Tensor:
    """Standard deviations [B, 7] of a covariance [B, 7, 7]."""
    return covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12).sqrt()
