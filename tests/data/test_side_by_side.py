"""Several encoders read as one: their features side by side, and every command on them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from redheart.config import DataConfig, EncoderConfig, LabelerConfig, leaves, load_config, read_config
from redheart.data import prepare as preparing
from redheart.data.card import cut_texts, dataset_card
from redheart.data.dedup import dedup
from redheart.data.encode import OneEncoder, TextEncoder, side_by_side
from redheart.data.fingerprint import check_encoder, config_of, mean_state
from redheart.data.prepare import prepare
from redheart.data.store import Store
from redheart.data.stream import SampleStream
from redheart.infer import RedHeartPipeline
from redheart.model.build import build_model
from redheart.schema import RedHeartError
from redheart.train.export import export, load_model, resolve
from redheart.train.resume import settings
from redheart.train.start import train
from redheart.train.validate import validate

TEXTS = [
    f"{who} {what} {when}"
    for who in ("My sister", "The old man", "Nobody")
    for what in ("came home and laughed", "lost the keys", "told the truth although it cost much")
    for when in ("at night", "again")
]
MOST = 8
SMALL = ["model.width=24", "model.heads=2", "model.layers=1", "model.task_width=16", "model.task_heads=2"]
RUN = ["memory.strategy=plain", "training.global_batch_size=4", "training.max_steps=2", "data.labeler.max_texts=0"]


def make_encoder(directory: Path, width: int, vocabulary: int) -> str:
    """A BERT of two layers whose few pieces are learned from TEXTS, saved as Transformers saves any model."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special))
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_states_that_float16_cannot_hold_are_refused(tmp_path: Path, value: float):
    directory = make_encoder(tmp_path / "large", 8, 60)
    model = AutoModel.from_pretrained(directory)
    model.encoder.layer[0].output.LayerNorm.bias.data[0] = value
    model.save_pretrained(directory)
    fine, large = (TextEncoder(EncoderConfig(name=directory, layers=[n], device="cpu")) for n in (0, 1))
    fine.encode(TEXTS[:2])
    words = rf"encoder {directory}: a state of hidden layers 1 is ([67][\d.]+|nan), which exceeds float16 \(65504\): choose other"
    with pytest.raises(RedHeartError, match=words):
        large.encode(TEXTS[:2])


@dataclass
class Two:
    """Two encoders, 2 × 8 and 12 wide, and a table of TEXTS."""

    first: str
    second: str
    table: Path

    @property
    def listed(self) -> list[dict[str, Any]]:
        first = {"name": self.first, "layers": [1, 2], "max_tokens": MOST, "device": "cpu"}
        return [first, {"name": self.second, "layers": [2]}]

    @property
    def config(self) -> EncoderConfig:
        return EncoderConfig.model_validate(self.listed)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    root = tmp_path_factory.mktemp("encoders")
    splits = ("train", "train", "dev", "test", "train", "train")
    rows = [f"{t},{i % 2},{splits[i % 6]}" for i, t in enumerate(TEXTS)]
    (root / "texts.csv").write_text("\n".join(["text,regret,split", *rows]) + "\n")
    return Two(make_encoder(root / "first", 8, 200), make_encoder(root / "second", 12, 95), root / "texts.csv")


@pytest.fixture(scope="module")
def data(two: Two, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare([f"mine={two.table}"], out, DataConfig(encoder=two.config, labeler=LabelerConfig(max_texts=0)))
    return out


def configured(two: Two, *more: str) -> list[str]:
    return [*SMALL, *RUN, f"data.encoder={json.dumps(two.listed)}", "model.encoder_width=30", *more]


@pytest.fixture(scope="module")
def run(two: Two, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    train(load_config("local", configured(two)), data, out)
    return out


# features


def test_tokens_stand_encoder_by_encoder_in_columns_of_their_own(two: Two):
    encoder = TextEncoder(two.config)
    features, cut = encoder.encode(TEXTS)
    alone = [TextEncoder(one).encode(TEXTS) for one in two.config.each]
    assert encoder.width == 16 + 12 + 2
    assert cut == [a or b for a, b in zip(alone[0][1], alone[1][1], strict=True)]
    assert alone[0][1] != alone[1][1]
    for both, first, second in zip(features, alone[0][0], alone[1][0], strict=True):
        n = len(first)
        assert (both.dtype, both.shape) == (np.float16, (n + len(second), 30))
        assert (both[:n, :16] == first).all()
        assert (both[n:, 16:28] == second).all()
        assert not both[:n, 16:28].any()
        assert not both[n:, :16].any()
        np.testing.assert_allclose(both[:n, 28], [np.mean(np.float64(state) ** 2) ** 0.5 for state in first], rtol=1e-3)
        assert not both[:n, 29].any()
        assert both[n:, 29].all()
        assert not both[n:, 28].any()
    assert max(map(len, features)) == two.config.most_tokens == 2 * MOST


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (1, 2)])
def test_no_layer_above_the_last_that_is_read_is_computed(two: Two, tmp_path: Path, layers: tuple[int, ...]):
    """A BERT, and a Llama, which puts a norm behind its last layer: features to the last bit those of the whole model."""
    shutil.copytree(two.first, tmp_path / "llama")
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    LlamaModel(LlamaConfig(vocab_size=200, pad_token_id=0, **sizes)).save_pretrained(tmp_path / "llama")
    for name in (two.first, str(tmp_path / "llama")):
        config = EncoderConfig(name=name, layers=layers, max_tokens=MOST, device="cpu")
        short, whole = OneEncoder(config), OneEncoder(config)
        whole.model = AutoModel.from_pretrained(name).eval()
        stack = next(m for m in short.model.modules() if isinstance(m, torch.nn.ModuleList))
        assert len(stack) == min(max(layers) + 1, whole.model.config.num_hidden_layers)
        for ours, theirs in zip(*(one.encode(TEXTS, lambda n: None)[0] for one in (short, whole)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("tells", [True, False])
def test_a_model_that_is_another_without_its_upper_layers_stays_whole(two: Two, monkeypatch, tells: bool):
    """Where the first layer's output depends on how many there are."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=200, **sizes)).eval()
    layers = model.encoder.layer
    if tells:
        layers[0].register_forward_hook(
            lambda layer, given, out: torch.utils._pytree.tree_map(lambda x: x * len(layers), out)
        )
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *a, **k: model)
    OneEncoder(EncoderConfig(name=two.first, layers=(1,), max_tokens=MOST, device="cpu"))
    assert len(layers) == model.config.num_hidden_layers == (3 if tells else 2)


def test_behind_the_networks_norm_magnitudes_and_marks_are_alike_whatever_the_encoders_are():
    """One encoder's states a thousand times the other's: behind the norm both have √(E / E_k) times what they have alone."""
    draws = np.random.default_rng(0)
    states = [draws.normal(size=(5, 600)), 1000 * draws.normal(size=(4, 400))]
    both = torch.from_numpy(side_by_side([s.astype(np.float16) for s in states])).float()
    width = both.shape[1]
    normed = torch.nn.functional.layer_norm(both, (width,))
    for rows, columns, mark, state in (
        (slice(5), slice(600), 1000, states[0]),
        (slice(5, 9), slice(600, 1000), 1001, states[1]),
    ):
        alone = torch.nn.functional.layer_norm(torch.from_numpy(state).float(), state.shape[1:])
        scale = (width / state.shape[1]) ** 0.5
        assert (normed[rows, columns] - scale * alone).abs().max() < 0.1
        assert (normed[rows, mark] - scale).abs().max() < 0.1


def test_one_encoder_is_read_as_it_was_before_there_were_several(two: Two, data: Path, tmp_path: Path, monkeypatch):
    config = two.config.each[0]
    encoder, one = TextEncoder(config), OneEncoder(config)
    assert list(encoder.fingerprint) == ["name", "revision", "layers", "width", "max_tokens"]
    assert encoder.fingerprint == one.fingerprint
    for mine, alone in zip(encoder.encode(TEXTS)[0], one.encode(TEXTS, lambda n: None)[0], strict=True):
        assert mine.tobytes() == alone.tobytes()
        assert mean_state(mine, encoder.fingerprint).tobytes() == mine.astype(np.float32).mean(0).tobytes()
    planned: list[Any] = []
    spy = SimpleNamespace(dumps=lambda content, **how: planned.append(content) or json.dumps(content, **how))
    monkeypatch.setattr(preparing, "json", spy)
    for encoders in (config, two.config):
        preparing._plan_of([], SimpleNamespace(sources={}), DataConfig(encoder=encoders))
    assert [len(models) for _, _, _, models, _ in planned] == [2, 3]  # the LLM is the last
    assert set(planned[0][2]["encoder"]) == {"name", "layers", "max_tokens", "batch_size", "device", "languages"}
    assert set(planned[1][2]["encoder"]) - set(planned[0][2]["encoder"]) == {"beside"}


def test_texts_are_compared_by_what_the_first_encoder_says(two: Two):
    both, first = TextEncoder(two.config), TextEncoder(two.config.each[0])
    for mine, alone in zip(both.encode(TEXTS)[0], first.encode(TEXTS)[0], strict=True):
        assert (mean_state(mine, both.fingerprint) == mean_state(alone, first.fingerprint)).all()


# configuration


def test_a_list_is_the_first_with_the_others_beside_it(tmp_path: Path):
    listed = "data.encoder=[{name: package:minilm, layers: [4, 6]}, {name: package:smollm2, layers: [20]}]"
    config = load_config("local", [listed, "data.encoder.max_tokens=32"]).data.encoder
    assert [(e.name, e.layers, e.max_tokens, e.beside) for e in config.each] == [
        ("package:minilm", (4, 6), 32, ()),
        ("package:smollm2", (20,), 32, ()),
    ]
    assert (config.names, config.most_tokens) == ("package:minilm + package:smollm2", 64)
    (tmp_path / "mine.yaml").write_text(
        "extends: local\ndata:\n  encoder:\n  - {name: a, layers: [1], max_tokens: 16}\n  - {name: b, layers: [2]}\n"
    )
    mine = load_config(str(tmp_path / "mine.yaml"), ["data.encoder.name=c"]).data.encoder
    assert [(e.name, e.layers, e.max_tokens) for e in mine.each] == [("c", (1,), 16), ("b", (2,), 16)]
    assert load_config("local", ["data.encoder.layers=[6]"]).data.encoder.each == (EncoderConfig(layers=(6,)),)


@pytest.mark.parametrize(
    ("encoders", "words"),
    [
        ("[{}, {name: b}]", "data.encoder.beside.0.layers is missing"),
        ("[{}, {name: b, layers: [1], max_tokens: 8}]", "unknown config key data.encoder.beside.0.max_tokens"),
        ("[]", "config key data.encoder = "),
        ("[package:minilm]", "config key data.encoder = "),
        (
            "[{max_tokens: 200}, {name: b, layers: [1]}, {name: c, layers: [1]}]",
            "3 encoders of 200 tokens exceed the 512",
        ),
    ],
)
def test_a_wrong_list_is_refused_by_name(encoders: str, words: str):
    with pytest.raises(RedHeartError, match=words):
        load_config("local", [f"data.encoder={encoders}"])


def test_what_made_features_is_loaded_again_from_its_fingerprint(two: Two):
    made_with = TextEncoder(two.config).fingerprint
    assert TextEncoder(config_of(json.loads(json.dumps(made_with)))).fingerprint == made_with
    check_encoder(made_with, two.config, 30)
    with pytest.raises(RedHeartError, match=r"30 wide .*--set model\.encoder_width=30"):
        check_encoder(made_with, two.config, 768)
    first = two.config.each[0]
    with pytest.raises(
        RedHeartError,
        match=r"encoded with name = \['.*first', '.*second'\] but data.encoder.name, with data.encoder.beside, is '.*first'",
    ):
        check_encoder(made_with, first, 30)
    longer = two.config.model_copy(update={"max_tokens": 9})
    with pytest.raises(RedHeartError, match=r"max_tokens = \[8, 8\] but .* is \[9, 9\]"):
        check_encoder(made_with, longer, 30)


# commands


def test_prepared_data_says_what_made_it(data: Path, two: Two):
    index = Store(data).index
    assert index["encoder"] == TextEncoder(two.config).fingerprint
    assert f"`{two.first}` (hidden layers [1, 2], 16 wide, at most 8 tokens" in dataset_card(index)
    assert f"beside `{two.second}` (hidden layers [2], 12 wide, at most 8 tokens" in dataset_card(index)
    assert all(f"exceed {MOST} tokens" in line for line in cut_texts(index))
    assert cut_texts(index)
    batch = SampleStream(data, "train", few_shapes=True).batch(np.arange(4), np.arange(4))
    assert batch.features.shape == (4, 2 * MOST, 30)


def test_a_text_that_one_of_them_cannot_read_is_refused_by_that_ones_name(two: Two, tmp_path: Path):
    (tmp_path / "texts.csv").write_text("text,regret\n" + "".join(f"{t},0.5\n" for t in TEXTS))
    english = {"name": two.first, "layers": [1]}, {"name": "package:minilm", "layers": [6]}
    (tmp_path / "korean.csv").write_text("text,regret\n오늘은 친구와 함께 저녁을 먹어서 정말 기뻤다,0.5\n")
    config = DataConfig(encoder=EncoderConfig.model_validate([english[1], english[0]]))
    with pytest.raises(RedHeartError, match="cannot be read by encoder package:minilm"):
        prepare([f"mine={tmp_path / 'korean.csv'}"], tmp_path / "out", config)
    odd = TEXTS[0].upper()  # of these capitals the small one knows nothing
    (tmp_path / "texts.csv").write_text(f"text,regret\n{odd},0.5\n")
    with pytest.raises(RedHeartError, match=f"cannot be read by encoder {two.first}"):
        prepare([f"mine={tmp_path / 'texts.csv'}"], tmp_path / "out", config)


def test_a_run_on_both_resumes_and_on_one_alone_does_not(two: Two, data: Path, run: Path, tmp_path: Path):
    mine = Path(shutil.copytree(run, tmp_path / "run"))
    assert (
        train(settings(None, ["training.max_steps=3"], mine, "last").config, data, mine, resume="last").state.step == 3
    )
    with pytest.raises(
        RedHeartError, match=r"name = \['.*second'\] but data.encoder.name, with data.encoder.beside, is '.*first'"
    ):
        train(settings(None, ["data.encoder.beside=[]"], mine, "last").config, data, mine, resume="last")


def test_a_run_that_names_no_encoder_has_the_datas(two: Two, data: Path, run: Path, tmp_path: Path, capsys):
    bare = [*SMALL, *RUN, "data.encoder.device=cpu"]
    train(load_config("local", bare), data, tmp_path / "run")
    assert f"data.encoder is the data's: {two.first} + {two.second}" in capsys.readouterr().err
    config, named = (read_config(place / "config.yaml", "") for place in (tmp_path / "run", run))
    assert leaves(config) == leaves(named)
    mine, theirs = (load_model(resolve(place))[0].state_dict() for place in (tmp_path / "run", run))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    show = [sys.executable, "-m", "redheart", "train", "--data", str(data), "--show-config", "--json"]
    done = subprocess.run([*show, *(x for one in bare for x in ("--set", one))], text=True, capture_output=True)
    told = json.loads(done.stdout)
    assert told["data.encoder.name"] == {"value": two.first, "origin": "data"}
    assert told["data.encoder.device"] == {"value": "cpu", "origin": "command line"}
    assert told["model.encoder_width"] == {"value": 30, "origin": "data"}
    for one in (f"data.encoder.name={two.first}", "data.encoder.layers=[2]", "model.encoder_width=768"):
        with pytest.raises(RedHeartError, match=r"--set"):
            train(load_config("local", [*bare, one]), data, tmp_path / "other")


def test_a_run_on_both_is_evaluated_and_its_export_answers_as_it_does(two: Two, run: Path, tmp_path: Path):
    export(run, tmp_path / "model")
    report, _ = validate(tmp_path / "model", None, "test", None)
    assert report.facts["encoder"] == f"{two.first} + {two.second}, hidden layers [[1, 2], [2]]"
    assert report.evaluation.losses["regret"] > 0
    answers = []
    for path in (run, tmp_path / "model"):
        pipeline = RedHeartPipeline.from_pretrained(path)
        assert pipeline.encoder.fingerprint == TextEncoder(two.config).fingerprint
        assert f"{two.first} + {two.second}" in repr(pipeline)
        answers.append(pipeline([TEXTS[0], TEXTS[9]]))
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


def test_an_answer_depends_on_what_each_encoder_reads(two: Two):
    torch.manual_seed(0)
    encoder = TextEncoder(two.config)
    pipeline = RedHeartPipeline(build_model(load_config("local", configured(two)), encoder.fingerprint), encoder)
    before = pipeline(TEXTS[0])
    for one in encoder.each:
        with torch.no_grad():
            kept = one.model.embeddings.word_embeddings.weight.clone()
            one.model.embeddings.word_embeddings.weight.mul_(-1)
            assert pipeline(TEXTS[0]) != before
            one.model.embeddings.word_embeddings.weight.copy_(kept)
    assert pipeline(TEXTS[0]) == before


def test_the_pipeline_says_which_texts_any_of_them_cuts_or_cannot_read(two: Two, capsys: pytest.CaptureFixture[str]):
    encoder = TextEncoder(two.config)
    pipeline = RedHeartPipeline(build_model(load_config("local", configured(two)), encoder.fingerprint), encoder)
    capsys.readouterr()
    lengths = [[r.tokens for r in read(TEXTS)] for read in pipeline.readers]
    only_the_second_cuts = [t for t, one, other in zip(TEXTS, *lengths, strict=True) if one <= MOST < other]
    pipeline(["Nobody came home", "ZZZZ QQQQ XXXX", only_the_second_cuts[0]])
    told = capsys.readouterr().err.replace("\n", " ")
    assert "1 of 3 texts exceed 8 tokens and are cut" in told
    assert "1 of 3 texts are in no language that the encoder" in told
    assert "text 2:" in told


def test_near_duplicates_are_found_by_the_first_one(data: Path, two: Two, monkeypatch):
    seen: list[np.ndarray] = []

    def near(records: Any, pooled: np.ndarray, contrasts: np.ndarray, *_: object) -> SimpleNamespace:
        seen.append(pooled)
        return SimpleNamespace(report={}, dropped=frozenset())

    monkeypatch.setattr("redheart.data.dedup.near_leaks", near)
    dedup(data)
    texts = [row["text"] for s in ("train", "dev", "test") for row in rows_of(data, s)]
    alone, _ = TextEncoder(two.config.each[0]).encode(texts)
    # another batch, another padding: the last bits of a feature may differ
    np.testing.assert_allclose(seen[0], np.stack([a.astype(np.float32).mean(0) for a in alone]), atol=2e-3)


def rows_of(data: Path, split: str) -> list[dict[str, Any]]:
    stream = SampleStream(data, split)
    return stream.rows(np.arange(stream.num_rows))
