"""RedHeartOutput: what a forward pass gives, a field per answer and per latent of model/parts.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from redheart.model.parts import PARTS
from redheart.schema import LABELS


def _answer_fields() -> dict[str, str]:
    fields = {a.label: a.output_name for part in reversed(PARTS) for a in reversed(part.answers) if not a.name}
    missing = LABELS.keys() - fields.keys()
    assert not missing, f"no part of model/parts.py answers {', '.join(sorted(missing))}"
    return {label: fields[label] for label in LABELS}


# label -> the field of RedHeartOutput with its final raw answer, in the order of schema.LABELS
ANSWER_FIELDS = _answer_fields()


def _fields() -> Iterator[tuple[str, str]]:
    """(name, what it holds)"""
    for label, name in ANSWER_FIELDS.items():
        if name == "utility_difference":
            yield "utility", "[B, 1], unbounded"
            yield name, "[B, 1], text minus contrast; 0 where there is no contrast"
        else:
            yield name, f"[B, {LABELS[label].size}], raw answer of `{label}`: tasks.TASKS has its link"
    for part in PARTS:
        yield from ((a.output_name, f"raw answer `{part.name}/{a.name}`") for a in part.answers if a.name)
        yield from ((name, f"`{latent}` of {part.name}, latent") for latent, name in part.latents.items())
    yield "task_features", "[B, 4, K], the backbone's, latent"
    yield "hidden_states", "[B, T, D] each: what enters the backbone's layers, and each one's output"
    yield "readings", "label -> module -> that module's own answer [B, size]"


if TYPE_CHECKING:

    class RedHeartOutput(ModelOutput):
        readings: dict[str, dict[str, torch.Tensor]] | None

        def __init__(self, **fields: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    RedHeartOutput = dataclasses.make_dataclass(
        "RedHeartOutput",
        [(name, Any, None) for name, _ in _fields()],
        bases=(ModelOutput,),
        namespace={"__module__": __name__},
    )
    RedHeartOutput.__doc__ = "\n".join(
        [
            "Final answers, the readings they were fused from, and latents; None where every module that could give it is left out.",
            "Answers are fp32 (fp64 in an fp64 network).",
            "",
            *(f"{name}: {what}" for name, what in _fields()),
        ]
    )
