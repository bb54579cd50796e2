"""Korean texts: refused by an encoder that cannot read them, prepared with a small multilingual one built here."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from redheart.config import DataConfig, EncoderConfig, LabelerConfig
from redheart.data.gather import Gathered, set_aside
from redheart.data.prepare import prepare
from redheart.data.pretrained import encoder_path
from redheart.data.readable import Reader
from redheart.data.store import Store
from redheart.schema import RedHeartError

KOREAN = [
    "오늘은 친구와 함께 저녁을 먹어서 정말 기뻤다.",
    "할머니가 보고 싶어서 밤새 울었다.",
    "약속을 지키지 못해 너무 미안하다.",
    "사람들 앞에서 체면을 잃고 말았다.",
    "옛 친구를 만나 정을 나누었다.",
    "그때 그 말을 하지 말았어야 했다.",
]
ENGLISH = ["I had dinner with a friend today.", "I broke my promise, and I am sorry."]


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers with a WordPiece vocabulary of both languages, saved as Transformers saves any model."""
    directory = tmp_path_factory.mktemp("encoder")
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.NFC()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces.train_from_iterator(KOREAN + ENGLISH, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = [{"text": t, "lang": "ko", "culture": {"jeong": 0.5}} for t in KOREAN] + [{"text": t} for t in ENGLISH]
    (tmp_path / "both.json").write_text(json.dumps(rows), encoding="utf-8")
    return f"both={tmp_path / 'both.json'}"


def test_an_encoder_refuses_a_language_it_cannot_read_and_says_how_badly(source: str, tmp_path: Path):
    with pytest.raises(RedHeartError, match=r"6 records are in 'ko'.* \d+\.\d% of their pieces are unknown to it"):
        prepare([source], tmp_path / "out", DataConfig())
    assert not (tmp_path / "out").exists()


def test_korean_is_prepared_with_a_multilingual_encoder(source: str, multilingual: Path, tmp_path: Path):
    encoder = EncoderConfig(name=str(multilingual), layers=(1, 2), languages=("en", "ko"))
    report = prepare([source], tmp_path / "out", DataConfig(encoder=encoder, labeler=LabelerConfig(max_texts=0)))
    assert sum(report.rows.values()) == 8
    from datasets import load_dataset

    rows = [
        r for split in load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")).values() for r in split
    ]
    korean = {r["text"]: r for r in rows if r["lang"] == "ko"}
    assert set(korean) == set(KOREAN)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(multilingual)
    model = BertModel.from_pretrained(multilingual).eval()
    for text, row in korean.items():
        given = tokenizer(text, return_tensors="pt")
        assert tokenizer.unk_token_id not in given["input_ids"][0].tolist()
        with torch.no_grad():
            states = model(given["input_ids"], output_hidden_states=True).hidden_states
        expected = torch.cat([states[1], states[2]], -1)[0].numpy()
        found = np.asarray(row["features"], np.float32).reshape(-1, 64)
        assert np.abs(found - expected).max() < 5e-3  # float16
    assert Store(tmp_path / "out").index["encoder"]["width"] == 64


UNREADABLE = {
    "am": "ዛሬ በጣም ደስተኛ ነኝ",
    "ko": "오늘은 친구와 함께 저녁을 먹어서 정말 기뻤다.",
    "ru": "Сегодня я очень счастлив.",
    "th": "วันนี้ฉันมีความสุขมาก",
    "ta": "நான் இன்று மிகவும் மகிழ்ச்சியாக இருக்கிறேன்",
    "zh": "我今天非常高兴",
    "pictures alone": "😂😂😂",
    "nothing that is seen": "\u200b\u200b",
}
READABLE = [
    "I am so happy today :)",
    "lol",
    "No.",
    "2020",
    "Ich war gestern überglücklich.",
    "OMG WTF!!",
    "I ❤ you, my dear.",
]


@pytest.fixture(scope="module")
def minilm() -> Reader:
    return Reader(AutoTokenizer.from_pretrained(encoder_path("package:minilm")))


def test_an_english_tokenizer_reads_english_and_says_what_it_cannot(minilm: Reader):
    assert [r.reason for r in minilm(READABLE)] == [""] * len(READABLE)
    assert [name for name, r in zip(UNREADABLE, minilm(list(UNREADABLE.values())), strict=True) if not r.reason] == []
    assert [r.tokens for r in minilm(["I am so happy today", ""])] == [7, 2]  # [CLS] and [SEP] too
    assert minilm([]) == []


def test_a_tokenizer_that_spells_everything_is_not_judged_by_it(multilingual: Path, minilm: Reader):
    korean = Reader(PreTrainedTokenizerFast.from_pretrained(multilingual))
    assert [r.reason for r in korean(KOREAN)] == [""] * len(KOREAN)
    assert all(r.reason for r in minilm(KOREAN))


def put(path: Path, texts: list[str]) -> str:
    path.write_text(json.dumps([{"text": t, "label": "joy", "split": "train"} for t in texts]), encoding="utf-8")
    return f"mine={path}"


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_text_that_cannot_be_read_is_refused_without_being_told_its_language(name: str, tmp_path: Path):
    config = DataConfig(labeler=LabelerConfig(max_texts=0))
    source = put(tmp_path / "mixed.json", [*ENGLISH, UNREADABLE[name]])
    with pytest.raises(
        RedHeartError,
        match=r"mine: 1 of 3 records cannot be read by encoder package:minilm.* record 2: .*data\.encoder\.name",
    ):
        prepare([source], tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_skip_invalid_sets_aside_what_cannot_be_read(tmp_path: Path):
    config = DataConfig(labeler=LabelerConfig(max_texts=0))
    source = put(tmp_path / "mixed.json", [*ENGLISH, *UNREADABLE.values()])
    report = prepare([source], tmp_path / "out", config, skip_invalid=True)
    facts = report.sources["mine"]
    assert (facts["rows_read"], facts["rows_kept"], facts["rows_rejected"], report.rejected) == (10, 2, 8, 8)
    assert facts["splits"] == report.rows == {"train": 2, "dev": 0, "test": 0}
    assert sum(facts["rejected"].values()) == 8
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["content"] for line in lines] == list(UNREADABLE.values())
    with pytest.raises(RedHeartError, match=r"no record is left of mine \("):
        prepare([put(tmp_path / "all.json", list(UNREADABLE.values()))], tmp_path / "none", config, skip_invalid=True)


def test_a_few_of_a_published_corpus_are_left_out_aloud_and_many_are_refused():
    records = [{"id": str(n), "source": "s", "split": "train", "text": "t"} for n in range(200)]
    facts = {
        "rows_read": 200,
        "rows_kept": 200,
        "rows_rejected": 0,
        "splits": {"train": 200},
        "rejected": {},
        "left_out": {},
    }
    gathered = Gathered(records, {"s": facts}, [], {str(n): f"row {n}" for n in range(200)}, frozenset({"s"}))
    found, left = set_aside(gathered, records, {"7": "spelled", "9": "spelled"}, False, "e")
    assert [r["id"] for r in left] == [str(n) for n in range(200) if n not in (7, 9)]
    assert (found.sources["s"]["rows_kept"], found.sources["s"]["rows_rejected"], len(found.refused)) == (198, 2, 2)
    many = {str(n): "spelled" for n in range(3)}
    with pytest.raises(
        RedHeartError, match="3 of 200 records cannot be read by encoder e, the first in row 0: spelled"
    ):
        set_aside(gathered, records, many, False, "e")
    with pytest.raises(RedHeartError, match="1 of 200"):
        set_aside(replace(gathered, published=frozenset()), records, {"7": "spelled"}, False, "e")


def test_a_syllable_of_hangul_is_more_than_a_letter():
    """What is written in words that a vocabulary knows by syllables is read; the same in the letters of its syllables is spelled."""
    text = "핵노잼 진심 실망 돈아까워"
    by_syllable = pieces_of([*dict.fromkeys(text.replace(" ", ""))], None)
    by_letter = pieces_of([*dict.fromkeys(unicodedata.normalize("NFD", text).replace(" ", ""))], normalizers.NFD())
    assert Reader(by_syllable)([text])[0].reason == ""
    assert "spelled rather than read" in Reader(by_letter)([text])[0].reason


def pieces_of(characters: list[str], normalizer: normalizers.Normalizer | None) -> PreTrainedTokenizerFast:
    """A tokenizer of these pieces and of two English words, as which PLAIN is no test of it."""
    vocabulary = {p: n for n, p in enumerate(["[UNK]", "something", "wonderful", "happened", *characters])}
    vocabulary |= {f"##{p}": len(vocabulary) + n for n, p in enumerate(characters)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([normalizer] if normalizer else [])])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
