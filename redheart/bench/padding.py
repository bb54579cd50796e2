"""Shrink and pad: the other way to make a large network of a small one, which changes its function; `bench transfer` measures growth by it.

The small network's weights, made smaller, are one corner of a fresh large one. As in Ash & Adams (2020), "On Warm-Starting Neural
Network Training", who shrink what was learned so that it can be learned over; padding is their noise.
"""

from __future__ import annotations

from pathlib import Path

import torch

from redheart.config import RunConfig
from redheart.device import tell_deepspeed
from redheart.files import committed_directory
from redheart.model.axes import decays
from redheart.model.growth import Plan, grow_tensor, growth_plans, origins, reachable
from redheart.model.redheart import RedHeartModel
from redheart.train.export import write_card
from redheart.train.grow import handed_on
from redheart.train.stored import open_stored

SHRINK = 0.5  # what weights keep of themselves; vectors, biases and norms stay


def shrink_and_pad(checkpoint: Path, target: RunConfig, out: Path, seed: int) -> None:
    """Writes an export of the target's size to `out`, from which `train --init` goes on."""
    source = open_stored(checkpoint)
    torch.manual_seed(seed)
    model = RedHeartModel(reachable(source.sizes, target))
    plans, learned = growth_plans(source.sizes, model), {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        old = source.read(name)
        if name in learned:
            tensor[corner(old.shape, tensor.shape, plans[name])] = old * (SHRINK if decays(name, old.dim()) else 1.0)
        else:
            tensor.copy_(grow_tensor(old, tensor.shape, plans[name], float("inf"), torch.Generator()))
    config, progress = handed_on(source, target)
    tell_deepspeed()  # Transformers imports it where it saves
    with committed_directory(out) as temporary:
        model.save_pretrained(temporary)
        write_card(temporary, model, config, progress)


def corner(old: torch.Size, new: torch.Size, plan: Plan) -> tuple[torch.Tensor, ...]:
    """Where the entries of a tensor stand in its larger one: at the start of every segment, and in the layers that come from old ones."""
    places = []
    for i, (axis, segments) in enumerate(zip(plan.axes, plan.segments, strict=True)):
        if axis.kind in ("depth", "adds"):
            found = [place for place, (_, is_new) in enumerate(origins(old[i], new[i])) if not is_new]
        else:
            starts = [sum(size for _, size in segments[:n]) for n in range(len(segments))]
            found = [start + k for start, (size, _) in zip(starts, segments, strict=True) for k in range(size)]
        places.append(torch.tensor(found).view([-1 if j == i else 1 for j in range(len(plan.axes))]))
    return tuple(places)
