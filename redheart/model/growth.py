"""A trained network -> a wider and deeper one that computes the same function, and can go on learning.

Width (integer ratio r, head width kept): every vector of width n becomes r copies of itself, so LayerNorm's statistics, attention's
scores per head and every element-wise step stay as they were. A weight that reads such a vector is repeated and divided by r along
that axis, and noise that sums to zero over the copies is added there: for r = 2, `[W/2 + N, W/2 - N]`. Copies multiply equal
inputs, so the noise cancels; their gradients differ, so they part. Positions are repeated, not computed anew. Every module declares
what happens along each axis of its parameters and buffers (model/axes.py).

Copies need not have equal shares: with split "asymmetric" the first one keeps three quarters, and the others what remains. Moments of
the optimizer are then carried for the first copies alone, and what reads or makes another one starts with none.

Depth: a new encoder layer is a copy of the one beneath it whose two output projections keep only that noise (nothing, for r = 1), so
it adds zero to the residual stream.

Chen et al. (2016), "Net2Net"; Samragh et al. (2024), "Scaling Smart" (symmetric noise); Wu et al. (2024), "LLaMA Pro" (depth).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch

from redheart.config import ModelConfig, RunConfig
from redheart.model.axes import Axis, axes_of
from redheart.model.redheart import RedHeartConfig, RedHeartModel, RedHeartOutput
from redheart.schema import RedHeartError

Sizes = RedHeartConfig | ModelConfig | RunConfig
Split = Literal["symmetric", "asymmetric"]
UNCHANGED = ("encoder_width", "num_experts")  # what is read, and how many read it
FIRST_SHARE = 0.75  # of the first copy, where a split is asymmetric


def grow(
    model: RedHeartModel,
    target_config: Sizes,
    noise_snr_db: float = 10.0,
    seed: int = 0,
    split: Split = "symmetric",
) -> RedHeartModel:
    """A network of the target's size with `model`'s function, in its dtype, mode (training or not) and place; `model` stays as it is.

    `noise_snr_db`: how far the noise lies beneath the weights it is added to, in rms; infinite: none, and copies stay copies.
    `split`: whether the copies of a vector have equal shares in what reads them.
    Raises RedHeartError where growth cannot reach the target.
    """
    source = model.config
    assert isinstance(source, RedHeartConfig)
    target = reachable(source, target_config)
    with torch.device("meta"):
        grown = RedHeartModel(target)
    state = model.state_dict()
    grown.load_state_dict(dict(grown_tensors(state.__getitem__, source, grown, noise_snr_db, seed, split)), assign=True)
    return grown.train(model.training)


def reachable(source: RedHeartConfig, target_config: Sizes) -> RedHeartConfig:
    """The target's configuration, with the source's encoder, if growth can reach it; otherwise an error that names what it cannot."""
    target = _config_of(target_config)
    for key in UNCHANGED:
        if getattr(source, key) != getattr(target, key):
            raise RedHeartError(
                f"growth keeps {key} and the target changes it from {getattr(source, key)} to {getattr(target, key)}: "
                f"choose a target with {key} = {getattr(source, key)}"
            )
    if set(source.ablate) != set(target.ablate):
        raise RedHeartError(
            f"the network was built without {list(source.ablate) or 'leaving anything out'} and the target without "
            f"{list(target.ablate) or 'leaving anything out'}: growth makes no new module; give both the same model.ablate"
        )
    for key in ("width", "task_width"):
        old, new = getattr(source, key), getattr(target, key)
        if new % old:
            raise RedHeartError(f"growth multiplies {key} by a whole number, and {new} is no multiple of {old}")
    for key, heads in (("width", "heads"), ("task_width", "task_heads")):
        old, new = (getattr(c, key) // getattr(c, heads) for c in (source, target))
        if old != new:
            raise RedHeartError(
                f"growth keeps the width of a head, and {key} / {heads} changes from {old} to {new}: "
                f"choose {heads} = {getattr(target, key) // old}"
            )
    if target.layers < source.layers:
        raise RedHeartError(f"growth only adds layers: the network has {source.layers} and the target {target.layers}")
    sizes = ("width", "task_width", "layers")
    if all(getattr(source, s) == getattr(target, s) for s in sizes):
        raise RedHeartError("the target is as large as the network: nothing would grow")
    target.encoder = source.encoder
    return target


def grown_tensors(
    read: Callable[[str], torch.Tensor],
    source: RedHeartConfig,
    empty: RedHeartModel,
    noise_snr_db: float = 10.0,
    seed: int = 0,
    split: Split = "symmetric",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer of the target, one at a time, from `read(name)` of the source; in the target's order.

    `empty`: a network of the target's size, on the meta device.
    Each tensor's noise depends on `seed` and on its name alone.
    """
    if not noise_snr_db > 0:
        # rounding makes copies differ a little; a layer passes that difference on times 10^(-snr/20), which must not grow
        raise RedHeartError(
            f"the noise must lie beneath the weights: choose a signal-to-noise ratio above 0 dB, not {noise_snr_db:g}"
        )
    shapes, plans = {name: x.shape for name, x in empty.state_dict().items()}, growth_plans(source, empty)
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        yield name, grow_tensor(read(name), shape, plans[name], noise_snr_db, generator, split)


class Plan(NamedTuple):
    """How one parameter or buffer grows: what happens along each axis, and the old and new sizes of the segments of each."""

    axes: tuple[Axis, ...]
    segments: tuple[tuple[tuple[int, int], ...], ...]  # by axis: (old, new) of each segment


def growth_plans(source: RedHeartConfig, empty: RedHeartModel) -> dict[str, Plan]:
    """By name, from networks of both sizes: what their modules declare."""
    with torch.device("meta"):
        small = RedHeartModel(source)
    old, new = dict(axes_of(small)), dict(axes_of(empty))
    tensors = small.state_dict()
    # the fusion projects only states whose width is not its own
    if other := sorted(tensors.keys() ^ empty.state_dict().keys()):
        raise RedHeartError(
            f"growth keeps every tensor and makes no other, and {other[0]} would come or go: choose a target in which width and task_width "
            "are equal if they are so in the network, and differ if they differ"
        )
    sizes = {name: (x.shape, tensors[name].shape) for name, x in empty.state_dict().items()}
    plans = {}
    for name, (after, before) in sizes.items():
        pairs = zip(old[name], new[name], before, after, strict=True)
        segments = [tuple(zip(a.segments or (m,), b.segments or (n,), strict=True)) for a, b, m, n in pairs]
        plans[name] = Plan(new[name], tuple(segments))
    return plans


def origins(old_layers: int, new_layers: int) -> list[tuple[int, bool]]:
    """For every layer of a deeper stack: the old layer it comes from, and whether it is new.

    Old layers spread evenly over the new depth; a new layer copies the nearest old one beneath it.
    """
    numbers = [place * old_layers // new_layers for place in range(new_layers)]
    return [(number, place > 0 and numbers[place - 1] == number) for place, number in enumerate(numbers)]


def shares_of(ratio: int, split: Split) -> list[float]:
    """What each of the `ratio` copies of a vector contributes to what is summed against it; together 1."""
    if split == "symmetric" or ratio == 1:
        return [1 / ratio] * ratio
    return [FIRST_SHARE, *[(1 - FIRST_SHARE) / (ratio - 1)] * (ratio - 1)]


def grow_tensor(
    tensor: torch.Tensor,
    shape: torch.Size,
    plan: Plan,
    noise_snr_db: float,
    generator: torch.Generator,
    split: Split = "symmetric",
) -> torch.Tensor:
    """`tensor` grown to `shape`."""
    axes, segments = plan
    if axes and axes[0].kind in ("depth", "adds"):
        inner = Plan(axes[1:], segments[1:])
        layers = [
            _widen(tensor[number], inner, noise_snr_db, generator, split, silent=is_new and axes[0].kind == "adds")
            for number, is_new in origins(len(tensor), shape[0])
        ]
        return torch.stack(layers)
    return _widen(tensor, plan, noise_snr_db, generator, split)


def _widen(
    tensor: torch.Tensor,
    plan: Plan,
    noise_snr_db: float,
    generator: torch.Generator,
    split: Split,
    silent: bool = False,
) -> torch.Tensor:
    """`silent`: only the noise that cancels, 0 where there is none."""
    kinds = [axis.kind for axis in plan.axes]
    summed = [i for i, kind in enumerate(kinds) if kind in ("read", "match")]
    noisy = summed[-1] if summed else None  # the other axes first: so copies of a row get noise of their own
    for i, (kind, segments) in enumerate(zip(kinds, plan.segments, strict=True)):
        ratios = {_ratio(old, new, kind) for old, new in segments}
        if i != noisy and (ratio := ratios.pop()) > 1:
            factors = [share * ratio**0.5 for share in shares_of(ratio, split)] if kind == "match" else [1.0] * ratio
            tensor = torch.cat([tensor * factor for factor in factors], i)
    if noisy is None:
        return torch.zeros_like(tensor) if silent else tensor.clone()
    grown = []
    pieces = tensor.split([old for old, _ in plan.segments[noisy]], noisy)
    for segment, (old, new) in zip(pieces, plan.segments[noisy], strict=True):
        ratio = _ratio(old, new, kinds[noisy])
        scale = ratio**0.5 if kinds[noisy] == "match" else 1.0
        noise = _cancelling_noise(segment * (scale / ratio), ratio, noise_snr_db, generator)
        for share, part in zip(shares_of(ratio, split), noise, strict=True):
            grown.append(part if silent else segment * (share * scale) + part)
    return torch.cat(grown, noisy)


def grow_moment(
    tensor: torch.Tensor, shape: torch.Size, plan: Plan, power: int, split: Split = "symmetric"
) -> torch.Tensor:
    """The first (`power` 1) or second (2) moment of a parameter's gradient, grown to `shape` as the parameter is.

    A copy of a unit has its share s (1/r; r^-1/2 where axes say match) of the gradient, a weight that reads copies all of it: m·s and
    v·s² along what is copied. Noise is left out of account. A new layer gets the moments of the one it copies. Asymmetric: what is new
    gets none, and a share is nearly s: LayerNorm's centring shares a gradient out evenly.
    """
    kept = split == "symmetric"
    for i, (axis, sizes) in enumerate(zip(plan.axes, plan.segments, strict=True)):
        if axis.kind in ("depth", "adds"):
            tensor = torch.stack(
                [
                    tensor.select(i, number) * (1.0 if kept or not is_new else 0.0)
                    for number, is_new in origins(tensor.shape[i], shape[i])
                ],
                i,
            )
            continue
        grown = []
        for segment, (old, new) in zip(tensor.split([old for old, _ in sizes], i), sizes, strict=True):
            ratio = _ratio(old, new, axis.kind)
            shares = (
                shares_of(ratio, split)
                if axis.kind == "copy"
                else [ratio**-0.5 if axis.kind == "match" else 1.0] * ratio
            )
            grown += [segment * (share**power if kept or c == 0 else 0.0) for c, share in enumerate(shares)]
        tensor = torch.cat(grown, i)
    return tensor


def _ratio(old: int, new: int, kind: str) -> int:
    if new % old or (kind == "fixed" and new != old):
        raise RedHeartError(
            f"growth repeats vectors, and one of {old} entries cannot become one of {new}: choose even widths"
        )
    return new // old


def _cancelling_noise(part: torch.Tensor, ratio: int, snr_db: float, generator: torch.Generator) -> list[torch.Tensor]:
    """`ratio` tensors shaped like `part` that sum to zero, `snr_db` beneath it in rms; for two, one is minus the other."""
    if ratio == 1 or math.isinf(snr_db):
        return [torch.zeros_like(part)] * ratio
    deviation = part.square().mean().sqrt() * 10 ** (-snr_db / 20) / math.sqrt(2)
    drawn = [torch.randn(part.shape, generator=generator).to(part) * deviation for _ in range(ratio)]
    return [a - b for a, b in zip(drawn, [*drawn[1:], drawn[0]], strict=True)]


def tensors_of(outputs: RedHeartOutput) -> dict[str, torch.Tensor]:
    """Every answer, latent and reading of an output, by name."""
    found = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    readings = {f"readings.{n}.{m}": v for n, r in (outputs.readings or {}).items() for m, v in r.items()}
    return found | readings


def relative_differences(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Per output: the largest absolute difference over its scale, the largest absolute value before. Grown vectors are compared
    copy by copy. A difference of two utilities is as exact as they are, however near they lie: their scale is its own."""
    if before.keys() != after.keys():
        raise RedHeartError(f"the outputs differ in kind: {sorted(before.keys() ^ after.keys())}")
    found = {}
    for name, old in before.items():
        terms = name.replace("utility_difference", "utility").replace("readings.preference.", "readings.utility.")
        new, scale = after[name], max(old.abs().max().item(), before[terms].abs().max().item())
        ratio = _ratio(old.shape[-1], new.shape[-1], "copy")
        distance = (new - torch.cat([old] * ratio, -1)).abs().max().item()
        found[name] = distance / scale if scale else math.inf * distance if distance else 0.0
    return found


def _config_of(sizes: Sizes) -> RedHeartConfig:
    """A network's configuration, from itself or from the configuration of a run."""
    if isinstance(sizes, RedHeartConfig):
        return RedHeartConfig(
            **{
                key: getattr(sizes, key)
                for key in (*ModelConfig.model_fields, "encoder")
                if key != "activation_checkpointing"
            }
        )
    values = (sizes.model if isinstance(sizes, RunConfig) else sizes).model_dump()
    del values["activation_checkpointing"]
    return RedHeartConfig(**values)
