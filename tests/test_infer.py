"""What the pipeline answers: what labels trained and nothing else, finite numbers, and never less of a text than it says."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import redheart.infer as infer
import redheart.train.start as start
from redheart.config import LossConfig, load_config
from redheart.data.pretrained import encoder_path
from redheart.data.shards import INDEX, SplitsWriter
from redheart.evaluation.curves import scalars
from redheart.evaluation.rows import Rows
from redheart.evaluation.trained import (
    counted,
    joined,
    label_counts,
    label_weights,
    labelled_entries,
    trained_entries,
    untrained_names,
)
from redheart.infer import RedHeartPipeline
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.schema import BENTHAM, EMOTIONS, LABELS, RedHeartError
from redheart.tasks import TASKS
from redheart.train.export import export, load_model
from redheart.train.named import check_names
from redheart.train.progress import Progress
from redheart.train.start import train
from redheart.train.validate import validate
from tests.data.shard_data import write_index

WIDTH, TOKENS = 8, 6
MADE_WITH = {"name": "random", "revision": "r", "layers": [1], "width": WIDTH, "max_tokens": TOKENS}
SMALL = [
    "model.encoder_width=8",
    "model.width=24",
    "model.heads=2",
    "model.layers=1",
    "model.task_width=16",
    "model.task_heads=2",
]
TRAINING = [
    "training.max_steps=2",
    "training.global_batch_size=4",
    "training.micro_batch_size=4",
    "training.precision=fp32",
]
ENCODER = ["data.encoder.name=random", "data.encoder.layers=[1]", f"data.encoder.max_tokens={TOKENS}"]
ALL = {name: (True,) * label.size for name, label in LABELS.items()}
NONE = {name: (False,) * label.size for name, label in LABELS.items()}


class Encoder:
    """Stands in for the frozen encoder: a random vector per word."""

    fingerprint, width = MADE_WITH, WIDTH

    def __init__(self, *_: object):
        self.config = SimpleNamespace(max_tokens=TOKENS, names="package:minilm")
        self.tokenizer = AutoTokenizer.from_pretrained(encoder_path("package:minilm"))
        self.each = [self]

    def encode(self, texts):
        rng = np.random.default_rng(0)
        lengths = [len(t.split()) for t in texts]
        features = [rng.normal(size=(min(n, TOKENS), WIDTH)).astype(np.float16) for n in lengths]
        return features, [n > TOKENS for n in lengths]


@pytest.fixture(scope="module")
def model() -> RedHeartModel:
    torch.manual_seed(0)
    sizes = {"encoder_width": WIDTH, "width": 24, "heads": 2, "layers": 1, "task_width": 16, "task_heads": 2}
    return RedHeartModel(RedHeartConfig(**sizes, encoder=MADE_WITH))


def row(number: int, split: str, **labels: object) -> dict:
    rng = np.random.default_rng(number)
    made: dict = dict.fromkeys(LABELS)
    made |= {"id": str(number), "source": "s", "split": split, "lang": "en", "text": "t", "contrast_text": None}
    made |= {"features": rng.normal(size=(3, WIDTH)).astype(np.float16), "contrast_features": None, **labels}
    return made | {"label_weight": dict.fromkeys(labels, 0.5), "label_origin": dict.fromkeys(labels, "human")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emotion without `disgust`, and two of three views of regret, in training; regret in dev and test alone."""
    out = tmp_path_factory.mktemp("emotion-only")
    writer = SplitsWriter(out, WIDTH, TOKENS)
    emotion = lambda n: [float(n % 2), 1.0 - n % 2, 0.5, 0.0, 0.0, None, 0.0]  # noqa: E731
    views = [None, 0.25, 0.5]
    writer.write("train-00000.arrow", [row(n, "train", emotion=emotion(n), regret_views=views) for n in range(8)], 1)
    for first, split in ((10, "dev"), (20, "test")):
        rows = [row(n, split, emotion=emotion(n), regret=(n % 4) / 4) for n in range(first, first + 4)]
        writer.write(f"{split}-00000.arrow", rows, 1)
    write_index(out, writer.finish(), MADE_WITH, levels={"regret": [1 / 3, 2 / 3]})
    return out


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emotion-run") / "run"
    train(load_config("local", [*SMALL, *TRAINING, *ENCODER, "memory.strategy=plain"]), data, out)
    return out


def test_label_weights_are_the_sums_over_the_training_rows(data):
    weights = label_weights(json.loads((data / INDEX).read_text())["splits"]["train"]["histograms"])
    expected = {name: [0.0] * label.size for name, label in LABELS.items()}
    expected |= {"emotion": [4.0] * 5 + [0.0, 4.0], "regret_views": [0.0, 4.0, 4.0]}
    assert weights == expected
    assert joined({}, weights) == weights
    earlier = {**expected, "regret": [7.0], "emotion": [1.0] * 7}
    assert joined(earlier, weights) == {**expected, "regret": [7.0], "emotion": [4.0] * 5 + [1.0, 4.0]}


def test_labels_are_counted_whatever_they_weigh_and_however_often_a_row_is_shown(data, tmp_path):
    expected = {name: [0] * label.size for name, label in LABELS.items()}
    expected |= {"emotion": [8] * 5 + [0, 8], "regret_views": [0, 8, 8]}
    assert label_counts(json.loads((data / INDEX).read_text())["splits"]["train"]) == expected
    writer = SplitsWriter(tmp_path, WIDTH, TOKENS)
    weighed = [row(n, "train", regret=0.5) | {"label_weight": {"regret": float(n > 0)}} for n in range(3)]
    writer.write("train-00000.arrow", weighed, 5)  # an epoch shows each five times; one label weighs nothing
    facts = writer.finish()["train"]
    assert (label_counts(facts)["regret"], label_weights(facts["histograms"])["regret"]) == ([2], [10.0])
    assert label_counts({}) == {}
    assert (counted(expected, "emotion"), counted(expected, "emotion.joy"), counted({}, "emotion")) == (
        "0 to 8",
        "8",
        "",
    )


def test_an_answer_is_trained_where_it_has_labels_and_its_loss_counts():
    weights = {name: [1.0] * label.size for name, label in LABELS.items()} | {
        "culture": [0.0, 2.0, 0.0],
        "surd": [0.0] * 4,
    }
    trained = trained_entries(weights, LossConfig())
    assert trained == ALL | {"culture": (False, True, False), "surd": (False,) * 4}
    assert untrained_names(trained) == ["culture.jeong", "culture.chemyeon", "surd"]
    names = ["regret", "heads.regret/regret", "analyzers.regret/regret"]
    silent = trained_entries(weights, LossConfig(weights=dict.fromkeys(names, 0.0)))
    assert silent == trained | {"regret": (False,)}


@pytest.mark.parametrize(
    ("trained", "keys"),
    [
        ({"emotion": (True,) * 7}, {"emotion": list(EMOTIONS)}),
        ({"emotion": (True, False) * 3 + (True,)}, {"emotion": list(EMOTIONS[::2])}),
        ({"preference": (True,)}, {"utility": None}),
        ({"culture": (False, True, False), "regret": (True,)}, {"culture": ["han 한"], "regret": None}),
        ({"bentham": (True,) * 7, "surd": (False,) * 4}, {"bentham": list(BENTHAM)}),
        ({}, {}),
    ],
)
def test_what_no_label_trained_is_left_out_unless_asked_for(model, trained, keys):
    entries = NONE | trained
    whole = RedHeartPipeline(model, Encoder(), trained=ALL)("we laughed")
    told = RedHeartPipeline(model, Encoder(), trained=entries)("we laughed")
    assert {k: list(v) if isinstance(v, dict) else None for k, v in told.items()} == keys
    for name, value in told.items():
        assert value == ({k: whole[name][k] for k in value} if isinstance(value, dict) else whole[name])
    everything = RedHeartPipeline(model, Encoder(), trained=entries, untrained=True)("we laughed")
    left = everything.pop("untrained")
    assert everything == whole == RedHeartPipeline(model, Encoder())("we laughed")
    kept = {k if v is None else f"{k}.{e}" for k, v in keys.items() for e in (v or [""])}
    shown = {f"{k}.{e}" if e else k for k, v in whole.items() for e in (v if isinstance(v, dict) else [""])}
    marked = {s for s in shown if s in left or s.split(".")[0] in left}
    assert shown - marked == kept


def test_a_run_says_what_it_learned_and_its_export_its_answers_and_its_report_follow(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "TextEncoder", Encoder)
    split = json.loads((data / INDEX).read_text())["splits"]["train"]
    weights, counts = label_weights(split["histograms"]), label_counts(split)
    monkeypatch.delenv("DS_ACCELERATOR")
    export(run, tmp_path / "model")
    assert (
        os.environ["DS_ACCELERATOR"] == "cpu"
    )  # told, before Transformers imports DeepSpeed: it would warn of what it found
    for path in (run, tmp_path / "model"):
        assert load_model(path).progress.labels == weights
        pipeline = RedHeartPipeline.from_pretrained(path)
        assert pipeline.label_counts == counts
        assert "emotion.joy (8 labels), " in repr(pipeline)
        told = pipeline("we laughed")
        assert {k: list(v) for k, v in told.items()} == {
            "emotion": [e for e in EMOTIONS if e != "disgust"],
            "regret_views": ["neutral", "pessimistic"],
        }
    card = (tmp_path / "model" / "README.md").read_text()
    said = [line.removeprefix("- ") for line in card.splitlines() if line.startswith("- ")]
    assert said[:8] == [
        *(f"emotion.{e}: 8 labels" for e in EMOTIONS if e != "disgust"),
        "regret_views.neutral: 8 labels",
        "regret_views.pessimistic: 8 labels",
    ]
    assert not {"regret", "culture", "emotion.disgust"} & {line.partition(":")[0] for line in said}

    report, _ = validate(run, None, "test", tmp_path / "report.md")
    assert {line.task for line in report.lines} == {"emotion"}
    assert {TASKS[name].label for name in report.to_json()["losses"]} == {"emotion"}
    assert "regret" in report.untrained
    assert report.to_json()["label_counts"] == counts
    losses = next(section for section in report.sections() if section.title == "What was learned")
    assert [row[:2] for row in losses.rows] == [["emotion", "0 to 8"]]
    assert "emotion" not in report.untrained
    assert "No label trained these answers" in (tmp_path / "report.md").read_text()
    everything, _ = validate(run, None, "test", tmp_path / "report.md", untrained=True)
    assert {line.task for line in everything.lines} == {"emotion", "regret"}
    assert {TASKS[name].label for name in everything.to_json()["losses"]} == {"emotion", "regret"}
    assert "regret (not trained)" in (tmp_path / "report.md").read_text()


def test_looks_at_dev_while_it_trains_are_at_what_is_trained(run, data):
    losses = load_model(run).progress.initial_dev_losses
    assert {TASKS[name].label for name in losses} == {"emotion"}
    shown = {tag.split("/")[1] for tag in scalars(run) if tag.startswith("1_quality") and tag.endswith("dev_loss")}
    assert shown == {"emotion"}
    dev = Rows(data, "dev", None, labelled_entries(load_model(run).progress.labels))
    said = dev.rows(np.array([1]))[0]
    assert (said["emotion"], said["regret"]) == ([1.0, 0.0, 0.5, 0.0, 0.0, None, 0.0], None)
    with pytest.raises(RedHeartError, match=r"none of the 4 dev rows.*has a label of it that training rows have too"):
        check_names(load_config("local", ["training.best_metric=regret"]), dev)


def test_what_a_run_started_from_had_learned_counts(run, data, tmp_path, monkeypatch):
    config = load_config("local", [*SMALL, *TRAINING, *ENCODER, "memory.strategy=plain", "training.max_steps=1"])
    learned, fitting = load_model(run).progress, start.fitting

    def after(labels: dict, counts: dict):
        def found(*arguments):
            stored = fitting(*arguments)
            return stored._replace(progress=replace(stored.progress, labels=labels, label_counts=counts))

        return found

    more, counts = {**learned.labels, "regret": [9.0]}, {**learned.label_counts, "regret": [30]}
    for number, earlier in enumerate(((more, counts), (more, {}), ({}, {}))):
        monkeypatch.setattr(start, "fitting", after(*earlier))
        state = train(config, data, tmp_path / str(number), init=run).state
        assert (state.labels, state.label_counts) == earlier


def test_an_older_checkpoint_that_does_not_say_gives_everything_and_says_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer, "TextEncoder", Encoder)
    loaded = load_model(run)
    loaded.progress.labels.clear()
    monkeypatch.setattr(infer, "load_model", lambda path: loaded)
    told = RedHeartPipeline.from_pretrained(run)("we laughed")
    assert {"emotion", "regret", "surd", "utility"} <= told.keys()
    assert "does not say which answers its labels trained" in capsys.readouterr().err


def test_an_answer_that_is_not_finite_is_refused_by_name(model):
    pipeline = RedHeartPipeline(model, Encoder(), trained=ALL)
    with torch.no_grad():
        fusion = model.get_submodule("aux.utility")
        weight, layout = fusion.shift.bias, fusion.layout
        kept = weight.clone()
        weight[layout.label_of_entry.index(layout.labels.index("vad")) + 1] = math.nan
        with pytest.raises(RedHeartError, match="network's vad of text 1 is not a finite number"):
            pipeline(["we laughed", "we cried"])
        weight.copy_(kept)
    assert len(pipeline(["we laughed", "we cried"])) == 2


@pytest.mark.parametrize(("words", "tokens"), [(4, None), (5, 7), (30, 32)])  # two tokens are special
def test_a_text_that_loses_its_end_is_named_with_its_length(model, capsys, words, tokens):
    RedHeartPipeline(model, Encoder(), trained=ALL)(["we laughed", "day " * words])
    told = capsys.readouterr().err
    line = f"1 of 2 texts exceed 6 tokens and are cut: only the first 6 of each are read (text 2 has {tokens})\n"
    assert told == (line if tokens else "")


def test_white_space_around_a_text_is_not_read(model, monkeypatch):
    """Nor was it in training."""
    pipeline, read = RedHeartPipeline(model, Encoder(), trained=ALL), []
    encode = pipeline.encoder.encode
    monkeypatch.setattr(pipeline.encoder, "encode", lambda texts: read.extend(texts) or encode(texts))
    frame = pipeline.predict_frame(["  we laughed\n", "we cried"])
    assert read == ["we laughed", "we cried"]
    assert list(frame["text"]) == ["  we laughed\n", "we cried"]


def test_calibration_is_advised_with_data_that_can_do_it(model, monkeypatch, capsys):
    monkeypatch.setattr("redheart.infer.TextEncoder", Encoder)
    for losses, words in (
        ({"regret": 1.0}, "--checkpoint r`\n"),
        ({}, "--checkpoint r --data DIR`, of data with dev rows: "),
    ):
        loaded = model, load_config("local"), Progress(dev_losses=losses), None
        monkeypatch.setattr("redheart.infer.load_model", lambda _, loaded=loaded: loaded)
        RedHeartPipeline.from_pretrained("r")
        assert words in capsys.readouterr().err


def test_a_text_in_no_language_of_the_encoder_is_named(model, capsys):
    pipeline = RedHeartPipeline(model, Encoder(), trained=ALL)
    for text in ("ዛሬ ደስተኛ", "나는 오늘 정말 기쁘다"):  # Amharic: unknown pieces; Korean: letter by letter
        pipeline([text, "we laughed"])
        told = [line for line in capsys.readouterr().err.splitlines() if "language" in line]
        assert len(told) == 1
        assert "1 of 2 texts are in no language that the encoder package:minilm reads" in told[0]
        assert "(text 1: " in told[0]
    pipeline("wir lachten")
    assert "language" not in capsys.readouterr().err


def test_a_text_that_is_no_unicode_is_refused(model):
    with pytest.raises(RedHeartError, match="text 2 is not valid Unicode"):
        RedHeartPipeline(model, Encoder(), trained=ALL)(["we laughed", "half \udcff"])
