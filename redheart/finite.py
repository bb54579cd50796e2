"""One refusal for what is not a number: comparisons with a NaN are false, so that it would pass or be lost unseen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from redheart.schema import RedHeartError

if TYPE_CHECKING:
    import torch


def check_finite(named: Mapping[str, torch.Tensor]) -> None:
    """Raises RedHeartError that names the first tensor with a NaN or an infinity, how many there are, and where the first is.

    Waits for the device, so the network does not call it within a step.
    """
    for name, values in named.items():
        bad = (~values.detach().isfinite()).flatten().nonzero()
        if len(bad):
            place = int(bad[0])
            raise RedHeartError(
                f"{name}: {len(bad)} of {values.numel()} values are not finite (the first, number {place}, is "
                f"{values.detach().flatten()[place].item()}): leave them out, or mend what made them"
            )
