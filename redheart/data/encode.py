"""The frozen text encoder: texts -> token features (chosen hidden layers, concatenated), without padding.

Any encoder or causal LM that AutoModel loads; `package:smollm2` is the labelling LLM read as an encoder. The fingerprint (name,
revision, layers, width, cut: fingerprint.py) is stored in the index and checked wherever features meet a model.

Several encoders are read as one, by the direct sum of their spaces (`side_by_side`), so nothing that reads features knows of it: the
network's first linear layer is then a projection for each encoder, and the marks are a type embedding. Its input norm divides a token by
that token's own deviation over all E columns: an encoder's values leave it √(E / E_k) larger than alone, whatever the magnitude of the
others (SmolLM2's are 20 times MiniLM's), and the layer's initial weights, drawn for E inputs, are smaller by as much. The mean that it
subtracts is below 0.05 deviations for both.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from redheart.config import EncoderConfig, RemoteConfig
from redheart.console import console, progress, quiet_libraries
from redheart.data.fingerprint import each_of, mean_state, together
from redheart.data.pretrained import encoder_path, naming_model, revision
from redheart.data.reuse import KnownFeatures
from redheart.device import chosen_device
from redheart.files import flush_to_disk
from redheart.ranks import launched_rank, launched_world_size
from redheart.schema import RedHeartError

FLOAT16_MAX = torch.finfo(torch.float16).max


class TextEncoder:
    """`encode` gives one float16 array [T, E] per text, special tokens included, 1 ≤ T ≤ config.most_tokens; of several encoders as in
    `side_by_side`. `each`: the encoders themselves.

    It computes in fp32 on `device`, by default the configuration's; a GPU's features differ from a CPU's by fp16 rounding.
    """

    def __init__(self, config: EncoderConfig, device: torch.device | str | None = None):
        self.config = config
        self.each = [OneEncoder(one, device) for one in config.each]
        self.device = self.each[0].device
        self.fingerprint = together([one.fingerprint for one in self.each])
        self.width: int = self.fingerprint["width"]

    def encode(
        self, texts: Sequence[str], tick: Callable[[float], None] = lambda n: None
    ) -> tuple[list[np.ndarray], list[bool]]:
        """(features in the order of the texts, which texts an encoder cut at max_tokens). `tick(n)` reports n texts done."""
        read = [one.encode(texts, lambda n: tick(n / len(self.each))) for one in self.each]
        if len(read) == 1:
            return read[0]
        cut = [any(cuts) for cuts in zip(*(cuts for _, cuts in read), strict=True)]
        return [side_by_side(states) for states in zip(*(features for features, _ in read), strict=True)], cut

    def cuts(self, texts: Sequence[str]) -> list[bool]:
        """Which texts an encoder would cut at max_tokens."""
        return [any(cuts) for cuts in zip(*(one.cuts(texts) for one in self.each), strict=True)]


def side_by_side(states: Sequence[np.ndarray]) -> np.ndarray:
    """One text's token features by several encoders, [T_k, E_k] each -> float16 [T₁ + T₂ + …, E₁ + E₂ + … + number of encoders].

    Tokens stand encoder by encoder. A token has its values in its encoder's columns, the root of their mean square as a mark in the one
    of the last columns that is its encoder's, and zeros elsewhere. The mark is that large so that it stays the same behind a norm.
    """
    widths = [s.shape[1] for s in states]
    joined = np.zeros((sum(map(len, states)), sum(widths) + len(states)), np.float16)
    row = column = 0
    for number, state in enumerate(states):
        rows = joined[row : row + len(state)]
        rows[:, column : column + state.shape[1]] = state
        rows[:, sum(widths) + number] = np.sqrt(np.square(state.astype(np.float32)).mean(1))
        row, column = row + len(state), column + state.shape[1]
    return joined


class OneEncoder:
    """One of a TextEncoder's, which says what `encode` gives."""

    def __init__(self, config: EncoderConfig, device: torch.device | str | None = None):
        from transformers import AutoModel, AutoTokenizer

        self.config = config
        self.device = chosen_device(device or config.device, "data.encoder.device")
        quiet_libraries()
        path = encoder_path(config.name)
        with naming_model(config.name):
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModel.from_pretrained(path, dtype=torch.float32).to(self.device).eval()
        depth = self.model.config.num_hidden_layers
        wrong = [layer for layer in config.layers if not 0 <= layer <= depth]
        if wrong:
            raise RedHeartError(
                f"encoder {config.name} has hidden layers 0 to {depth}: layer {wrong[0]} of data.encoder.layers is not there"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._shorten(depth)
        self.width = self.model.config.hidden_size * len(config.layers)
        self.fingerprint: dict[str, Any] = {
            "name": config.name,
            "revision": revision(config.name),
            "layers": list(config.layers),
            "width": self.width,
            "max_tokens": config.max_tokens,
        }

    @torch.inference_mode()
    def _shorten(self, depth: int) -> None:
        """Takes out the layers above the last that is read, of models where that changes no bit of what is read of a short text."""
        stack = next((m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth), None)
        deepest = max(self.config.layers) + 1  # one more stays, for behind the last some models put a norm
        if stack is None or deepest >= depth:
            return
        text = self.tokenizer(["A short text."], return_tensors="pt").to(self.device)
        whole, above = self._states(text), list(stack[deepest:])
        del stack[deepest:]
        self.model.config.num_hidden_layers = deepest
        if not torch.equal(self._states(text), whole):
            stack.extend(above)
            self.model.config.num_hidden_layers = depth

    def _states(self, batch: Any) -> torch.Tensor:
        """What is read of tokenized texts, [B, T, width]."""
        states = self.model(**batch, output_hidden_states=True).hidden_states
        return torch.cat([states[layer] for layer in self.config.layers], -1)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], tick: Callable[[int], None]) -> tuple[list[np.ndarray], list[bool]]:
        lengths = self._lengths(texts)
        features: list[np.ndarray | None] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: lengths[i])  # batches of like length
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows], truncation=True, max_length=self.config.max_tokens, padding=True,
                padding_side="right", return_tensors="pt",
            ).to(self.device)  # fmt: skip
            states = self._states(batch)
            largest = float(states[batch["attention_mask"].bool()].abs().max())
            if not largest <= FLOAT16_MAX:  # a NaN too
                raise RedHeartError(
                    f"encoder {self.config.name}: a state of hidden layers {', '.join(map(str, self.config.layers))} is {largest:g}, "
                    f"which exceeds float16 ({FLOAT16_MAX:g}): choose other data.encoder.layers"
                )
            joined = states.half().cpu().numpy()
            for row, state, length in zip(rows, joined, batch["attention_mask"].sum(1).tolist(), strict=True):
                features[row] = state[:length].copy()
            tick(len(rows))
        return [f for f in features if f is not None], self._beyond(lengths)

    def cuts(self, texts: Sequence[str]) -> list[bool]:
        """Which texts `encode` would cut."""
        return self._beyond(self._lengths(texts))

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Of texts in tokens, special ones included, before any cut."""
        ids = self.tokenizer(list(texts), truncation=False, add_special_tokens=True)["input_ids"] if texts else []
        return list(map(len, ids))

    def _beyond(self, lengths: Sequence[int]) -> list[bool]:
        return [length > self.config.max_tokens for length in lengths]


def encode_parts(
    parts: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    work: Path,
    config: EncoderConfig,
    features_from: Sequence[str] = (),
    remote: RemoteConfig | None = None,
) -> tuple[dict[str, Any], np.ndarray, dict[str, list[int]]]:
    """Encodes named parts of the records into `work`, each part a file; parts that are there already are kept. Texts of the prepared
    directories `features_from` have the features that they have there.

    Returns the encoder's fingerprint, the mean states (fingerprint.mean_state) of all texts in the order of the parts and, by source,
    how many texts were cut and how many there are, contrast texts included. Of several processes each encodes its share; only the
    first returns all of it.
    """
    console.print(f"loading the encoder {config.names} …")
    encoder = TextEncoder(config)
    if encoder.device.type != "cpu":
        console.print(f"it computes on {encoder.device} (data.encoder.device)")
    known = KnownFeatures(features_from, encoder.fingerprint, remote or RemoteConfig())
    share = [p for i, p in enumerate(parts) if i % launched_world_size() == launched_rank()]
    with progress("token features", sum(len(records) for _, records in share)) as (bar, task):
        for name, records in share:
            path, key = _part_file(work, name), _key(encoder, records)
            if _is_whole(path, key):
                bar.advance(task, len(records))
            else:
                _encode_part(encoder, known, path, key, records, lambda n: bar.advance(task, n))
    known.tell()
    if launched_rank() > 0:
        return encoder.fingerprint, np.zeros((0, encoder.width), np.float32), {}
    wait_for([_part_file(work, name) for name, _ in parts])
    pooled, cut, total = [], Counter[str](), Counter[str]()
    for name, records in parts:
        saved = _saved(_part_file(work, name))
        pooled.append(saved["pooled"])
        contrasts = [r for r in records if r["contrast_text"] is not None]
        cuts = np.concatenate([saved["cut"], saved["contrast_cut"]])
        for record, was_cut in zip([*records, *contrasts], cuts, strict=True):
            cut[record["source"]] += bool(was_cut)
            total[record["source"]] += 1
    return encoder.fingerprint, np.concatenate(pooled), {source: [cut[source], n] for source, n in total.items()}


def load_part(
    work: Path, name: str, records: Sequence[Mapping[str, Any]]
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(features, contrast features or None) of the records of an encoded part, float16 [T, E] each."""
    saved = _saved(_part_file(work, name))
    features = np.split(saved["features"], np.cumsum(saved["lengths"])[:-1])
    contrasts = iter(np.split(saved["contrast_features"], np.cumsum(saved["contrast_lengths"])[:-1]))
    return [
        (f, None if r["contrast_text"] is None else next(contrasts)) for f, r in zip(features, records, strict=True)
    ]


def contrast_means(
    parts: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], work: Path, made_with: Mapping[str, Any]
) -> np.ndarray:
    """Mean states of the contrast texts that are there, in the order of the encoded parts."""
    means = [np.zeros((0, each_of(made_with)[0]["width"]), np.float32)]
    for name, records in parts:
        means += [mean_state(c, made_with)[None] for _, c in load_part(work, name, records) if c is not None]
    return np.concatenate(means)


def _part_file(work: Path, name: str) -> Path:
    return work / f"encoded-{name}.safetensors"


def _read(
    encoder: TextEncoder, known: KnownFeatures, texts: Sequence[str], tick: Callable[[float], None] = lambda n: None
) -> tuple[list[np.ndarray], list[bool]]:
    """As `encoder.encode`, which is asked for the texts that are not known."""
    features = [known.of(text) for text in texts]
    there = [i for i, f in enumerate(features) if f is not None]
    if not there:
        return encoder.encode(texts, tick)
    tick(len(there))
    others = [i for i, f in enumerate(features) if f is None]
    cut = dict(zip(there, encoder.cuts([texts[i] for i in there]), strict=True))
    for i, f, was_cut in zip(others, *encoder.encode([texts[i] for i in others], tick), strict=True):
        features[i], cut[i] = f, was_cut
    return [f for f in features if f is not None], [cut[i] for i in range(len(texts))]


def _encode_part(
    encoder: TextEncoder,
    known: KnownFeatures,
    path: Path,
    key: bytes,
    records: Sequence[Mapping[str, Any]],
    tick: Callable[[float], None],
) -> None:
    """Writes `key`, the sha256 of all that follows it, and the arrays."""
    features, cut = _read(encoder, known, [r["text"] for r in records], tick)
    contrasts, contrast_cut = _read(
        encoder, known, [r["contrast_text"] for r in records if r["contrast_text"] is not None]
    )
    empty = np.zeros((0, encoder.width), np.float16)
    arrays = {
        "features": np.concatenate(features),
        "lengths": np.array([len(f) for f in features]),
        "contrast_features": np.concatenate([*contrasts, empty]),
        "contrast_lengths": np.array([len(f) for f in contrasts], dtype=np.int64),
        "pooled": np.stack([mean_state(f, encoder.fingerprint) for f in features]),
        "cut": np.array(cut, dtype=np.uint8),
        "contrast_cut": np.array(contrast_cut, dtype=np.uint8),
    }
    # of an array in another order of memory safetensors 0.8 writes the bytes as they lie
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(key + hashlib.sha256(key + content).digest() + content)
    flush_to_disk(temporary)
    temporary.rename(path)


def _key(encoder: TextEncoder, records: Sequence[Mapping[str, Any]]) -> bytes:
    """32 bytes that stand for all that a part depends on."""
    content = json.dumps([encoder.fingerprint, [[r["text"], r["contrast_text"]] for r in records]], sort_keys=True)
    return hashlib.sha256(content.encode()).digest()


def _is_whole(path: Path, key: bytes) -> bool:
    """Whether the part was encoded before, of these texts and by this encoder, and was not damaged since."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return content[:32] == key and content[32:64] == hashlib.sha256(key + content[64:]).digest()


def _saved(path: Path) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    if content[32:64] != hashlib.sha256(content[:32] + content[64:]).digest():
        raise RedHeartError(f"{path} is damaged (its sha256 is not that of its content): run the same command again")
    return load(content[64:])


def wait_for(
    files: Sequence[Path], is_there: Callable[[Path], bool] = Path.is_file, patience_s: float = 1800.0
) -> None:
    """Waits until other processes have written `files`; an error names the first that is missing after `patience_s` of no news."""
    announced = False
    missing, since = [f for f in files if not is_there(f)], time.monotonic()
    while missing:
        time.sleep(0.2)
        left = [f for f in missing if not is_there(f)]
        if len(left) < len(missing):
            since = time.monotonic()
        elif not announced and time.monotonic() - since > 10:
            announced = True
            console.print(
                f"waiting for another of the {launched_world_size()} processes of this launch to write {left[0]} (if nobody started "
                "them: `unset RANK WORLD_SIZE`, and start again) …"
            )
        elif time.monotonic() - since > patience_s:
            raise RedHeartError(f"{left[0]} was not written by another process within {patience_s:g} s: run this again")
        missing = left
