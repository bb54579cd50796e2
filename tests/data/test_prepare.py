"""`prepare` as a whole: what it says of texts, whose files it touches, when it goes on from earlier work and when it refuses to."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from redheart.config import DataConfig, EncoderConfig, LabelerConfig
from redheart.data import prepare as module
from redheart.data.encode import TextEncoder
from redheart.data.prepare import PrepareReport, prepare
from redheart.data.pretrained import encoder_path
from redheart.data.shards import INDEX
from redheart.data.store import Store
from redheart.files import write_sealed_json
from redheart.owned import MARKER, exclusive
from redheart.schema import RedHeartError
from tests.runs import forked

CONFIG = DataConfig(labeler=LabelerConfig(max_texts=0), rows_per_shard=4)
TEXTS = [
    "I felt happy when my sister came home.", "I lost my keys and I was furious.", "The night was dark and I was afraid.",
    "Nobody came to the party and I cried.", "She told the truth although it cost her.", "He forgot to call me again.",
]  # fmt: skip
SPLITS = ["train", "train", "train", "train", "dev", "test"]


def rows(path: Path, texts: list[str] = TEXTS, extra: str = "") -> str:
    lines = [f'"{t}",joy,{s}' for t, s in zip(texts, SPLITS, strict=True)]
    path.write_text("\n".join(["text,emotion,split", *lines, extra]).rstrip("\n") + "\n", encoding="utf-8")
    return f"mine={path}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return rows(tmp_path_factory.mktemp("source") / "texts.csv")


@pytest.fixture(scope="module")
def made(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "data"
    report = prepare([source], out, CONFIG)
    assert report.rows == {"train": 4, "dev": 1, "test": 1}
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data"))


def shards(directory: Path) -> dict[str, str]:
    index = json.loads((directory / INDEX).read_text())
    return {e["file"]: e["sha256"] for f in index["splits"].values() for e in f["shards"]}


def test_a_full_disk_is_one_error_and_what_is_encoded_stays(source: str, made: Path, tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(module.SplitsWriter, "write", full)
        with pytest.raises(RedHeartError, match=r"No space left.*make room.*goes on"):
            prepare([source], tmp_path / "data", CONFIG)
    monkeypatch.setattr(TextEncoder, "encode", full)  # nothing is encoded again
    prepare([source], tmp_path / "data", CONFIG)
    assert shards(tmp_path / "data") == shards(made)


def refuses(words: str, *arguments: object, **more: object) -> None:
    with pytest.raises(RedHeartError, match=words):
        prepare(*arguments, **more)  # type: ignore[arg-type]


# whose files


def test_what_the_user_has_in_the_directory_survives_force(copy: Path):
    source = rows(copy / "texts.csv", [*TEXTS[:-1], "He never forgot to call me."])
    (copy / "notes.txt").write_text("mine")
    (copy / "work").mkdir()
    (copy / "work" / "plan.txt").write_text("ours: the marker lists the folder")
    refuses("--force-preprocess", [source], copy, CONFIG)
    old = shards(copy)
    assert not prepare([source], copy, CONFIG, force=True).reused
    assert (copy / "texts.csv").is_file()
    assert (copy / "notes.txt").read_text() == "mine"
    assert not (copy / "work").exists()
    assert shards(copy) != old
    Store(copy)


def test_a_copy_without_its_marker_is_known_by_what_its_index_says(copy: Path, source: str):
    (copy / MARKER).unlink()
    (copy / "train-00007.arrow").write_text("mine")
    assert prepare([source], copy, CONFIG).reused
    assert not (copy / MARKER).exists()  # reading writes nothing
    other = CONFIG.model_copy(update={"rows_per_shard": 2})
    prepare([source], copy, other, force=True)
    assert (copy / "train-00007.arrow").read_text() == "mine"
    assert set(shards(copy)) == {"train-00000.arrow", "train-00001.arrow", "dev-00000.arrow", "test-00000.arrow"}


@pytest.mark.parametrize(
    "name", ["README.md", "work", "index.json", "train-00000.arrow", "train-00000.arrow.tmp", "rejected.jsonl"]
)
@pytest.mark.parametrize("force", [False, True])
def test_a_name_that_is_the_users_already_is_refused_before_anything_is_written(tmp_path: Path, name: str, force: bool):
    source = rows(tmp_path / "texts.csv", extra=",joy,train")
    out = tmp_path / "out"
    (out / name).mkdir(parents=True) if name == "work" else out.mkdir()
    mine = out / name / "interview.txt" if name == "work" else out / name
    mine.write_text("mine")
    refuses(f"{name}", [source], out, CONFIG, skip_invalid=True, force=force)
    assert mine.read_text() == "mine"
    assert {p.name for p in out.iterdir()} <= {name, ".redheart.lock"}


def test_a_file_where_the_directory_belongs_is_one_line(tmp_path: Path, source: str):
    (tmp_path / "out").write_text("mine")
    refuses("--out .*out is a file", [source], tmp_path / "out", CONFIG)
    refuses("--out .*lies below one", [source], tmp_path / "out" / "deeper", CONFIG)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_source_that_prepare_wrote_itself_is_refused(tmp_path: Path):
    out = tmp_path / "out"
    source = rows(tmp_path / "texts.csv", extra=",joy,train")
    assert prepare([source], out, CONFIG, skip_invalid=True).rejected == 1
    mended = out / "rejected.jsonl"
    mended.write_text('{"text": "Now it has a text.", "label": "joy", "split": "train"}\n')
    refuses("was written by .* and would be replaced", [f"mine={mended}"], out, CONFIG, force=True)
    assert "Now it" in mended.read_text()


def test_a_second_process_is_refused(tmp_path: Path, source: str):
    (tmp_path / "out").mkdir()
    with exclusive(tmp_path / "out", "preparing"):
        refuses(r"another process \(pid \d+\) is preparing in", [source], tmp_path / "out", CONFIG)


@pytest.mark.slow
def test_two_processes_of_one_launch_start_afresh_and_prepare_together(copy: Path, source: str, made: Path):
    """The first alone removes and claims, before the other looks: it would take the old data for the result."""
    config = ["--set", "data.labeler.max_texts=0", "--set", "data.rows_per_shard=2", "--force-preprocess"]
    done = forked("redheart", "prepare", "--source", source, "--out", copy, *config, ranks=2)
    assert done.returncode == 0, done.stderr
    assert set(shards(copy)) == {*shards(made), "train-00001.arrow"}
    (copy / "README.md").unlink()
    (copy / "README.md").write_text("mine")
    (copy / MARKER).unlink()
    done = forked("redheart", "prepare", "--source", source, "--out", copy, *config, ranks=2)
    assert done.returncode == 1
    assert done.stderr.count("README.md is there already") == 2, (
        done.stderr
    )  # the second one does not wait for the first


# going on


def test_what_a_killed_preparation_left_is_gone_on_with_or_cleaned(
    tmp_path: Path, source: str, made: Path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as broken:
        broken.setattr(module, "write_sealed_json", _killed_at_the_index)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], out, CONFIG)
    encoded = {p: p.stat().st_mtime_ns for p in (out / "work").glob("encoded-*")}
    assert encoded
    refuses("work belongs to other", [source], out, CONFIG.model_copy(update={"rows_per_shard": 2}))
    damaged = sorted(encoded)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    with monkeypatch.context() as broken:
        broken.setattr(module, "remove", _killed)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], out, CONFIG)
    kept = {p for p, when in encoded.items() if p.stat().st_mtime_ns == when}
    assert kept == set(encoded) - {damaged}  # one was encoded anew, since its sha256 was another
    assert prepare([source], out, CONFIG).reused
    assert not (out / "work").exists()
    assert shards(out) == shards(made)


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def _killed_at_the_index(path: Path, value: dict) -> None:
    if path.name == INDEX:
        raise KeyboardInterrupt
    write_sealed_json(path, value)


def test_what_cannot_be_prepared_replaces_nothing(copy: Path, source: str, made: Path):
    encoder = EncoderConfig(layers=(4, 9))
    for force in ({"force": True}, {"renew": True}):
        refuses("hidden layers 0 to 6", [source], copy, CONFIG.model_copy(update={"encoder": encoder}), **force)
        assert shards(copy) == shards(made)
        assert prepare([source], copy, CONFIG).reused  # every shard is what the index says
    assert prepare([source], copy, CONFIG, renew=True).reused
    assert not (copy / "work").exists()


def test_a_killed_replacement_is_gone_on_with_and_leaves_the_old_result_whole_until_the_new_one_is_written(
    copy: Path, source: str, made: Path, monkeypatch
):
    other = CONFIG.model_copy(update={"rows_per_shard": 2})
    for place in ("make_room", "_write", "write_sealed_json"):
        with monkeypatch.context() as broken:
            broken.setattr(module, place, _killed_at_the_index if place == "write_sealed_json" else _killed)
            with pytest.raises(KeyboardInterrupt):
                prepare([source], copy, other, force=place == "make_room")
        assert (copy / INDEX).exists() == (place == "make_room")
        encoded = {p: p.stat().st_mtime_ns for p in (copy / "work").glob("encoded-*")}
        if place == "make_room":
            assert prepare([source], copy, CONFIG).reused  # and what began to replace it stays
            first = encoded
        assert encoded == first
    assert not prepare([source], copy, other).reused
    assert set(shards(copy)) == {*shards(made), "train-00001.arrow"}
    prepare([source], copy, CONFIG, force=True)
    assert not (copy / "train-00001.arrow").exists()
    (copy / "train-00001.arrow").write_text("mine")  # no name of ours any more
    prepare([source], copy, CONFIG, force=True)
    assert (copy / "train-00001.arrow").read_text() == "mine"
    assert shards(copy) == shards(made)


def test_a_process_that_waits_does_not_take_the_earlier_result_for_the_new_one(copy: Path, source: str, monkeypatch):
    asked = []
    other = CONFIG.model_copy(update={"rows_per_shard": 2})
    with monkeypatch.context() as second:
        second.setattr(module, "launched_rank", lambda: 1)
        second.setattr(module, "after_main", lambda action: "")
        second.setattr(module, "_make", lambda *_: _[-1])
        second.setattr(module, "wait_for", lambda files, is_there: asked.extend([*files, is_there]))
        prepare([source], copy, other, renew=True, wait=True)
    index, is_there = asked
    assert not is_there(index)
    prepare([source], copy, other, renew=True)
    assert is_there(index)
    index.unlink()
    assert not is_there(index)


def test_rejected_rows_of_an_earlier_call_are_not_this_calls(tmp_path: Path):
    out, file = tmp_path / "out", tmp_path / "texts.csv"
    prepare([rows(file, extra=",joy,train")], out, CONFIG, skip_invalid=True)
    assert (out / "rejected.jsonl").is_file()
    refuses("--force-preprocess", [rows(file)], out, CONFIG)  # its report counts other rows
    prepare([rows(file)], out, CONFIG, force=True)
    assert not (out / "rejected.jsonl").exists()


# what the plan stands for


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(encoder_path("package:minilm"), tmp_path_factory.mktemp("encoder") / "minilm"))


@pytest.mark.parametrize("harm", ["weights", "tokenizer", "config"])
def test_features_of_a_changed_encoder_are_not_reused(encoder: Path, tmp_path: Path, harm: str, source: str):
    mine = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    config = CONFIG.model_copy(update={"encoder": EncoderConfig(name=str(mine))})
    out = tmp_path / "out"
    prepare([source], out, config)
    assert prepare([source], out, config).reused
    before = TextEncoder(config.encoder).fingerprint["revision"]
    if harm == "weights":
        content = bytearray((mine / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (mine / "model.safetensors").write_bytes(content)
    else:
        file = mine / {"tokenizer": "tokenizer_config.json", "config": "config.json"}[harm]
        file.write_text(json.dumps({**json.loads(file.read_text()), "layer_norm_eps": 1e-5, "do_lower_case": False}))
    assert TextEncoder(config.encoder).fingerprint["revision"] != before
    refuses("holds data of other sources, models or settings", [source], out, config)


def test_the_card_names_the_content_not_the_plan(made: Path, copy: Path, source: str, monkeypatch):
    """`datasets` caches a directory under its card: other shards under the same card would be read as the old rows."""
    card = (copy / "README.md").read_text()
    assert card == (made / "README.md").read_text()
    assert "Apache-2.0), float16" in card  # the licence of the encoder's weights
    half = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, *a: ([f / 2 for f in half(self, *a)[0]], half(self, *a)[1]))
    prepare([source], copy, CONFIG, force=True)
    assert json.loads((copy / INDEX).read_text())["plan"] == json.loads((made / INDEX).read_text())["plan"]
    assert (copy / "README.md").read_text() != card


# what is said of texts


def test_texts_that_are_cut_are_counted_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = rows(
        tmp_path / "texts.csv",
        [("The day began as every other day did. " * 20 if i < 3 else "") + t for i, t in enumerate(TEXTS)],
    )
    for reused in (False, True):
        report = prepare([source], tmp_path / "out", CONFIG)
        assert report.reused == reused
        assert report.cut_counts == {"mine": [3, 6]}
        assert report.cut_texts == {"mine": 0.5}
        assert "3 of 6 texts of mine exceed 64 tokens: their ends are not read" in capsys.readouterr().err.replace(
            "\n", " "
        )


def test_no_label_in_a_split_is_said_and_training_on_it_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "bare.csv").write_text(
        "text,split\n" + "".join(f"{t},{s}\n" for t, s in zip(TEXTS, SPLITS, strict=True))
    )
    report = prepare([f"mine={tmp_path / 'bare.csv'}"], tmp_path / "out", CONFIG)
    assert report.unlabelled == ["train", "dev", "test"]
    assert "no row of train, dev, test has a label" in capsys.readouterr().err
    from redheart.config import load_config
    from redheart.train.start import train

    with pytest.raises(RedHeartError, match=r"training split of .* has a label.*data\.columns"):
        train(load_config("local"), tmp_path / "out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_reports_of_a_reused_directory_are_its_own(copy: Path, source: str):
    report = prepare([source], copy, CONFIG)
    assert isinstance(report, PrepareReport)
    assert (report.reused, report.rows, report.unlabelled) == (True, {"train": 4, "dev": 1, "test": 1}, [])
