"""The utility modules: every module's state and every reading of an answer -> the final, calibrated answers.

An answer is a weighted mean of its readings, the weights read from the text, each reading scaled entry by entry, plus a shift in the
answer's unit, read from the text too. Readings of modules that are absent get no weight. The utility mixes its readings with weights
that do not depend on the text, so that the difference of two texts' utilities stays a difference of the same function. All answers are
computed at once: `Layout` says where each label, each reading and each entry of one stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn.functional import pad

from redheart.model.axes import COPY, FIXED, Width
from redheart.model.layers import (
    Linear,
    Masks,
    Norm,
    QueryStack,
    Residual,
    StackedLinear,
    StackedNorm,
    full_precision,
    query,
)
from redheart.schema import LABELS

Readings = Mapping[str, Mapping[str, torch.Tensor]]  # label -> module -> [B, size]


class Layout:
    """Where things stand when the fused answers are written side by side. `sources`: label -> the modules that read it.

    An entry is one number of a label; a reading is one module's answer for one label, and has as many entries.
    """

    def __init__(self, sources: Mapping[str, Sequence[str]]):
        self.labels = list(sources)
        self.sizes = [LABELS[name].size for name in self.labels]
        self.readings = [(label, module) for label in self.labels for module in sources[label]]
        self.weighed = [i for i, (label, _) in enumerate(self.readings) if len(sources[label]) > 1]
        starts = [0, *accumulate(self.sizes)]
        self.label_of_entry = [i for i, size in enumerate(self.sizes) for _ in range(size)]
        self.label_of_reading = [self.labels.index(label) for label, _ in self.readings]
        self.entries = [  # the entry of the answer that each entry of each reading belongs to
            starts[label] + k for label in self.label_of_reading for k in range(self.sizes[label])
        ]
        self.reading_of_entry = [i for i, label in enumerate(self.label_of_reading) for _ in range(self.sizes[label])]

    def columns(self) -> list[int]:
        """For the first, second, … reading of each entry of the answers: its column among the readings' entries, or the one behind
        the last where it has no such reading."""
        behind, count = len(self.entries), sum(self.sizes)
        of_entry = [[column for column, entry in enumerate(self.entries) if entry == e] for e in range(count)]
        depth = max(map(len, of_entry))
        return [c[d] if d < len(c) else behind for d in range(depth) for c in of_entry]


class Utility(nn.Module):
    """See the module's docstring. `widths`: of the state of every module that is built; `sources`: label -> who reads it, of those;
    `utilities`: the modules that read a utility; `units`: label -> what a shift of 1 adds to its answers."""

    def __init__(
        self,
        width: Width,
        heads: int,
        layers: int,
        widths: Mapping[str, int],
        sources: Mapping[str, Sequence[str]],
        utilities: Sequence[str],
        units: Mapping[str, float],
        dropout: float,
    ):
        super().__init__()
        self.states, self.utilities, self.layout = list(widths), list(utilities), Layout(sources)
        projected = {w: [m for m in widths if widths[m] == w] for w in dict.fromkeys(widths.values()) if w != width}
        self.projected = {f"of_{w}" if not isinstance(w, Width) else "of_tokens": m for w, m in projected.items()}
        self.inputs = nn.ModuleDict(
            {
                key: StackedLinear(len(m), w, width)
                for (key, m), w in zip(self.projected.items(), projected, strict=True)
            }
        )
        self.norms = StackedNorm(len(self.states), width) if self.states else None
        self.task = Norm(width)
        self.digest = Residual(width, 3 * width // 2, dropout=dropout)
        self.query = query(len(self.layout.labels), width)
        self.layers = QueryStack(layers, width, heads, dropout)
        self.norm = Norm(width)
        self.shift = Linear(width, len(self.layout.label_of_entry))
        self.weights = Linear(width, len(self.layout.weighed)) if self.layout.weighed else None
        self.scale = nn.Parameter(torch.ones(len(self.layout.entries))) if self.layout.entries else None
        for linear in (self.shift, self.weights):
            if linear is not None:  # at first an answer is near the plain mean of its readings
                nn.init.normal_(linear.weight, std=0.002)
                nn.init.zeros_(linear.bias)
        count = len(self.utilities)
        self.utility_scale = nn.Parameter(torch.full((count,), 1 / count)) if count else None
        self.register_buffer("units", torch.ones(len(self.layout.labels)))
        self.count_in(units)
        self.axes = {"query": (FIXED, COPY), "scale": (FIXED,), "utility_scale": (FIXED,), "units": (FIXED,)}
        self._tables: dict[torch.device, dict[str, torch.Tensor]] = {}

    units: torch.Tensor

    def count_in(self, units: Mapping[str, float]) -> None:
        """From here on a shift of 1 adds to a label's answers what `units` says; labels it does not name keep what they have."""
        for i, label in enumerate(self.layout.labels):
            self.units[i] = units.get(label, self.units[i])

    def forward(
        self, states: Mapping[str, torch.Tensor], tasks: torch.Tensor, readings: Readings, masks: Masks
    ) -> dict[str, torch.Tensor]:
        """States by module, tasks [B, 4, K] -> final raw answers by label, fp32 [B, size]; `utility` and `preference` where read."""
        memory = self.digest(torch.cat([*self._known(states, tasks.dtype), self.task(tasks)], 1), masks)
        x = self.norm(self.layers(self.query, memory, None, masks))  # [B, labels, K]
        final = self._answers(x, readings)
        mixed = {name: self._mixed(readings[name]) for name in ("utility", "preference") if readings.get(name)}
        return dict(zip(self.layout.labels, final.split(self.layout.sizes, 1), strict=True)) | mixed

    def _known(self, states: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """The states that are there [B, n, K], projected to the fusion's width where they have another, and normed."""
        if self.norms is None or not states:
            return []
        narrow = {m: x.to(dtype) for m, x in states.items()}
        for key, modules in self.projected.items():
            present = [m for m in modules if m in states]
            if present:
                # those that are absent are projected as zeros, and left out below
                like = narrow[present[0]]
                stack = torch.stack([narrow[m] if m in narrow else torch.zeros_like(like) for m in modules], 1)
                narrow |= {m: x for m, x in zip(modules, self.inputs[key](stack).unbind(1), strict=True) if m in states}
        like = next(iter(narrow.values()))
        everyone = [narrow[m] if m in narrow else torch.zeros_like(like) for m in self.states]
        normed = self.norms(torch.stack(everyone, 1))
        places = [i for i, m in enumerate(self.states) if m in states]
        return [normed if len(places) == len(self.states) else normed[:, places]]

    def _answers(self, x: torch.Tensor, readings: Readings) -> torch.Tensor:
        """x [B, labels, K] -> every label's entries side by side, fp32 [B, entries]."""
        layout, tables = self.layout, self._tables_on(x.device)
        # a query gives the entries of its own label, in its unit; of these there are few: all are computed, the others multiplied by zero
        shift = full_precision(self.shift(x))
        answers = (shift * (tables["entry_of_label"] * self.units[:, None]).to(shift.dtype)).sum(1)
        present = [(label, m) for label, m in layout.readings if m in readings.get(label, {})]
        if not present or self.scale is None:
            return answers
        values = [
            full_precision(readings[label][m])
            if (label, m) in present
            else answers.new_zeros(len(x), LABELS[label].size)
            for label, m in layout.readings
        ]
        scaled = torch.cat(values, 1) * full_precision(self.scale)
        shares = self._shares(x, [reading in present for reading in layout.readings])
        if shares is not None:
            scaled = scaled * shares.index_select(1, tables["reading_of_entry"])
        # every entry's readings beside each other, and zeros where it has fewer than another: a sum without atomics
        columns = pad(scaled, (0, 1)).index_select(1, tables["columns"])
        return answers + columns.unflatten(1, (-1, answers.shape[1])).sum(1)

    def _shares(self, x: torch.Tensor, present: list[bool]) -> torch.Tensor | None:
        """[B, readings]: what share each reading that is there has of its label's mean; None where no label has several."""
        if self.weights is None:
            return None
        layout, tables = self.layout, self._tables_on(x.device)
        logits = (full_precision(self.weights(x)) * tables["weighed_of_label"].to(x.dtype)).sum(1)
        if len(layout.weighed) < len(layout.readings):
            logits = logits.new_zeros(len(x), len(layout.readings)).index_copy(1, tables["weighed"], logits)
        others = tables["same_label"].to(logits.dtype)  # [readings, readings]: 0 within a label, else -inf
        if all(present):
            return (logits - (logits[:, None] + others).logsumexp(-1)).exp()
        there = torch.tensor(present, device=x.device)
        others = others.masked_fill(~there & ~torch.eye(len(present), dtype=torch.bool, device=x.device), float("-inf"))
        return (logits - (logits[:, None] + others).logsumexp(-1)).exp() * there

    def _mixed(self, readings: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Utilities, or differences of two, by module, [B, 1] each -> the final one, fp32 [B, 1]; at least one is there."""
        assert self.utility_scale is not None
        scale, present = full_precision(self.utility_scale), [m in readings for m in self.utilities]
        if not all(present):
            scale = scale[[i for i, there in enumerate(present) if there]]
        values = [full_precision(readings[m]) for m in self.utilities if m in readings]
        return (torch.cat(values, 1) @ scale)[:, None]

    @torch.inference_mode(False)  # they serve a training pass as well
    def _tables_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The layout as index tensors and as matrices of zeros and ones (of 0 and -inf for the softmax); made once on a device."""
        if device not in self._tables:
            layout, count = self.layout, len(self.layout.labels)
            own = torch.eye(count)
            of_reading = own[:, layout.label_of_reading]
            same = of_reading.T @ of_reading
            tables = {
                "entry_of_label": own[:, layout.label_of_entry],
                "weighed_of_label": of_reading[:, layout.weighed],
                "same_label": torch.zeros_like(same).masked_fill(same == 0, float("-inf")),
                "weighed": torch.tensor(layout.weighed, dtype=torch.int64),
                "columns": torch.tensor(layout.columns(), dtype=torch.int64),
                "reading_of_entry": torch.tensor(layout.reading_of_entry, dtype=torch.int64),
            }
            self._tables[device] = {name: table.to(device) for name, table in tables.items()}
        return self._tables[device]


def plain_mean(readings: Readings) -> dict[str, torch.Tensor]:
    """The answers of a network without utility modules: the mean of the readings there are, fp32 [B, size]."""
    return {n: torch.stack([full_precision(v) for v in r.values()]).mean(0) for n, r in readings.items() if r}
