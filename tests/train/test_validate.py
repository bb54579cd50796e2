"""`redheart evaluate` on other data than the run's: what is judged, by which rows, beside what; no figure of what nothing trained."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from redheart.config import load_config
from redheart.data.shards import SplitsWriter
from redheart.evaluation.report import Report
from redheart.schema import EMOTIONS, SPLITS
from redheart.train import start
from redheart.train.start import train
from redheart.train.validate import validate
from tests.data.shard_data import write_index
from tests.test_doors import run as command
from tests.test_infer import ENCODER, MADE_WITH, SMALL, TOKENS, TRAINING, WIDTH, row

ROWS = 24


def made(number: int, split: str, labels: Sequence[str] = ("joy", "regret")) -> dict:
    """Joy and regret as the run learns them; `sadness` and the other emotions, which it does not, are there where they are named."""
    emotion = [float((number + k) % (2 + k) == 0) if name in labels else None for k, name in enumerate(EMOTIONS)]
    given = {"emotion": emotion} if any(v is not None for v in emotion) else {}
    return row(number, split, **given, **({"regret": (number % 5) / 4} if "regret" in labels else {}))


def write(out: Path, **splits: list[dict]) -> Path:
    out.mkdir()
    writer = SplitsWriter(out, WIDTH, TOKENS)
    for split, rows in splits.items():
        writer.write(f"{split}-00000.arrow", rows, 1)
    write_index(out, writer.finish(), MADE_WITH, levels={"regret": [1 / 3, 2 / 3]})
    return out


def rows(split: str, labels: Sequence[str] = ("joy", "regret"), first: int = 0) -> list[dict]:
    first += 1000 * SPLITS.index(split)
    return [made(n, split, labels) for n in range(first, first + ROWS)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two steps, its data beside it."""
    out = tmp_path_factory.mktemp("judged")
    data = write(out / "data", **{split: rows(split) for split in SPLITS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "check_memory", lambda *_: None)  # measures for a while
        train(load_config("local", [*SMALL, *TRAINING, *ENCODER, "memory.strategy=plain"]), data, out / "run")
    return out / "run"


@pytest.fixture(scope="module")
def own(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return validate(run, None, "test", tmp_path_factory.mktemp("own") / "report.md")[0]


def figures(report: Report) -> dict:
    told = report.to_json()
    return {name: told[name] for name in ("losses", "dev_losses", "lines", "verdict", "intervals", "causes_of_regret")}


def test_a_test_set_alone_is_judged_beside_the_runs_own_train_and_dev_rows(run, own, tmp_path):
    new = write(tmp_path / "new", test=rows("test"))
    report, _ = validate(run, new, "test", tmp_path / "report.md")
    assert figures(report) == figures(own)
    assert {line.task for line in report.lines} == {"emotion", "regret"}
    assert all(line.linear is not None for line in report.lines)
    assert f"{new} has no rows in split train: baselines are fitted on the run's own, " in report.footnote()
    assert "has no rows" not in own.footnote()


def test_without_any_training_rows_the_figures_stand_alone(run, own, tmp_path, monkeypatch, capsys):
    new, report = write(tmp_path / "new", test=rows("test")), tmp_path / "not there yet" / "report.md"
    (run.parent / "data").rename(run.parent / "elsewhere")
    try:
        code, out, err = command(
            monkeypatch,
            capsys,
            "evaluate",
            "--checkpoint",
            str(run),
            "--data",
            str(new),
            "--report",
            str(report),
            "--json",
        )
    finally:
        (run.parent / "elsewhere").rename(run.parent / "data")
    assert code == 0, err
    told = json.loads(out)
    assert {line["task"] for line in told["lines"]} == {"emotion", "regret"}
    assert all(line[side] is None for line in told["lines"] for side in ("linear", "constant", "look_up"))
    assert [line["model"] for line in told["lines"]] == [x.model for x in own.lines if x.metric != "tuned_f1"]
    assert all(one["above_constant"] is None for one in told["intervals"])
    assert told["verdict"] == {"lines": [], "answers": {name: {"texts": ROWS} for name in ("emotion", "regret")}}
    assert "there are no baselines" in report.read_text()
    assert report.with_suffix(".html").is_file()


def test_no_figure_is_of_an_entry_that_no_label_trained(run, own, tmp_path):
    """Held-out labels of six more emotions change nothing; `--all` shows them, marked, and judges none."""
    every = ("regret", *EMOTIONS)
    data = write(tmp_path / "all", **{split: rows(split, every) for split in SPLITS})
    report, _ = validate(run, data, "test", tmp_path / "report.md")
    assert "emotion.sadness" in report.untrained
    kept = ("losses", "lines", "verdict", "intervals")
    assert {n: figures(report)[n] for n in kept} == {n: figures(own)[n] for n in kept}
    assert report.reliability[0].entries.keys() == {"joy"}
    told, _ = validate(run, data, "test", tmp_path / "all.md", untrained=True)
    assert figures(told)["lines"] != figures(own)["lines"]
    assert figures(told)["verdict"] == figures(own)["verdict"]
    assert (tmp_path / "all.md").read_text().count("| emotion (partly trained) |") == 6
    assert "partly" not in (tmp_path / "report.md").read_text()


def test_what_was_measured_on_other_rows_is_not_shown_beside_these(run, own, tmp_path):
    other = write(tmp_path / "other", train=rows("train"), dev=rows("dev", first=500), test=rows("test"))
    report, _ = validate(run, other, "test", tmp_path / "report.md")
    assert {name for name, *_ in own.dev_losses} == {name for name, *_ in report.dev_losses} == {"emotion", "regret"}
    assert all(before is not None and constant is not None for _, before, _, constant in own.dev_losses)
    assert all(before is None and constant is None for _, before, _, constant in report.dev_losses)


def test_what_the_training_rows_have_no_label_of_has_no_baseline(run, own, tmp_path):
    data = write(tmp_path / "half", train=rows("train", ("regret",)), dev=rows("dev"), test=rows("test"))
    report, _ = validate(run, data, "test", tmp_path / "report.md")
    sides = {line.task: (line.linear is None, line.constant is None) for line in report.lines if line.metric == "mae"}
    assert sides == {"emotion": (True, True), "regret": (False, False)}
    assert report.verdict.against.keys() == {"constant", "linear"}
    assert all(found.keys() == {"regret"} for found in report.verdict.against.values())
    assert [line.model for line in report.lines] == [line.model for line in own.lines]


def test_data_without_a_label_of_a_trained_answer_are_said_to_judge_nothing(run, tmp_path):
    data = write(tmp_path / "others", test=[row(n, "test", vad=[0.1, n / 10, 0.2]) for n in range(5)])
    report, _ = validate(run, data, "test", tmp_path / "report.md")
    assert not report.lines
    assert "Nothing is judged" in report.footnote()
