"""A run's calibration from its end to the user's door: the same numbers from checkpoint, export and pipeline, or a refusal by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import redheart.infer as infer
from redheart.config import RunConfig, load_config
from redheart.data.shards import SplitsWriter
from redheart.data.stream import SampleStream
from redheart.evaluation.answers import Answers
from redheart.evaluation.calibration import CALIBRATION, crossed, read, score_split, uncalibrated, with_lines
from redheart.evaluation.evaluate import evaluate, predict_all
from redheart.files import read_sealed_json, verify_manifest
from redheart.infer import RedHeartPipeline
from redheart.owned import exclusive, owned
from redheart.schema import EMOTIONS, RedHeartError
from redheart.train import start
from redheart.train.calibrate import calibrate
from redheart.train.checkpoint import best, committed, last
from redheart.train.export import export, load_model, resolve
from redheart.train.start import train
from redheart.train.validate import validate
from tests.data.shard_data import write_index
from tests.test_doors import run as command
from tests.test_infer import ENCODER, MADE_WITH, SMALL, TOKENS, WIDTH, Encoder, row

ROWS = 64


def told(number: int, split: str) -> dict:
    """What is felt stands in the features; two of seven emotions in turn, one never; a pair; ratings."""
    made = row(
        number,
        split,
        emotion=[0.0] * 7,
        vad=[0.0, 0.1, -0.1],
        preference=float(number % 2),
        ethics=[None, 1.0, None, None],
    )
    emotion = [float(number % 3 == 0), float(number % 2), *[float(number % 5 == 0)] * 4, 0.0]
    signal = np.zeros((3, WIDTH), np.float16)
    signal[:, :3] = 2 * np.array([emotion[0], emotion[1], emotion[2]]) - 1
    made |= {"emotion": emotion, "vad": [emotion[0] - 0.5, emotion[1] - 0.5, 0.3]}
    made["contrast_text"], made["contrast_features"] = "c", -signal + made["features"]
    return made | {"features": signal + made["features"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("felt")
    writer = SplitsWriter(out, WIDTH, TOKENS)
    for k, split in enumerate(("train", "dev", "test")):
        rows = [told(n, split) for n in range(1000 * k, 1000 * k + ROWS)]
        writer.write(f"{split}-00000.arrow", rows, 1)
    write_index(out, writer.finish(), MADE_WITH, levels={"regret": [0.3, 0.6]})
    return out


def config(steps: int) -> RunConfig:
    return load_config(
        "local",
        [
            *(*SMALL, *ENCODER, "memory.strategy=plain", "training.precision=fp32", f"training.max_steps={steps}"),
            *("training.global_batch_size=16", "training.micro_batch_size=16", "training.evaluate_every=10"),
            *("training.checkpoint_every=10", "optimizer.learning_rate=3e-3", "checkpoint.keep_last=9"),
        ],
    )


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "check_memory", lambda *_: None)  # measures for a while
        train(config(20), data, out)
    return out


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(infer, "TextEncoder", Encoder)
    monkeypatch.setattr(start, "check_memory", lambda *_: None)
    return Path(shutil.copytree(made, tmp_path / "run"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_run_ends_with_the_calibration_of_its_best_checkpoint(run, data):
    loaded = load_model(run)
    assert loaded.calibration == read(best(run))
    assert [d for d in committed(run) if (d / CALIBRATION).exists()] == [best(run)]
    made = loaded.calibration
    assert (made.step, made.dev_rows) == (loaded.progress.best_step, ROWS)
    assert set(made.answers) == {"emotion", "vad", "preference", "ethics"}
    assert [line.threshold is not None for line in made.answers["emotion"]] == [True] * 6 + [False]
    assert made.left_as_is()["emotion.neutral"] == "all labels on dev are alike"
    assert made.left_as_is()["ethics.utilitarian"].startswith("0 labelled dev rows")
    verify_manifest(best(run))
    dev = score_split(loaded.model, SampleStream(data, "dev"))
    after = with_lines("emotion", made.answers["emotion"], dev["emotion"])
    fitted = slice(0, 6)
    assert after.prediction.mean(0)[fitted] == pytest.approx(after.target.mean(0)[fitted], abs=0.02)


def test_checkpoint_and_export_have_the_units_of_the_data(run, data, tmp_path):
    """The deviation of all ratings: that is what the best constant's squared error is."""
    export(run, tmp_path / "model")
    vad = torch.tensor([told(n, "train")["vad"] for n in range(ROWS)])
    for made in (resolve(run), tmp_path / "model"):
        fusion = load_model(made).model.get_submodule("aux.utility")
        found = dict(zip(fusion.layout.labels, fusion.units.tolist(), strict=True))
        assert found.pop("vad") == pytest.approx(vad.std(0, correction=0).square().mean().sqrt().item(), rel=0.02)
        assert set(found.values()) == {1.0}


def test_checkpoint_export_and_pipeline_say_the_same(run, tmp_path, capsys):
    """And what they say is the fit by hand on the network's own answers."""
    export(run, tmp_path / "model")
    verify_manifest(tmp_path / "model")
    assert CALIBRATION in read_sealed_json(tmp_path / "model" / "manifest.json", "")["files"]
    said = [RedHeartPipeline.from_pretrained(p)(["we laughed", "we cried a lot"]) for p in (run, tmp_path / "model")]
    assert said[0] == said[1]
    assert "no calibration" not in capsys.readouterr().err

    loaded = load_model(tmp_path / "model")
    plain = RedHeartPipeline(loaded.model, Encoder())
    features, _ = Encoder().encode(["we laughed", "we cried a lot"])
    for number, answer in enumerate(said[0]):
        one = torch.from_numpy(features[number]).float()[None]
        with torch.inference_mode():
            outputs = plain.model(one, torch.ones(1, one.shape[1], dtype=torch.bool))
        lines = loaded.calibration.answers
        by_hand = [
            1 / (1 + np.exp(-(x.scale * z + x.offset)))
            for x, z in zip(lines["emotion"], outputs.emotion_logits[0].double().tolist(), strict=True)
        ]
        assert [answer["emotion"][e] for e in EMOTIONS[:6]] == pytest.approx(by_hand[:6], rel=1e-4)
        chosen = [
            e for e, p, x in zip(EMOTIONS, by_hand, lines["emotion"], strict=True) if x.threshold and p > x.threshold
        ]
        assert answer["emotion_chosen"] == chosen
        assert answer["utility"] == pytest.approx(lines["preference"][0].scale * outputs.utility.item(), rel=1e-4)
        raw = predict_all(outputs)["vad"][0].tolist()
        line = lines["vad"][0]
        expected = raw[0] if line.as_is else np.clip(line.scale * raw[0] + line.offset, -1, 1)
        assert answer["vad"]["valence"] == pytest.approx(expected, abs=1e-5)


def test_without_a_calibration_everything_is_as_before_and_is_said_once(run, tmp_path, capsys):
    (best(run) / CALIBRATION).unlink()
    export(run, tmp_path / "old")
    pipeline = RedHeartPipeline.from_pretrained(tmp_path / "old")
    answers = pipeline(["we laughed"]) + pipeline(["we cried"])
    assert capsys.readouterr().err.count("has no calibration") == 1
    assert all("emotion_chosen" not in a for a in answers)
    assert answers[0] == RedHeartPipeline(load_model(run).model, Encoder(), trained=pipeline.trained)("we laughed")


def test_modules_alone_go_without_the_calibration_of_the_whole(run, capsys):
    whole = RedHeartPipeline.from_pretrained(run)
    alone = RedHeartPipeline.from_pretrained(run, modules=["heads.emotion"])
    assert whole.calibration is not None
    assert alone.calibration is None
    assert "emotion_chosen" not in alone("we laughed")
    assert "go without it" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["checkpoint", "export"])
def test_a_flipped_bit_is_refused_by_name_and_a_checkpoint_is_mended(run, data, tmp_path, where):
    directory = resolve(run)
    if where == "export":
        directory = tmp_path / "model"
        export(run, directory)
    before = read(directory)
    flip(directory / CALIBRATION)
    with pytest.raises(RedHeartError, match=f"{CALIBRATION} is damaged|{CALIBRATION} is not valid"):
        load_model(directory)
    if where == "checkpoint":  # the run itself goes on, and a new fit is the old one
        train(config(30), data, run, resume="last")
        assert calibrate(directory).calibration == before == load_model(directory).calibration


def test_a_calibration_of_other_weights_is_refused_by_name(run):
    first, newest = committed(run)[0], last(run)
    other = newest if best(run) != newest else first
    shutil.copy(best(run) / CALIBRATION, other / CALIBRATION)
    with pytest.raises(RedHeartError, match=rf"{other.name}/{CALIBRATION} belongs to other weights"):
        load_model(other)
    calibrate(other)
    assert load_model(other).calibration.step == load_model(other).progress.step


def test_a_run_that_goes_on_or_is_replaced_leaves_no_calibration_behind(run, data):
    earlier = read(best(run))
    train(config(30), data, run, resume="last")
    for directory in committed(run):
        load_model(directory)  # what is beside weights belongs to them
    assert read(best(run)).step == load_model(run).progress.best_step
    train(config(10), data, run, overwrite=True)
    assert load_model(run).calibration not in (None, earlier)
    assert len(list(run.rglob(CALIBRATION))) == 1


def test_what_ends_early_or_keeps_nothing_fits_none(run, data, tmp_path, monkeypatch):
    class Stopped(start.Trainer):
        def run(self):
            stop = super().run()
            stop.signal = 15
            return stop

    train(config(10), data, tmp_path / "dry", update_parameters=False)
    monkeypatch.setattr(start, "Trainer", Stopped)
    train(config(10), data, tmp_path / "stopped")
    assert not list(tmp_path.glob("dry/**/" + CALIBRATION)) + list(tmp_path.glob("stopped/**/" + CALIBRATION))
    assert calibrate(tmp_path / "stopped").path == best(tmp_path / "stopped") / CALIBRATION


def test_an_export_is_calibrated_too_and_stays_whole(run, data, tmp_path):
    (best(run) / CALIBRATION).unlink()
    export(run, tmp_path / "model")
    for _ in range(2):
        made = calibrate(tmp_path / "model", str(data))
        verify_manifest(tmp_path / "model")
        assert CALIBRATION in read_sealed_json(tmp_path / "model" / "manifest.json", "")["files"]
        assert load_model(tmp_path / "model").calibration == made.calibration


def test_the_commands_show_it(run, data, monkeypatch, capsys):
    (best(run) / CALIBRATION).unlink()
    code, out, err = command(monkeypatch, capsys, "calibrate", "--checkpoint", str(run), "--json")
    assert code == 0
    assert json.loads(out)["answers"]["emotion"][0]["rows"] == ROWS
    assert "emotion.neutral, vad.dominance, ethics.deontological (all labels on dev are alike)" in err
    code, out, _ = command(monkeypatch, capsys, "predict", "we laughed", "--checkpoint", str(run), "--json")
    assert set(json.loads(out)[0]["emotion_chosen"]) <= set(EMOTIONS)
    _, out, _ = command(monkeypatch, capsys, "predict", "we laughed", "--checkpoint", str(run))
    assert "emotion_chosen" in out
    with exclusive(run, "training"):
        code, _, err = command(monkeypatch, capsys, "calibrate", "--checkpoint", str(run))
    assert code == 1
    assert "at work" in err


def test_other_ranks_have_nothing_to_wait_for(run, data, monkeypatch):
    """The fit makes no collective: each of them asks first whether there are other ranks, and nobody asks."""
    loaded, dev = load_model(run), SampleStream(data, "dev")

    def asked() -> bool:
        raise AssertionError("a collective")

    monkeypatch.setattr("redheart.ranks._group", asked)
    assert start.calibrate_best(run, dev, loaded.progress) == best(run) / CALIBRATION
    with pytest.raises(AssertionError, match="a collective"):
        evaluate(loaded.model, dev, config(1).loss, dict.fromkeys(loaded.progress.scales, 1.0))


def test_the_report_says_how_far_answers_can_be_taken_at_their_word(run, data, tmp_path):
    """On test by the checkpoint's own calibration, on dev each half by the other; the figures are those of the answers themselves."""
    loaded = load_model(run)
    test, dev = (score_split(loaded.model, SampleStream(data, s)) for s in ("test", "dev"))
    report, path = validate(run, None, "test", None)
    said = report.to_json()["calibration"]
    assert said["fitted_on"] == "the checkpoint's own, fitted on dev"
    assert "15 bins of equal mass" in said["bins"]
    after = with_lines("emotion", loaded.calibration.answers["emotion"], test["emotion"])
    assert said["answers"]["emotion"]["after"]["brier"] == pytest.approx(brier_score(after))
    assert said["answers"]["emotion"]["before"]["brier"] == pytest.approx(
        brier_score(uncalibrated("emotion", test["emotion"]))
    )
    assert set(said["answers"]["emotion"]["ece"]) == set(EMOTIONS)
    assert (path.parent / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "![mean label over mean prediction](reliability.png)" in path.read_text()
    assert "reliability.png" in owned(run, "run")

    report, _ = validate(run, None, "dev", tmp_path / "dev.md")
    said = report.to_json()["calibration"]
    assert said["fitted_on"] == "each half of dev by what the other half says"
    assert said["answers"]["emotion"]["after"]["brier"] == pytest.approx(
        brier_score(crossed("emotion", dev["emotion"]))
    )

    (best(run) / CALIBRATION).unlink()
    report, _ = validate(run, None, "test", tmp_path / "test.md")
    said = report.to_json()["calibration"]
    assert said["fitted_on"] == "the checkpoint has none: fitted on dev for this report"
    assert said["answers"]["emotion"]["after"]["brier"] == pytest.approx(brier_score(after))


def brier_score(given: Answers) -> float:
    return float(np.mean((given.prediction[given.known] - given.target[given.known]) ** 2))
