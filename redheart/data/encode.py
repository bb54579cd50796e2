"""The frozen text encoder: texts -> token features (chosen hidden layers, concatenated), without padding.

Any encoder or causal LM that AutoModel loads. The fingerprint (name, revision, layers, width, cut) is stored in the
index and checked wherever features meet a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from redheart.config import EncoderConfig
from redheart.console import quiet_libraries
from redheart.data.pretrained import encoder_path, no_such_model, revision_of
from redheart.schema import RedHeartError


class TextEncoder:
    """`encode` gives one float16 array [T, E] per text, 1 ≤ T ≤ max_tokens, special tokens included."""

    def __init__(self, config: EncoderConfig, device: str = "cpu"):
        from transformers import AutoModel, AutoTokenizer

        self.config, self.device = config, device
        quiet_libraries()
        path = encoder_path(config.name)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModel.from_pretrained(path, dtype=torch.float32).to(device).eval()
        except (OSError, ValueError) as error:
            raise no_such_model(config.name, error) from error
        depth = self.model.config.num_hidden_layers
        wrong = [layer for layer in config.layers if not 0 <= layer <= depth]
        if wrong:
            raise RedHeartError(
                f"encoder {config.name} has hidden layers 0 to {depth}: layer {wrong[0]} of data.encoder.layers is not there"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.width = self.model.config.hidden_size * len(config.layers)
        self.fingerprint: dict[str, Any] = {
            "name": config.name,
            "revision": revision_of(path, getattr(self.model.config, "_commit_hash", None)),
            "layers": list(config.layers),
            "width": self.width,
            "max_tokens": config.max_tokens,
        }

    @torch.inference_mode()
    def encode(
        self, texts: Sequence[str], tick: Callable[[int], None] = lambda n: None
    ) -> tuple[list[np.ndarray], int]:
        """(features in the order of the texts, number of texts that were cut at max_tokens). `tick(n)` reports n texts done."""
        ids = self.tokenizer(list(texts), truncation=False, add_special_tokens=True)["input_ids"] if texts else []
        cut = sum(len(i) > self.config.max_tokens for i in ids)
        features: list[np.ndarray | None] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))  # batches of like length
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows], truncation=True, max_length=self.config.max_tokens, padding=True,
                padding_side="right", return_tensors="pt",
            ).to(self.device)  # fmt: skip
            states = self.model(**batch, output_hidden_states=True).hidden_states
            joined = torch.cat([states[layer] for layer in self.config.layers], -1).half().cpu().numpy()
            lengths = batch["attention_mask"].sum(1).tolist()
            for row, state, length in zip(rows, joined, lengths, strict=True):
                features[row] = state[:length].copy()
            tick(len(rows))
        return [f for f in features if f is not None], cut


def check_encoder(made_with: dict[str, Any], wanted: EncoderConfig, model_width: int) -> None:
    """Raises unless features made with the fingerprint `made_with` fit the configured encoder and a model `model_width` wide."""
    if made_with["width"] != model_width:
        raise RedHeartError(
            f"the data's features are {made_with['width']} wide ({made_with['name']}, layers {made_with['layers']}) but "
            f"model.encoder_width is {model_width}: choose data.encoder.layers or --set model.encoder_width={made_with['width']}"
        )
    ours = {"name": wanted.name, "layers": list(wanted.layers), "max_tokens": wanted.max_tokens}
    for key, value in ours.items():
        if made_with[key] != value:
            raise RedHeartError(
                f"the data was encoded with {key} = {made_with[key]!r} but data.encoder.{key} is {value!r}: "
                "prepare the data again, or --set it to what the data has"
            )
