"""Exact dropout: which channels of a sample are dropped is a pure function of (sample position, site, channel).

So a run does not depend on its world size, its micro-batch or on when it was interrupted. What a site gives of a sample, be it one
vector, several queries or all tokens, has one mask (the variational dropout of Gal and Ghahramani 2016); encoder layers have no
site, since there it slows learning (model/backbone.py). All masks of a pass come from one hash; no two sites share one.
"""

from __future__ import annotations

import torch
from torch import nn

SITE_STEP = 0x9E3779B1  # the golden ratio in 32 bits: what one site's keys lie apart from the next one's


def mix_bits(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash with good avalanche, element-wise on int32 (in place; the bits are those of unsigned arithmetic)."""
    for _ in range(2):
        x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x45D9F3B)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def dropped(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x [B, …, width] without the channels that mask [B, width] drops."""
    return x if mask is None else x * mask.to(x.dtype).view(len(x), *[1] * (x.dim() - 2), x.shape[-1])


class SampleDropout(nn.Module):
    """Drops channels of a sample at `count` sites, one after the other along an axis of x where they are more than one.

    x [B, …, width], or [B, count, width] -> the same shape; `masks` is what `DropoutMasks` draws, None outside training.
    """

    def __init__(self, width: int, p: float, count: int = 1):
        super().__init__()
        self.p, self.count, self.width = p, count, int(width)
        self.site = self.column = 0  # the first site's number and its first column; set once the network is assembled

    def forward(self, x: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
        if masks is None or self.p == 0:
            return x
        return self.at(0, x, masks) if self.count == 1 else self._all(x, masks)

    def at(self, place: int, x: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
        """x [B, …, width] at the site number `place` of this module."""
        return dropped(x, self.mask(place, masks))

    def mask(self, place: int, masks: torch.Tensor | None) -> torch.Tensor | None:
        """The mask [B, width] of the site number `place` of this module; None where nothing is dropped."""
        if masks is None or self.p == 0:
            return None
        return masks.narrow(1, self.column + place * self.width, self.width)

    def _all(self, x: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        mask = masks.narrow(1, self.column, self.count * self.width)
        return x * mask.to(x.dtype).unflatten(1, (self.count, self.width))


class DropoutMasks:
    """The masks of every dropout of an assembled network, drawn at once.

    `draw(keys)` -> [B, columns], 0 or 1 / (1 - p): every site's channels side by side, in the order of the modules.
    """

    def __init__(self, model: nn.Module):
        self._sites: list[tuple[int, int]] = []  # (number, width)
        self._p = 0.0
        column = 0
        for module in model.modules():
            if isinstance(module, SampleDropout):
                assert not self._sites or self._p == module.p, "one share for all sites"
                module.site, module.column, self._p = len(self._sites), column, module.p
                self._sites += [(len(self._sites) + i, module.width) for i in range(module.count)]
                column += module.count * module.width
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def draw(self, keys: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Masks for the samples at the positions `keys` [B] (int64) of a run; None where nothing is dropped."""
        if self._p == 0 or not self._sites:
            return None
        if keys is None:
            raise ValueError("training with dropout needs `sample_keys`: the samples' positions in the run")
        steps, site_of, channel = self._columns(keys.device)
        rows = mix_bits(((keys[:, None] + steps) & 0xFFFFFFFF).to(torch.int32))  # [B, sites]
        bits = mix_bits(rows.index_select(1, site_of).bitwise_xor_(channel))
        least = int(self._p * 2**32) - 2**31  # bits are compared as unsigned numbers
        return bits.bitwise_xor_(-(2**31)).ge(least).to(dtype).div_(1 - self._p)

    @torch.inference_mode(False)  # they serve any pass
    def _columns(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each site's step [sites], each column's site [columns] and the hash of its channel [columns]; made once on a device."""
        if device not in self._on:
            steps = torch.tensor([SITE_STEP * (number + 1) for number, _ in self._sites], device=device)
            widths = torch.tensor([width for _, width in self._sites], device=device)
            site_of = torch.arange(len(widths), device=device).repeat_interleave(
                widths, output_size=sum(w for _, w in self._sites)
            )
            channel = torch.cat([torch.arange(w, dtype=torch.int32, device=device) for _, w in self._sites])
            self._on[device] = steps, site_of, mix_bits(channel)
        return self._on[device]

    def __deepcopy__(self, memo: object) -> DropoutMasks:
        return self  # nothing of it changes, and a copy of the network has the same sites
