"""What an index, a checkpoint and an export say of the encoder that made the features: its fingerprint.

Of one encoder: name, revision, layers, width, max_tokens. Of several, side by side as encode.py says, the same of all together (`name` and
`revision` joined by " + ", `layers` one list for each, `width` and `max_tokens` those of a text's features), and under `encoders`
every one's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from redheart.config import EncoderConfig, RunConfig
from redheart.schema import RedHeartError

FEATURES = {"name", "layers", "max_tokens", "beside"}  # of data.encoder: what features are made with


def together(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fingerprint of encoders side by side; of a single one its own."""
    if len(each) == 1:
        return each[0]
    return {
        "name": " + ".join(e["name"] for e in each),
        "revision": " + ".join(e["revision"] for e in each),
        "layers": [e["layers"] for e in each],
        "width": sum(e["width"] for e in each) + len(each),
        "max_tokens": sum(e["max_tokens"] for e in each),
        "encoders": list(each),
    }


def each_of(made_with: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Every encoder's own fingerprint."""
    found: Sequence[Mapping[str, Any]] = made_with.get("encoders", [made_with])
    return found


def config_of(made_with: Mapping[str, Any]) -> EncoderConfig:
    """The configuration that loads what made the features."""
    first, *others = each_of(made_with)
    beside = [{"name": e["name"], "layers": e["layers"]} for e in others]
    return EncoderConfig(name=first["name"], layers=first["layers"], max_tokens=first["max_tokens"], beside=beside)


def mean_state(features: np.ndarray, made_with: Mapping[str, Any]) -> np.ndarray:
    """The vector by which texts are compared: the mean of token features [T, E], float32 [E]; of several encoders the first one's [E₁]."""
    first, *others = each_of(made_with)
    if others:
        own = features[:, -len(others) - 1] != 0  # see encode.side_by_side
        features = features[own, : first["width"]]
    mean: np.ndarray = features.astype(np.float32).mean(0)
    return mean


def with_encoder(config: RunConfig, made_with: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run on features with the fingerprint `made_with`: their encoder and width, where it names no other."""
    encoder, model = config.data.encoder, config.model
    if not FEATURES & encoder.model_fields_set:
        theirs = config_of(made_with)
        encoder = encoder.model_copy(update={key: getattr(theirs, key) for key in FEATURES})
    if "encoder_width" not in model.model_fields_set:
        model = model.model_copy(update={"encoder_width": made_with["width"]})
    return config.model_copy(update={"data": config.data.model_copy(update={"encoder": encoder}), "model": model})


def check_encoder(made_with: Mapping[str, Any], config: EncoderConfig, model_width: int) -> None:
    """Raises unless features made with the fingerprint `made_with` fit the configured encoder and a model `model_width` wide."""
    if made_with["width"] != model_width:
        raise RedHeartError(
            f"the data's features are {made_with['width']} wide ({made_with['name']}, layers {made_with['layers']}) but "
            f"model.encoder_width is {model_width}: choose data.encoder.layers or --set model.encoder_width={made_with['width']}"
        )
    ours = [{"name": e.name, "layers": list(e.layers), "max_tokens": e.max_tokens} for e in config.each]
    for key in ("name", "layers", "max_tokens"):
        theirs, wanted = ([e[key] for e in side] for side in (each_of(made_with), ours))
        if theirs != wanted:
            had, value = (side[0] if len(side) == 1 else side for side in (theirs, wanted))
            several = ", with data.encoder.beside," if len(theirs) + len(wanted) > 2 else ""
            raise RedHeartError(
                f"the data was encoded with {key} = {had!r} but data.encoder.{key}{several} is {value!r}: "
                "prepare the data again, or --set it to what the data has"
            )
