"""Features of texts that prepared directories hold already: taken from there to the last bit, and from no other encoder's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from redheart.cli import app
from redheart.config import BesideConfig, DataConfig, EncoderConfig, LabelerConfig
from redheart.data.encode import OneEncoder
from redheart.data.prepare import prepare
from redheart.data.shards import INDEX, open_shard
from redheart.data.store import Store
from redheart.schema import SPLITS, RedHeartError
from tests.runs import forked

TEXTS = [
    "I felt happy when my sister came home.", "I lost my keys and I was furious.", "The night was dark and I was afraid.",
    "Nobody came to the party and I cried.", "She told the truth although it cost her and nobody thanked her.",
]  # fmt: skip
ENCODER = EncoderConfig(layers=(0, 4, 6), max_tokens=10)  # the last text is cut
CONFIG = DataConfig(encoder=ENCODER, labeler=LabelerConfig(max_texts=0))
CHOSEN = np.r_[768:1152, 0:384]  # layers 6 and 0 of what CONFIG reads


def table(path: Path, texts: Sequence[str], contrast: str = "I stayed at home.") -> str:
    lines = [json.dumps({"text": t, "contrast_text": contrast, "preference": i % 2}) for i, t in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return f"mine={path}"


def features(directory: Path) -> dict[str, np.ndarray]:
    """Of every text that is there, contrasts too."""
    store, found = Store(directory), {}
    for entry in (e for split in SPLITS for e in store.shards(split)):
        shard = open_shard(store.fetch(entry), store.index["encoder"]["width"])
        for column, states in (("text", shard.features), ("contrast_text", shard.contrasts)):
            found |= {text: np.array(states[row]) for row, text in enumerate(shard.table[column].to_pylist())}
    return found


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("known")
    prepare([table(folder / "texts.jsonl", TEXTS)], folder / "data", CONFIG)
    return folder / "data"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that an encoder reads."""
    texts: list[str] = []
    encode = OneEncoder.encode

    def noted(self: OneEncoder, given: Sequence[str], tick):
        texts.extend(given)
        return encode(self, given, tick)

    monkeypatch.setattr(OneEncoder, "encode", noted)
    return texts


def test_known_texts_keep_their_features_and_others_are_read(known: Path, read: list[str], tmp_path: Path):
    """Whether a text or a contrast before; of the layers that are asked for, in their order; counts of cut texts are of all."""
    source = table(
        tmp_path / "more.jsonl", [*TEXTS, "I stayed at home.", "A new day, and a new text."], contrast=TEXTS[4]
    )
    settings = ["--set", "data.encoder={layers: [6, 0], max_tokens: 10}", "--set", "data.labeler.max_texts=0"]
    made = tmp_path / "made"
    arguments = ["prepare", "--source", source, "--out", str(made), *settings, "--features-from", str(known)]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0
    assert read == ["A new day, and a new text."]
    assert "features of 13 of 14 texts were taken" in told.stderr
    before, now = features(known), features(made)
    assert now.pop("A new day, and a new text.").shape[1] == 768
    assert now.keys() == before.keys()
    for text, states in now.items():
        np.testing.assert_array_equal(states, before[text][:, CHOSEN])
    read.clear()
    afresh = CONFIG.model_copy(update={"encoder": ENCODER.model_copy(update={"layers": (6, 0)})})
    report = prepare([source], tmp_path / "afresh", afresh)
    assert len(read) == 14
    assert report.cut_counts == json.loads((made / INDEX).read_text())["report"]["cut_counts"]
    for text, states in features(tmp_path / "afresh").items():
        if text in now:
            np.testing.assert_allclose(states, now[text], atol=5e-3)  # other batches round otherwise


def test_the_same_call_finds_its_result_and_another_origin_of_the_features_is_another_result(
    known: Path, tmp_path: Path
):
    source = f"mine={known.parent / 'texts.jsonl'}"
    config = CONFIG.model_copy(update={"features_from": (str(known),)})
    prepare([source], tmp_path / "out", config)
    assert prepare([source], tmp_path / "out", config).reused
    with pytest.raises(RedHeartError, match="other sources, models or settings"):
        prepare([source], tmp_path / "out", CONFIG)


HELD = r"of package:minilm, layers \[0, 4, 6\], max_tokens 10, and wanted are those of "


@pytest.mark.parametrize(
    ("encoder", "wanted"),
    [
        (ENCODER.model_copy(update={"layers": (3,)}), r"package:minilm, layers \[3\], max_tokens 10"),
        (ENCODER.model_copy(update={"max_tokens": 12}), r"package:minilm, layers \[0, 4, 6\], max_tokens 12"),
        (
            ENCODER.model_copy(update={"beside": (BesideConfig(name="package:smollm2", layers=(1,)),)}),
            r"package:minilm \+ package:smollm2, layers \[\[0, 4, 6\], \[1\]\], max_tokens 20",
        ),
    ],
)  # fmt: skip
def test_features_of_another_encoder_are_refused(known: Path, tmp_path: Path, encoder: EncoderConfig, wanted: str):
    config = CONFIG.model_copy(update={"encoder": encoder, "features_from": (str(known),)})
    with pytest.raises(RedHeartError, match=HELD + wanted):
        prepare([f"mine={known.parent / 'texts.jsonl'}"], tmp_path / "out", config)


def test_a_directory_without_data_and_the_result_itself_are_refused(known: Path, tmp_path: Path):
    for directory, words in (("nothing", "nothing"), ("out", "is --out itself")):
        config = CONFIG.model_copy(update={"features_from": (str(tmp_path / directory),)})
        with pytest.raises(RedHeartError, match=words):
            prepare([f"mine={known.parent / 'texts.jsonl'}"], tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_take_them_together(known: Path, tmp_path: Path):
    source = f"mine={known.parent / 'texts.jsonl'}"
    settings = ["--set", "data.encoder={layers: [6, 0], max_tokens: 10}", "--set", "data.labeler.max_texts=0"]
    arguments = ["prepare", "--source", source, "--out", tmp_path / "out", *settings, "--features-from", known]
    done = forked("redheart", *arguments, "--set", "data.rows_per_shard=1", ranks=2)
    assert done.returncode == 0, done.stderr
    before, now = features(known), features(tmp_path / "out")
    assert now.keys() == before.keys()
    for text, states in now.items():
        np.testing.assert_array_equal(states, before[text][:, CHOSEN])
