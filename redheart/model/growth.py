"""A trained network -> a wider and deeper one that computes the same function, and can go on learning.

Width (integer ratio r, head width kept): every vector of width n becomes r copies of itself, so LayerNorm's statistics, attention's
scores per head and every element-wise step stay as they were. A weight that reads such a vector is repeated and divided by r along
that axis, and noise that sums to zero over the copies is added there: for r = 2, `[W/2 + N, W/2 - N]`. Copies multiply equal
inputs, so the noise cancels; their gradients differ, so they part. Positions are repeated, not computed anew. RULES says, for every
parameter and buffer, what happens along each of its axes; a parameter without a rule is an error.

Depth: a new encoder layer is a copy of the one beneath it whose two output projections keep only that noise (nothing, for r = 1), so
it adds zero to the residual stream.

Chen et al. (2016), "Net2Net"; Samragh et al. (2024), "Scaling Smart" (symmetric noise); Wu et al. (2024), "LLaMA Pro" (depth).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping

import torch

from redheart.config import ModelConfig, RunConfig
from redheart.model.redheart import RedHeartConfig, RedHeartModel, RedHeartOutput
from redheart.schema import RedHeartError

# What happens along an axis. With ratio r of its sizes:
FIXED = "-"  # it keeps its size
COPY = "copy"  # a grown vector, or the rows that make one: r copies
READ = "read"  # summed against a grown vector: r copies, each a share 1/r, with noise that cancels; `read DK`: of a concatenation
MATCH = "match"  # summed against a grown vector under a factor width^-1/2: r copies, each r^-1/2 of it

_BLOCKS = r"(backbone|analyzers\.(emotion|bentham|regret))\.layers\.\d+"
_ATTENTION = (
    rf"({_BLOCKS}\.attention|{_BLOCKS}\.(read|exchange)|backbone\.cross|heads\.\w+\.branches\.attention"
    r"|heads\.surd\.attentions\.\d|aux\.utility\.layers\.\d+\.(read|exchange))\.(query|key|value|out)"
)
_RESIDUAL = (
    rf"({_BLOCKS}\.mlp|aux\.utility\.layers\.\d+\.mlp|backbone\.specialise\.\w+|heads\.\w+\.branches\.mlp"
    r"|heads\.emotion\.(valence|basic|nuance|culture)|heads\.regret\.had|heads\.surd\.mlps\.\d|aux\.utility\.digest)"
)
_NORMS = (
    rf"({_BLOCKS}\.(norm|exchange_norm)|aux\.utility\.layers\.\d+\.(norm|exchange_norm)|backbone\.(norm|cross_norm|output_norm)"
    rf"|{_RESIDUAL}\.norm|heads\.\w+\.norm|heads\.\w+\.branches\.norm|heads\.surd\.norms\.\d|analyzers\.\w+\.norm"
    r"|aux\.utility\.(norms\.\w+|task|norm))"
)
_INNER = (  # Linear layers from one grown vector to another
    rf"({_ATTENTION}|{_RESIDUAL}\.mlp\.linears\.\d|backbone\.input\.linears\.1|heads\.emotion\.base\.linears\.\d"
    r"|heads\.emotion\.emotion\.linears\.0|heads\.bentham\.theories\.\w+\.linears\.\d"
    r"|heads\.bentham\.(bentham|utility|acceptability)\.linears\.0|heads\.regret\.views\.\w+\.linears\.\d"
    r"|heads\.regret\.regret\.linears\.[01]|heads\.surd\.(redundant|unique|synergistic|leak)\.linears\.1"
    r"|analyzers\.emotion\.(fine|vad)\.linears\.0|analyzers\.bentham\.(presence|variables|pleasure|acceptability)\.linears\.0"
    r"|analyzers\.regret\.utility\.linears\.0|analyzers\.surd\.(sources\.\d\.linears\.\d|density\.linears\.1|state)"
    r"|aux\.dsp\.(controls\.linears\.[12]|excitation\.linears\.0)|aux\.kalman\.(token_noise\.linears\.0|prior\.linears\.1)"
    r"|aux\.utility\.inputs\.analyzers_\w+)"
)
_LAST = (  # Linear layers from a grown vector to an answer, a gate or a control
    r"(heads\.emotion\.(emotion\.linears\.1|experts\.gate)|heads\.bentham\.(verdicts\.\w+|gate)"
    r"|heads\.bentham\.(bentham|utility|acceptability)\.linears\.1|heads\.regret\.(outcome\.\w+|mix|regret\.linears\.2)"
    r"|heads\.surd\.(share\.\d|leak\.linears\.2)|analyzers\.emotion\.(level|(fine|vad)\.linears\.1)"
    r"|analyzers\.bentham\.(presence|variables|pleasure|acceptability)\.linears\.1"
    r"|analyzers\.regret\.(utility|counterfactual)\.linears\.1|analyzers\.surd\.level"
    r"|aux\.dsp\.(controls\.linears\.3|excitation\.linears\.1)|aux\.kalman\.(token_noise\.linears\.1|prior\.linears\.2)"
    r"|aux\.utility\.(correction|weights)\.\w+)"
)
_FIRST = (
    r"(backbone\.input\.linears\.0|aux\.utility\.inputs\.aux_\w+)"  # Linear layers from a vector that keeps its size
)
_JOINED = {  # Linear layers that read concatenated vectors: of the backbone's width D, of a task's width K
    "DK": r"aux\.(dsp\.controls|kalman\.prior)\.linears\.0",
    "DD": r"analyzers\.regret\.counterfactual\.linears\.0",
    "DDD": r"analyzers\.surd\.density\.linears\.0",
    "KK": r"heads\.surd\.(redundant|synergistic)\.linears\.0",
    "KKKK": r"heads\.surd\.(unique|leak)\.linears\.0",
}
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (  # (the whole name, what happens along each axis)
    (rf"{_INNER}\.weight", (COPY, READ)),
    (rf"{_INNER}\.bias", (COPY,)),
    (rf"{_LAST}\.weight", (FIXED, READ)),
    (rf"{_LAST}\.bias", (FIXED,)),
    (rf"{_FIRST}\.weight", (COPY, FIXED)),
    (rf"{_FIRST}\.bias", (COPY,)),
    *((rf"{name}\.weight", (COPY, f"{READ} {segments}")) for segments, name in _JOINED.items()),
    *((rf"{name}\.bias", (COPY,)) for name in _JOINED.values()),
    (r"heads\.emotion\.culture_out\.weight", (FIXED, f"{READ} KK")),
    (r"heads\.emotion\.culture_out\.bias", (FIXED,)),
    (rf"{_NORMS}\.(weight|bias)", (COPY,)),
    (r"backbone\.input_norm\.(weight|bias)", (FIXED,)),
    (r"backbone\.positions", (FIXED, COPY)),
    (r"backbone\.pooling\.(query|value_bias)", (FIXED, COPY, FIXED)),
    (r"backbone\.pooling\.(key_weight|value_weight)", (FIXED, COPY, FIXED, READ)),
    (r"heads\.emotion\.experts\.(in_weight|out_weight)", (FIXED, COPY, READ)),
    (r"heads\.emotion\.experts\.(in_bias|out_bias)", (FIXED, COPY)),
    (r"(analyzers\.(emotion|bentham|regret)|aux\.utility)\.query", (FIXED, COPY)),
    (r"analyzers\.surd\.unknown", (FIXED, COPY)),
    (r"analyzers\.emotion\.place\.weight", (MATCH, READ)),
    (r"analyzers\.emotion\.place\.bias", (MATCH,)),
    (r"analyzers\.emotion\.sharpness|analyzers\.bentham\.exponents|analyzers\.regret\.threshold", (FIXED,)),
    (r"analyzers\.surd\.(scale|offset)|aux\.dsp\.trajectory_gain|aux\.utility\.utility_scale", (FIXED,)),
    (r"analyzers\.surd\.inside|aux\.kalman\.(transition|process)_weight", (FIXED, FIXED)),
    (r"aux\.kalman\.observation_bias|aux\.utility\.scale\.\w+\.weight", (FIXED, FIXED)),
    (r"aux\.kalman\.observation_weight", (FIXED, FIXED, FIXED)),
)
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(.+)")
_OUTPUTS = r"(attention\.out|mlp\.mlp\.linears\.1)\.(weight|bias)"  # what an encoder layer adds to the residual stream

Sizes = RedHeartConfig | ModelConfig | RunConfig


def grow(model: RedHeartModel, target_config: Sizes, noise_snr_db: float = 10.0, seed: int = 0) -> RedHeartModel:
    """A network of the target's size with `model`'s function, in its dtype, mode (training or not) and place; `model` stays as it is.

    `noise_snr_db`: how far the noise lies beneath the weights it is added to, in rms; infinite: none, and copies stay copies.
    Raises RedHeartError where growth cannot reach the target.
    """
    source = model.config
    assert isinstance(source, RedHeartConfig)
    target = reachable(source, target_config)
    with torch.device("meta"):
        grown = RedHeartModel(target)
    state = model.state_dict()
    grown.load_state_dict(dict(grown_tensors(state.__getitem__, source, grown, noise_snr_db, seed)), assign=True)
    return grown.train(model.training)


def reachable(source: RedHeartConfig, target_config: Sizes) -> RedHeartConfig:
    """The target's configuration, with the source's encoder, if growth can reach it; otherwise an error that names what it cannot."""
    target = _config_of(target_config)
    for key in ("encoder_width", "num_experts"):
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
    target = empty.config
    assert isinstance(target, RedHeartConfig)
    widths = {"D": (source.width, target.width), "K": (source.task_width, target.task_width)}
    for name, place in empty.state_dict().items():
        origin, is_new = origin_of(name, source.layers, target.layers)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        silent = is_new and re.search(_OUTPUTS + "$", name) is not None
        yield name, grow_tensor(read(origin), place.shape, axes_of(name), widths, noise_snr_db, generator, silent)


def axes_of(name: str) -> tuple[str, ...]:
    """What happens along each axis of a parameter or buffer."""
    found = [axes for pattern, axes in RULES if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise RedHeartError(f"model/growth.py has {len(found)} rules for {name}: RULES needs exactly one")
    return found[0]


def origin_of(name: str, old_layers: int, new_layers: int) -> tuple[str, bool]:
    """(the parameter of the source that one of the target comes from, whether it belongs to a new encoder layer).

    Old layers spread evenly over the new depth; a new layer copies the nearest old one beneath it.
    """
    found = _LAYER.fullmatch(name)
    if found is None:
        return name, False
    place = int(found[1])
    number = place * old_layers // new_layers
    is_new = place > 0 and (place - 1) * old_layers // new_layers == number
    return f"backbone.layers.{number}.{found[2]}", is_new


def grow_tensor(
    tensor: torch.Tensor,
    shape: torch.Size,
    axes: tuple[str, ...],
    widths: Mapping[str, tuple[int, int]],
    noise_snr_db: float,
    generator: torch.Generator,
    silent: bool = False,
) -> torch.Tensor:
    """`tensor` grown to `shape`; `widths`: (old, new) of D and K. `silent`: only the noise that cancels, 0 where there is none."""
    assert len(axes) == tensor.dim() == len(shape)
    summed = [i for i, axis in enumerate(axes) if axis not in (FIXED, COPY)]
    noisy = summed[-1] if summed else None  # the other axes first: so copies of a row get noise of their own
    for i, axis in enumerate(axes):
        if i != noisy and (ratio := _ratio(tensor.shape[i], shape[i], axis)) > 1:
            tensor = torch.cat([tensor * ratio**-0.5 if axis == MATCH else tensor] * ratio, i)
    if noisy is None:
        return torch.zeros_like(tensor) if silent else tensor.clone()
    power = -0.5 if axes[noisy] == MATCH else -1.0
    joined = axes[noisy].partition(" ")[2]
    sizes = [widths[letter] for letter in joined] or [(tensor.shape[noisy], shape[noisy])]
    grown = []
    for segment, (old, new) in zip(tensor.split([old for old, _ in sizes], noisy), sizes, strict=True):
        ratio = _ratio(old, new, READ)
        part = segment * ratio**power
        noise = _cancelling_noise(part, ratio, noise_snr_db, generator)
        grown += [n if silent else part + n for n in noise]
    return torch.cat(grown, noisy)


def grow_moment(
    tensor: torch.Tensor,
    shape: torch.Size,
    axes: tuple[str, ...],
    widths: Mapping[str, tuple[int, int]],
    power: int,
) -> torch.Tensor:
    """The first (`power` 1) or second (2) moment of a parameter's gradient, grown as the parameter is.

    A copy of a unit has the share 1/r of its gradient (r^-1/2 where axes say MATCH), a weight that reads copies all of it: m / r and
    v / r² along what is copied. Noise is left out of account. A new layer gets the moments of the one it copies.
    """
    for i, axis in enumerate(axes):
        joined = axis.partition(" ")[2]
        sizes = [widths[letter] for letter in joined] or [(tensor.shape[i], shape[i])]
        segments = tensor.split([old for old, _ in sizes], i)
        ratios = [_ratio(old, new, axis) for old, new in sizes]
        tensor = torch.cat([x for segment, ratio in zip(segments, ratios, strict=True) for x in [segment] * ratio], i)
        if axis in (COPY, MATCH):
            tensor = tensor * ratios[0] ** (power * (-1.0 if axis == COPY else -0.5))
    return tensor


def _ratio(old: int, new: int, axis: str) -> int:
    if new % old or (axis == FIXED and new != old):
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
        ratio = _ratio(old.shape[-1], new.shape[-1], COPY)
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
