"""Text in, answers out: the trained network behind its frozen encoder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, overload

import torch

from redheart.config import EncoderConfig
from redheart.data.collate import pad
from redheart.data.encode import TextEncoder
from redheart.device import device_of
from redheart.evaluation.evaluate import predict_all
from redheart.memory.swap import place
from redheart.model.redheart import RedHeartModel
from redheart.model.select import MODULES, ExecutionMode
from redheart.schema import CULTURE_HANGUL, LABELS, RedHeartError
from redheart.tasks import TASKS
from redheart.train.export import load_model


class RedHeartPipeline:
    """`pipeline(text)` -> dict, `pipeline([texts])` -> list of dicts; every answer with its named entries in its label's range,
    utility unbounded.

    The network computes on `device`; modules named in `swap` stay on the host and visit it for their turn (memory/swap.py,
    `pipeline.swap.report()`). `modules`: ask these modules alone (model/select.py), for instance ["heads.emotion"]: what they
    do not need stays idle, and answers are their own instead of the fused ones.
    """

    def __init__(
        self,
        model: RedHeartModel,
        encoder: TextEncoder,
        modules: Collection[str] = MODULES,
        device: torch.device | str = "cpu",
        swap: Collection[str] = (),
    ):
        made_with = model.config.encoder
        if made_with is None or made_with["revision"] != encoder.fingerprint["revision"]:
            raise RedHeartError(
                f"this model was trained on features of {made_with}, the encoder here is {encoder.fingerprint}"
            )
        self.model, self.encoder = model, encoder
        model.set_mode(ExecutionMode.INFERENCE, modules)
        self.swap = place(model, device, swap)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        modules: Collection[str] = MODULES,
        device: torch.device | str = "cpu",
        swap: Collection[str] = (),
    ) -> RedHeartPipeline:
        """`path`: an export, a checkpoint, or a run directory (its best checkpoint). Loads the encoder it was trained with."""
        device_of(device)  # before anything is loaded
        model = load_model(Path(path)).model
        made_with = model.config.encoder
        if made_with is None:
            raise RedHeartError(
                f"{path} does not say which encoder it was trained with: export a run of `redheart train`"
            )
        config = EncoderConfig(name=made_with["name"], layers=made_with["layers"], max_tokens=made_with["max_tokens"])
        return cls(model, TextEncoder(config, device), modules, device, swap)

    @overload
    def __call__(self, text: str) -> dict[str, Any]: ...
    @overload
    def __call__(self, text: list[str]) -> list[dict[str, Any]]: ...
    @torch.inference_mode()
    def __call__(self, text: str | list[str]) -> dict[str, Any] | list[dict[str, Any]]:
        texts = [text] if isinstance(text, str) else text
        if not texts or any(not t.strip() for t in texts):
            raise RedHeartError("give at least one text that is not empty")
        features, mask = pad(self.encoder.encode(texts)[0], self.encoder.width)
        outputs = self.model(features.float(), mask)
        found = {n: p for n, p in predict_all(outputs).items() if TASKS[n].final}
        answers = [self._answer({n: p[i] for n, p in found.items()}, outputs, i) for i in range(len(texts))]
        return answers[0] if isinstance(text, str) else answers

    @staticmethod
    def _answer(predictions: dict[str, torch.Tensor], outputs: Any, row: int) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        for name, values in predictions.items():
            label = LABELS[TASKS[name].label]
            if name == "preference" and outputs.utility is not None:  # a pair's answer; one text has a utility instead
                answer["utility"] = float(outputs.utility[row])
            elif label.scalar:
                answer[name] = float(values)
            else:
                answer[name] = {CULTURE_KEYS.get(n, n): float(v) for n, v in zip(label.names, values, strict=True)}
        return answer


CULTURE_KEYS = {name: f"{name} {hangul}" for name, hangul in CULTURE_HANGUL.items()}
