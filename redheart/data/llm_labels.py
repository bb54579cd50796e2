"""Scores what a record lacks with an LLM in 4 bits on the CPU. The only importer of bitsandbytes' 4-bit side.

No text is generated. The prompt up to the text is run once and its keys and values are cached; each question is a short
suffix, all suffixes run as one batch, and the answer is read from one vector of logits:
    score = Σ_s s·p(s) / Σ_s p(s) / 9  over the digit tokens s = 0 … 9.
The mass Σ p(s) says how far the model meant to answer at all; below `min_mass` the answer is refused, not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redheart.config import LabelerConfig
from redheart.console import quiet_libraries
from redheart.data.pretrained import cache_directory, gguf_file, no_such_model, revision_of
from redheart.data.questions import INSTRUCTION
from redheart.files import committed_directory, verify_manifest
from redheart.schema import RedHeartError

DIGITS = "0123456789"
ENDINGS = ("Answer: ", "Answer:")  # the first one after which every digit is exactly one token


@dataclass(frozen=True)
class Answer:
    score: float  # in [0, 1]
    mass: float  # Σ p(digit) in [0, 1]


class LlmScorer:
    """`score(text, questions)` -> one Answer per question. `fingerprint` names model, weights and quantization."""

    def __init__(self, config: LabelerConfig):
        self.config = config
        quiet_libraries()
        self.model, self.tokenizer, revision = _load(config)
        self.fingerprint: dict[str, Any] = {
            "name": config.name,
            "revision": revision,
            "quantization": config.quantization,
            "min_mass": config.min_mass,
        }
        self.ending, self.digits = _digit_tokens(self.tokenizer)
        self._pad = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        )

    @torch.inference_mode()
    def logits(self, text: str, questions: list[str]) -> torch.Tensor:
        """Next-token logits after each question's suffix, float32 [questions, vocabulary], the text run once."""
        prefix, suffixes = self.prompt(text, questions)
        cache = self.model(input_ids=torch.tensor([prefix]), use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(questions))
        longest = max(len(s) for s in suffixes)
        ids = torch.tensor([s + [self._pad] * (longest - len(s)) for s in suffixes])
        suffix_mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in suffixes])
        mask = torch.cat([torch.ones(len(questions), len(prefix), dtype=torch.long), suffix_mask], 1)
        positions = torch.arange(len(prefix), len(prefix) + longest).expand(len(questions), -1)
        hidden = self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).last_hidden_state
        last = hidden[torch.arange(len(questions)), suffix_mask.sum(1) - 1]
        return self.model.get_output_embeddings()(last).float()

    def score(self, text: str, questions: list[str]) -> list[Answer]:
        """One answer per question about `text`, in their order."""
        if not questions:
            return []
        p = torch.softmax(self.logits(text, questions), -1)[:, self.digits]
        mass = p.sum(-1)
        scale = torch.arange(10.0) / 9
        scores = (p @ scale) / mass.clamp(min=1e-30)
        return [Answer(float(s), float(m)) for s, m in zip(scores, mass, strict=True)]

    def prompt(self, text: str, questions: list[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of the shared prefix (instruction and text) and of each question's suffix."""
        marker = "\0"
        if getattr(self.tokenizer, "chat_template", None):
            whole = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{INSTRUCTION}{marker}"}], tokenize=False, add_generation_prompt=True
            )
        else:
            whole = f"{INSTRUCTION}{marker}\n"
        head, tail = whole.split(marker)
        encode = lambda t: self.tokenizer(t, add_special_tokens=False)["input_ids"]  # noqa: E731
        limit = encode(text)[:512]  # a longer text is read in part; the encoder reads even less of it
        prefix = encode(head) + limit
        return prefix, [encode(f"\n\nQuestion: {question}{tail}{self.ending}") for question in questions]


def _digit_tokens(tokenizer: Any) -> tuple[str, list[int]]:
    """The ending after which each digit is one token, and those ten tokens."""
    for ending in ENDINGS:
        base = tokenizer(ending, add_special_tokens=False)["input_ids"]
        with_digit = [tokenizer(ending + d, add_special_tokens=False)["input_ids"] for d in DIGITS]
        if all(ids[:-1] == base for ids in with_digit) and len({ids[-1] for ids in with_digit}) == 10:
            return ending, [ids[-1] for ids in with_digit]
    raise RedHeartError(
        "this LLM's tokenizer does not give each digit a token of its own: choose another data.labeler.name"
    )


def _load(config: LabelerConfig) -> tuple[Any, Any, str]:
    """(model, tokenizer, revision). A GGUF package is unpacked once into the cache, then loaded like any directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    path = config.name
    if config.name.startswith("package:"):
        gguf = gguf_file(config.name)
        revision = revision_of(str(gguf.parent), None)
        path = str(unpacked(gguf, revision))
    settings: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    if config.quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, **settings).eval()
    except (OSError, ValueError) as error:
        raise no_such_model(config.name, error) from error
    if not config.name.startswith("package:"):
        revision = revision_of(path, getattr(model.config, "_commit_hash", None))
    return model, tokenizer, revision


def unpacked(gguf: Path, revision: str) -> Path:
    """The directory in the cache that holds a GGUF file's weights in bf16; made on first use."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target = cache_directory() / f"{gguf.stem}-{revision.split(':')[1]}"
    if target.is_dir():
        verify_manifest(target)
        return target
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    with committed_directory(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return target
