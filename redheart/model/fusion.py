"""The utility modules: every module's state and every reading of an answer -> the final, calibrated answers.

FINAL lists, for every answer that is fused, where its readings come from. An answer is a weighted mean of its readings, the
weights read from the text, each reading scaled entry by entry, plus a correction and a bias. Readings of modules that are
absent get no weight. The utility mixes its readings with weights that do not depend on the text, so that the difference of
two texts' utilities stays a difference of the same function.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from redheart.model.layers import Keys, QueryLayer, Residual, full_precision
from redheart.schema import LABELS

FINAL: dict[str, tuple[str, ...]] = {  # label -> the modules that read it, in the order of the weights
    "emotion": ("heads.emotion", "analyzers.emotion", "aux.kalman"),
    "emotion_fine": ("analyzers.emotion",),
    "vad": ("analyzers.emotion",),
    "culture": ("heads.emotion",),
    "bentham": ("heads.bentham", "analyzers.bentham"),
    "ethics": ("heads.bentham",),
    "acceptability": ("heads.bentham", "analyzers.bentham"),
    "regret": ("heads.regret", "analyzers.regret"),
    "counterfactual": ("analyzers.regret",),
    "surd": ("heads.surd", "analyzers.surd"),
}
UTILITY = ("heads.bentham", "analyzers.bentham")
STATES = (  # what the fusion sees of each module
    *("heads.emotion", "heads.bentham", "heads.regret", "heads.surd"),
    *("analyzers.emotion", "analyzers.bentham", "analyzers.regret", "analyzers.surd"),
    *("aux.dsp", "aux.kalman"),
)
Readings = Mapping[str, Mapping[str, torch.Tensor]]  # label -> module -> [B, size]


class Utility(nn.Module):
    """See the module's docstring. `widths` gives the width of the state of every module that is built."""

    def __init__(self, width: int, heads: int, layers: int, widths: Mapping[str, int], dropout: float):
        super().__init__()
        built = [m for m in STATES if m in widths]
        self.sources = {name: [m for m in modules if m in widths] for name, modules in FINAL.items()}
        self.utilities = [m for m in UTILITY if m in widths]
        self.inputs = nn.ModuleDict({_key(m): nn.Linear(widths[m], width) for m in built if not m.startswith("heads.")})
        self.norms = nn.ModuleDict({_key(m): nn.LayerNorm(width) for m in built})
        self.task = nn.LayerNorm(width)
        self.digest = Residual(width, 3 * width // 2, dropout=dropout)
        self.query = nn.Parameter(torch.randn(len(FINAL), width) * 0.02)
        self.layers = nn.ModuleList(QueryLayer(width, heads, dropout, folded=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.correction = nn.ModuleDict({n: nn.Linear(width, LABELS[n].size) for n in FINAL})
        self.weights = nn.ModuleDict({n: nn.Linear(width, len(m)) for n, m in self.sources.items() if len(m) > 1})
        self.scale = nn.ModuleDict({n: Scale(len(m), LABELS[n].size) for n, m in self.sources.items() if m})
        for module in (*self.correction.values(), *self.weights.values()):
            # at first an answer is near the plain mean of its readings
            nn.init.normal_(module.get_parameter("weight"), std=0.002)
            nn.init.zeros_(module.get_parameter("bias"))
        count = len(self.utilities)
        self.utility_scale = nn.Parameter(torch.full((count,), 1 / count)) if count else None

    def forward(
        self, states: Mapping[str, torch.Tensor], tasks: torch.Tensor, readings: Readings, keys: Keys
    ) -> dict[str, torch.Tensor]:
        """States by module, tasks [B, 4, K] -> final raw answers by label, fp32 [B, size]; `utility` and `preference` where read."""
        known = [self.norms[_key(m)](self._project(m, s.to(tasks.dtype))) for m, s in states.items()]
        memory = self.digest(
            torch.cat([torch.stack(known, 1), self.task(tasks)] if known else [self.task(tasks)], 1), keys
        )
        x = self.query.to(tasks.dtype).expand(len(tasks), -1, -1)
        for layer in self.layers:
            x = layer(x, memory, None, keys)
        x = self.norm(x)
        final = {name: self._answer(name, x[:, i], readings.get(name, {})) for i, name in enumerate(FINAL)}
        return final | {name: self._mixed(readings[name]) for name in ("utility", "preference") if readings.get(name)}

    def _project(self, module: str, state: torch.Tensor) -> torch.Tensor:
        """A state in the fusion's width; the heads' have it already."""
        return state if module.startswith("heads.") else self.inputs[_key(module)](state)

    def _answer(self, name: str, x: torch.Tensor, readings: Mapping[str, torch.Tensor]) -> torch.Tensor:
        answer = full_precision(self.correction[name](x))
        present = [i for i, module in enumerate(self.sources[name]) if module in readings]
        if not present:
            return answer
        values = torch.stack([full_precision(readings[self.sources[name][i]]) for i in present], 1)  # [B, R, size]
        values = self.scale[name](values, present)
        if name not in self.weights:
            return answer + values[:, 0]
        weight = full_precision(self.weights[name](x))[:, present].softmax(-1)
        return answer + (weight[..., None] * values).sum(1)

    def _mixed(self, readings: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Utilities, or differences of two, by module, [B, 1] each -> the final one, fp32 [B, 1]; at least one is there."""
        assert self.utility_scale is not None
        scale = full_precision(self.utility_scale)
        parts = [scale[i] * full_precision(readings[m]) for i, m in enumerate(self.utilities) if m in readings]
        return torch.stack(parts).sum(0)


class Scale(nn.Module):
    """Every entry of every reading times a number of its own: [B, R, size], of the readings `present` -> the same shape."""

    def __init__(self, readings: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(readings, size))

    def forward(self, values: torch.Tensor, present: list[int]) -> torch.Tensor:
        return values * full_precision(self.weight)[present]


def plain_mean(readings: Readings) -> dict[str, torch.Tensor]:
    """The answers of a network without utility modules: the mean of the readings there are, fp32 [B, size]."""
    return {n: torch.stack([full_precision(v) for v in r.values()]).mean(0) for n, r in readings.items() if r}


def _key(module: str) -> str:
    return module.replace(".", "_")
