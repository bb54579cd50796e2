"""From Python: the doors' own examples, what a call leaves in the process, and everything that holds texts."""

import doctest
import inspect
import logging
import os
import random
import re
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

import redheart
import redheart.doors as doors
import redheart.infer as infer
from redheart.config import load_config
from redheart.data.store import Store
from redheart.data.stream import SampleStream
from redheart.files import read_pointer
from redheart.memory.budget import forget_peaks, resident_peak
from redheart.schema import RedHeartError
from redheart.train.engine import free_memory
from tests.runs import distance, last_weights

QUICK = {
    "training.max_steps": 2,
    "training.global_batch_size": 8,
    "training.micro_batch_size": 8,
    "training.precision": "fp32",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """(names that the examples have made, what they said, how many failed): they run one after the other, as in a notebook."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("home"))
    names = {"redheart": redheart}
    said: list[str] = []
    runner = doctest.DocTestRunner()
    for door in (doors.prepare, doors.train, doors.evaluate, infer.RedHeartPipeline):
        for example in doctest.DocTestFinder().find(door, globs=names):
            example.globs = names
            runner.run(example, out=said.append, clear_globs=False)
    yield names, "".join(said), runner.summarize(verbose=False)
    os.chdir(before)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("runs/x holds a run already: go on with --resume, replace it with --overwrite, or name another --out",
         ' (in Python --resume is resume="last", --overwrite is overwrite=True, --out is out=)'),
        ("choose --set memory.strategy=plain", " (in Python --set is A__B=C for A.B=C)"),
        ("fit one with `redheart calibrate --data DIR`", ""),
        ("leave it out (redheart train --out x --resume); it ends here", ""),
        ("--threshold 2 is no cosine", ""),
    ],
)  # fmt: skip
def test_an_error_that_names_options_says_what_they_are_in_python(said: str, told: str):
    with pytest.raises(RedHeartError) as error, doors.naming_arguments():
        raise RedHeartError(said)
    assert str(error.value) == said + told


def test_no_argument_is_named_that_no_door_has():
    doors_ = (doors.prepare, doors.train, doors.evaluate)
    known = {name for door in doors_ for name in inspect.signature(door).parameters}
    assert {told.partition("=")[0] for told in doors.ARGUMENTS.values()} - {"A__B"} <= known


def test_the_examples_of_the_docstrings_are_true(home):
    _, said, result = home
    assert (result.attempted, result.failed) == (8, 0), said


def state() -> dict[str, object]:
    """What a call must give back as it found it."""
    return {
        "variables": dict(os.environ),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "random": random.getstate(),
        "group": dist.is_initialized(),
        "handlers": list(logging.getLogger().handlers),
        "level": logging.getLogger().level,
        "filters": list(warnings.filters),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "bars": transformers_logging.is_progress_bar_enabled(),
        "threads": torch.get_num_threads(),
        "folder": Path.cwd(),
    }


@pytest.mark.parametrize("strategy", ["plain", pytest.param("zero2_offload", marks=pytest.mark.slow)])
def test_training_twice_in_a_process_is_the_same_twice_and_leaves_nothing_behind(home, strategy):
    """Also under DeepSpeed, whose process group and settings are the process' own; then from a thread, as servers call."""
    data, before = home[0]["data"], state()
    settings = {**QUICK, "memory.strategy": strategy}
    first, second = (redheart.train(data, f"runs/{strategy}-{name}", settings=settings) for name in "ab")
    assert state() == before
    assert (first.result.total_steps, first.result.state.step) == (2, 2)
    assert distance(*(last_weights(run.path) for run in (first, second))) == 0
    with pytest.raises(RedHeartError, match=f"runs/{strategy}-a holds a run already"):
        redheart.train(data, first, settings=settings)
    assert state() == before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(first.resume, training__max_steps=3).result().result.state.step == 3
    assert state() == before


def test_peaks_count_from_a_call_on():
    held = torch.ones(2**26)
    before = resident_peak()
    del held
    free_memory()
    forget_peaks()
    assert resident_peak() < before - 2**27


def test_a_run_is_read_wherever_a_model_is(home):
    run = home[0]["run"]
    model = redheart.RedHeartModel.from_pretrained(run, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    checkpoint = read_pointer(run.path / "checkpoints" / "best")
    export = run.export("exported")
    mine, theirs = (redheart.RedHeartModel.from_pretrained(path) for path in (checkpoint, export))
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=0, atol=0)
    with pytest.raises(RedHeartError, match=r"no export, and a run takes no device_map: `redheart export --checkpoint"):
        redheart.RedHeartModel.from_pretrained(run, device_map="cpu")


TEXTS = ["I promised to call and forgot.", "We laughed all evening.", "He kept the money he had found."]


def test_texts_come_in_whatever_holds_them(home):
    pipeline = home[0]["pipeline"]
    expected = pipeline(TEXTS)
    assert pipeline(TEXTS[0]).keys() == expected[0].keys()
    held = [tuple(TEXTS), np.array(TEXTS), pd.Series(TEXTS, index=list("xyz")), iter(TEXTS), (t for t in TEXTS)]
    assert all(pipeline(texts) == expected for texts in held)
    frame = pipeline.predict_frame(pd.Series(TEXTS, index=list("xyz")))
    assert list(frame.index) == list("xyz")
    assert list(frame["text"]) == TEXTS
    assert list(frame["emotion.joy"]) == [answer["emotion"]["joy"] for answer in expected]
    assert not any(isinstance(value, dict) for value in frame.iloc[0])


def test_many_texts_are_answered_part_by_part(home, monkeypatch):
    pipeline = home[0]["pipeline"]
    whole = pipeline.predict_frame(TEXTS)
    monkeypatch.setattr(infer, "TOGETHER", 2)
    numbers = whole.select_dtypes("number").columns
    np.testing.assert_allclose(pipeline.predict_frame(TEXTS)[numbers], whole[numbers], atol=2e-3)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a", None], "text 2 is None, not a string"),
        (["a", float("nan")], "text 2 is nan, not a string"),
        (["a", "b", " "], "text 3 is empty"),
        (pd.Series(["a", None], index=["first", "second"]), "text 2 (index 'second') is"),
        ([], "at least one text"),
        ("", "text 1 is empty"),
        (pd.DataFrame({"text": ["a"]}), "a DataFrame is no list of texts: give one column of it"),
        (np.array([["a"]]), "a ndarray is no list of texts"),
        ({"text": "a"}, "a dict is no list of texts"),
        (None, "a NoneType is no list of texts: give a string"),
        (7, "a int is no list of texts: give a string"),
    ],
)
def test_what_is_no_text_is_named_with_its_row(home, texts, words):
    with pytest.raises(RedHeartError, match=re.escape(words)):
        home[0]["pipeline"](texts)


def test_settings_are_keys_with_underscores_sections_or_a_dictionary():
    ways = [
        {"optimizer__learning_rate": 1e-3, "loss__weights": {"regret": 2.0}},
        {"settings": {"optimizer.learning_rate": np.float32(1e-3).item(), "loss.weights": {"regret": 2}}},
        {"optimizer": {"learning_rate": 0.001}, "loss": {"weights": {"regret": 2}}},
    ]
    configs = [load_config("local", doors.overrides(way)) for way in ways]
    assert [c.optimizer.learning_rate for c in configs] == pytest.approx([1e-3] * 3)
    assert [c.loss.weights for c in configs] == [{"regret": 2.0}] * 3
    assert configs[0].optimizer.weight_decay == 0.01  # the rest of the section stays
    with pytest.raises(RedHeartError, match=r"optimizer\.learnin_rate \(did you mean .*learning_rate"):
        redheart.train("nowhere", "runs/x", optimizer__learnin_rate=1)


def test_data_frames_and_records_are_sources(home):
    frame = pd.DataFrame(
        {"body": [f"{TEXTS[i % 3]} {i}" for i in range(12)], "sorry": [*np.linspace(0, 1, 11), np.nan]}
    )
    records = [{"text": "A word.", "regret": 0.25}, {"text": "Another word.", "regret": np.float64(0.5)}]
    made = redheart.prepare(
        {"mine": frame, "more": records},
        "data/frames",
        data__columns={"mine": {"body": "text", "sorry": "regret"}},
        data__labeler__max_texts=0,
    )
    assert sum(made.report.rows.values()) == 14
    assert made.report.labels["regret"] == {"human": 13}
    assert "regret" in repr(made)
    with pytest.raises(RedHeartError, match=r"bad\.jsonl:2, field regret: 7 must"):
        redheart.prepare({"bad": [records[0], {"text": "x", "regret": 7}]}, "data/bad", data__labeler__max_texts=0)


OFF = {"data__labeler__max_texts": 0}


def test_sources_whose_names_end_alike_keep_their_own_rows(tmp_path):
    both = {
        name: pd.DataFrame({"text": [f"{name[:3]}: a word, {n}." for n in range(10)], "regret": 0.5})
        for name in ("a/x", "b/x", "c" * 299)
    }
    made = redheart.prepare(both, tmp_path / "data", **OFF)
    stream = SampleStream(made.path, "train")
    rows = stream.rows(np.arange(stream.num_rows))
    assert {row["source"] for row in rows} == set(both)
    assert all(row["text"].startswith(row["source"][:3]) for row in rows)
    for name in ("a=b", "", "a\0b", 5):
        with pytest.raises(RedHeartError, match="the name of a source is a text"):
            redheart.prepare({name: both["a/x"]}, tmp_path / "no", **OFF)


def test_an_infinity_is_no_missing_label(home):
    """It is refused by its row and column as in a file; what is missing stays missing. So is a text that is no text."""
    bad, columns = -np.inf, {"bad": {"text": "text", "regret": "regret"}}
    rows = [{"text": f"A word {n}.", "regret": 0.5, "emotion": [0.5, None, 0, 0, 0, 0, 1]} for n in range(3)]
    rows[1] |= {"regret": bad}
    for given in (rows, pd.DataFrame(rows)):
        with pytest.raises(RedHeartError, match=rf"bad\.jsonl:2, field regret: {bad} is not a number"):
            redheart.prepare({"bad": given}, "data/infinite", **OFF)
        with pytest.raises(RedHeartError, match=rf"bad\.jsonl:2: column 'regret' holds {bad}, and"):
            redheart.prepare({"bad": given}, "data/infinite", data__columns=columns, **OFF)
    made = redheart.prepare({"bad": pd.DataFrame(rows)}, "data/finite", skip_invalid=True, **OFF)
    assert (made.report.rejected, made.report.labels["regret"]) == (1, {"human": 2})
    with pytest.raises(RedHeartError, match=r"bad\.jsonl:1: not UTF-8"):
        redheart.prepare({"bad": [{"text": "half \ud800"}]}, "data/infinite", **OFF)
    rows[1] |= {"regret": 0.5, "emotion": [float("nan"), bad, 0, 0, 0, 0, 1]}
    for given in (rows, pd.DataFrame(rows)):
        with pytest.raises(RedHeartError, match=rf"bad\.jsonl:2, field emotion\[1\]: {bad} is not a number"):
            redheart.prepare({"bad": given}, "data/infinite", **OFF)


def test_frames_and_data_sets_of_many_kinds_are_sources(home):
    kinds = pd.DataFrame(
        {
            "\U0001f600 \u2028": pd.array([1, None, 0], "Int64"),
            "text": ["One \U0001f600.", "Two.", "Three."],
            "when": pd.to_datetime(["2026-01-02", None, "2026-01-03"]),
            "scores": [np.array([1, np.nan, 0, 0, 0, 0, 0.5], np.float32), None, [0.0] * 7],
        }
    )
    columns = {"mine": {"text": "text", "\U0001f600 \u2028": "regret", "scores": "emotion"}}
    made = redheart.prepare({"mine": kinds}, "data/kinds", data__columns=columns, **OFF)
    assert made.report.labels["regret"] == {"human": 2}
    assert made.report.labels["emotion"] == {"human": 13}
    rows = datasets.Dataset.from_dict({"text": ["One.", "Two."], "regret": [0.5, None]})
    made = redheart.prepare({"mine": rows}, "data/set", **OFF)
    assert (sum(made.report.rows.values()), made.report.labels["regret"]) == (2, {"human": 1})
    with pytest.raises(RedHeartError, match="source mine is a DatasetDict of train: give one of them"):
        redheart.prepare({"mine": datasets.DatasetDict(train=rows)}, "data/no", **OFF)
    with pytest.raises(RedHeartError, match="two columns have the name 'text': rename one"):
        redheart.prepare({"mine": pd.concat([kinds, kinds[["text"]]], axis=1)}, "data/no", **OFF)


def test_a_frame_where_a_path_belongs_is_told_where_it_goes(home):
    frame = pd.DataFrame({"text": ["One."], "regret": [1.0]})
    with pytest.raises(RedHeartError, match=r"data is a DataFrame, .* path.*redheart\.prepare\({"):
        redheart.train(frame, "runs/no", labels={"regret": "regret"})
    with pytest.raises(RedHeartError, match="data is a list"):
        redheart.evaluate("runs/first", frame.to_dict("records"))
    for source in (frame, frame.to_dict("records")):
        with pytest.raises(RedHeartError, match=r"source is a (DataFrame|list): give it a name"):
            redheart.prepare(source, "data/no")


def test_what_comes_back_says_what_it_is(home):
    run, data = home[0]["run"], home[0]["data"]
    assert repr(run).startswith("Run('runs/first'): finished at step 2 of 2 after ")
    assert "; dev loss " in repr(run)
    assert repr(data).startswith("Prepared('data/first'): ")
    assert "<td>regret</td>" in data._repr_html_()
    assert "| everyday | 24 |" in (data.path / "README.md").read_text()  # what was drawn, not the 2,000 that were read
    facts = Store(data.path).index["sources"]["everyday"]
    assert (facts["rows_kept"], facts["rows_written"]) == (2000, 24)
    assert "| everyday | 24 |" in (run.path / "report.md").read_text()
    result = run.evaluate()
    assert repr(result).startswith("Evaluated: test split, ")
    assert len(result.frame()) == len(result.report.lines) > 0
    assert set(run.dev_losses()["total"]) == {0, 1, 2}


def test_the_public_names_are_told():
    assert dir(redheart) == redheart.__all__
    assert all(getattr(redheart, name) is not None for name in redheart.__all__)
    assert (Path(redheart.__file__).parent / "py.typed").is_file()
    assert redheart.train.start.steps_of  # the package of that name stays what it is
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        redheart.fit  # noqa: B018
