"""Resuming, and answers, on the GPU."""

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import STAND_IN, begin, finish, work

STRATEGIES = ["plain", "zero2", "zero2_offload_8bit", "zero3_offload_8bit", *([] if STAND_IN else ["gpu_8bit"])]
TEXTS = ["I forgot to call my father.", "a warm evening with friends", "they lied"]
WORDS = sorted({w for t in TEXTS for w in t.lower().replace(".", " .").split()})


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, record_property: Any):
    """Bit for bit where the same run repeats itself so; else no further from it than a repetition is."""
    told = work("resume", folder=str(tmp_path), strategies=STRATEGIES)
    record_property("apart", told)
    assert set(told) == set(STRATEGIES)
    assert {s: t for s, t in told.items() if t["resumed"] > 2 * t["again"]} == {}
    if STAND_IN:
        assert all(t["again"] == 0 for t in told.values())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text encoder of two layers with random weights, and a tokenizer of a few words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), **sizes)).save_pretrained(str(folder))
    return str(folder)


def test_the_gpu_answers_as_the_cpu_does(encoder: str, device: str, record_property: Any):
    """Features are rounded to fp16 on their way: an answer differs by some 1e-3 of its range at most."""
    running = [begin("predict", side, encoder=encoder, texts=TEXTS) for side in ("gpu", "cpu")]
    gpu, cpu = (finish(process) for process in running)
    assert gpu["device"].startswith(device)
    assert gpu["encoder_device"].startswith(device)
    assert cpu["encoder_device"] == "cpu"
    pairs = [
        (a, b)
        for x, y in zip(gpu["answers"], cpu["answers"], strict=True)
        for a, b in zip(flat(x), flat(y), strict=True)
    ]
    record_property("largest_difference", max(abs(a - b) for a, b in pairs))
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], abs=2e-3)
    assert len({round(v, 4) for v in flat(gpu["answers"][0])}) > 10  # it says something


def flat(answer: dict[str, Any]) -> list[float]:
    return [v for value in answer.values() for v in (value.values() if isinstance(value, dict) else [value])]
