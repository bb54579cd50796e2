"""What a resume may change, what it refuses, and whose settings it takes; names that were looked up too late."""

import copy
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from redheart.config import RunConfig, leaves, load_config
from redheart.data.card import cut_texts
from redheart.data.stream import SampleStream
from redheart.schema import Batch, RedHeartError
from redheart.train.checkpoint import read_progress
from redheart.train.named import check_names
from redheart.train.resume import ON_RESUME, accept, changes, command, order_of_rows, settings
from redheart.train.start import train as start
from redheart.train.start import with_edges
from redheart.train.validate import validate
from tests.train.tiny import make_batch

SETTINGS = [
    *("model.width=24", "model.heads=2", "model.layers=1", "model.task_width=16", "model.task_heads=2"),
    *("memory.strategy=plain", "training.global_batch_size=4", "training.max_steps=2", "training.checkpoint_every=1"),
    *("training.log_samples=true", "training.seed=5"),
]
OTHER = {  # another value of every key that a resume refuses
    "model.encoder_width": 384, "model.width": 48, "model.heads": 3, "model.layers": 2, "model.task_width": 32,
    "model.task_heads": 4, "model.num_experts": 4, "model.ablate": "[analyzers.surd]", "data.encoder.name": "package:other",
    "data.encoder.layers": "[5, 6]", "data.encoder.beside": "[{name: b, layers: [1]}]", "data.encoder.max_tokens": 32,
    "training.seed": 6, "training.global_batch_size": 2,
    "optimizer.name": "adamw_8bit", "optimizer.betas": "[0.8, 0.999]", "optimizer.eps": 1e-6, "optimizer.weight_decay": 0.1,
    "memory.strategy": "zero2_offload", "training.precision": "bf16", "loss.weights": "{emotion: 2}",
    "loss.shares.heads": 0.5, "loss.shares.analyzers": 0.5, "loss.shares.aux": 0.5, "loss.focal_gamma": 1,
    "loss.huber_delta": 0.5, "loss.extreme_penalty": 0.2, "loss.constant_floor": 0.1, "training.best_metric": "emotion",
    "training.evaluate_rows": 2, "loss.regret_edges": "[0.1, 0.2]",
}  # fmt: skip


def local(*more: str) -> RunConfig:
    """What a run keeps of itself names every step of a look at dev."""
    return load_config("local", [*SETTINGS, "training.evaluate_every=1", *more])


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("resume") / "run"
    start(local(), data, run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def resolved(data: Path, *more: str) -> RunConfig:
    """As a run on `data` keeps its settings: with the edges of regret's levels that the data name."""
    return with_edges(local(*more), SampleStream(data, "train"))


def content(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_every_refused_key_is_tried():
    assert set(OTHER) == {key for key, rule in ON_RESUME.items() if rule.kind == "refused"}


@pytest.mark.parametrize("key", OTHER)
def test_a_key_that_the_checkpoint_cannot_take_is_refused_by_name_and_nothing_is_touched(data, trained, key):
    before = content(trained)
    with pytest.raises(RedHeartError) as error:
        start(local("training.max_steps=4", f"{key}={OTHER[key]}"), data, trained, resume="last")
    assert key in str(error.value)
    if not key.startswith("data.encoder.") and key not in (
        "model.encoder_width",
        "loss.regret_edges",
    ):  # these, the data refuses already
        old, new = changes(local(), local(f"{key}={OTHER[key]}"))[key]
        assert f"{key}: {json.dumps(old)} → {json.dumps(new)}" in str(error.value)
    assert content(trained) == before


def test_what_may_change_does_and_is_recorded(data, run, capfd):
    wanted = local("training.max_steps=3", "optimizer.learning_rate=0.002", "training.micro_batch_size=2")
    start(wanted, data, run, resume="last")
    saved = read_progress(run / "checkpoints" / "step-00000003")
    recorded = [
        {"step": 2, "key": "optimizer.learning_rate", "from": 0.0007, "to": 0.002},
        {"step": 2, "key": "training.max_steps", "from": 2, "to": 3},
        {"step": 2, "key": "training.micro_batch_size", "from": 32, "to": 2},
    ]
    assert sorted(saved.changes, key=lambda c: c["key"]) == recorded
    assert load_config(str(run / "config.yaml")) == with_edges(wanted, SampleStream(data, "train"))
    told = capfd.readouterr().err
    assert "from step 2 on training.max_steps: 2 → 3 (the learning rates of the steps to come" in told
    assert "from step 2 on training.micro_batch_size: 32 → 2\n" in told

    start(local(*leaves_of(wanted), "training.max_steps=4"), data, run, resume="last")
    again = read_progress(run / "checkpoints" / "step-00000004").changes
    assert again == [*saved.changes, {"step": 3, "key": "training.max_steps", "from": 3, "to": 4}]


def leaves_of(config: RunConfig) -> list[str]:
    changed = ("optimizer.learning_rate", "training.micro_batch_size")
    return [f"{key}={leaves(config)[key]}" for key in changed]


def test_a_dry_run_leaves_the_run_that_it_goes_on_with_as_it_was(data, run, capfd):
    """It goes back to the first step, of whose successors the run has records."""
    before, source = content(run), run / "checkpoints" / "step-00000001"
    result = start(local(), data, run, resume=str(source), update_parameters=False)
    assert (result.from_step, result.state.step) == (1, 2)
    assert result.summary().endswith(f"{run} is as it was")
    assert "will be removed" not in capfd.readouterr().err
    assert {name for name, held in content(run).items() if held != before.get(name)} <= {".redheart.lock"}
    assert content(run).keys() == before.keys()


def test_what_patience_ended_says_how_to_go_on_and_trains_on_in_another_directory(data, tmp_path):
    spoilt = local("training.max_steps=9", "training.patience=1", "optimizer.learning_rate=1.0")
    ended = start(spoilt, data, tmp_path / "run")
    again = start(spoilt, data, tmp_path / "run", resume="last")
    assert ended.state.step == again.state.step < 9
    assert ["training.patience=2 or more, or null, goes on" in one.end for one in (ended, again)] == [False, True]
    branch = start(
        local("training.max_steps=9", "training.patience=1"), data, tmp_path / "branch", str(tmp_path / "run")
    )
    assert branch.state.step > ended.state.step
    assert branch.calibration


def test_an_optimizer_that_is_named_or_implied_is_the_same():
    assert changes(local(), local("optimizer.name=adamw")) == {}
    eight = ["memory.strategy=zero2_offload_8bit", "optimizer.name=adamw_8bit"]
    assert set(changes(local(), local(*eight))) == {"memory.strategy", "optimizer.name"}


def test_a_resume_without_a_preset_takes_the_settings_of_the_run(data, trained):
    call = settings(None, ["training.log_every=3"], trained, "last")
    assert call == (resolved(data, "training.log_every=3"), trained, str(data.resolve()))
    assert settings(None, [], trained, "last", "elsewhere").data == "elsewhere"
    named = settings("local", ["training.log_every=3"], trained, "last")
    assert named.config.training.seed == 0  # and will be refused
    assert settings(None, [], None, None, "d") == (load_config("local"), Path("runs/local"), "d")


def test_a_setting_that_would_change_nothing_is_refused_where_it_is_named(data, trained):
    with pytest.raises(
        RedHeartError, match=r"training\.epochs changes nothing beside training\.max_steps = 2: .*max_steps=null"
    ):
        settings(None, ["training.epochs=80"], trained, "last")
    for steps in ("null", "9"):
        call = settings(None, ["training.epochs=80", f"training.max_steps={steps}"], trained, "last")
        assert call.config.training.epochs == 80
    for setting in ("data.labeler.weight=1.0", "data.mixture.mine=2", "data.dedup=true"):
        key = setting.partition("=")[0].removesuffix(".mine")
        for arguments in ((trained, "last"), (trained / "new", None, str(data))):
            with pytest.raises(RedHeartError, match=f"{key} changes nothing: prepare alone reads it"):
                settings(None, [setting], *arguments)
        load_config("local", [setting])  # `prepare` reads it
    assert settings(None, ["data.labeler.weight=0.3"], trained, "last").data  # as the run has it
    own = ["data.file=mine.csv", "data.labeler.max_texts=3"]
    assert settings(None, own, trained / "new", None, None).config.data.labeler.max_texts == 3


def test_files_may_say_what_prepare_alone_reads(data, trained, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: local\ndata: {labeler: {weight: 1.0}}\ntraining: {epochs: 3, max_steps: 2}\n")
    assert settings(str(file), [], tmp_path / "new", None, str(data)).config.data.labeler.weight == 1.0
    assert settings(str(file), [], trained, "last").config.data.labeler.weight == 1.0


def test_a_path_to_resume_names_its_run(data, run, tmp_path):
    step_1 = run / "checkpoints" / "step-00000001"
    for wanted in (run, step_1):
        assert settings(None, [], None, str(wanted)) == (resolved(data), run, str(data.resolve()))
    loose = shutil.copytree(step_1, tmp_path / "loose")
    with pytest.raises(RedHeartError, match=r"lies in no run.*--out"):
        settings(None, [], None, str(loose))
    other = shutil.copytree(run, tmp_path / "other")
    with pytest.raises(RedHeartError, match="holds another run"):
        start(local("training.max_steps=3"), data, other, resume=str(step_1))
    shutil.rmtree(other / "checkpoints")  # a branch that died before its first checkpoint
    start(local("training.max_steps=3"), data, other, resume=str(step_1))
    assert sorted(path.name for path in (other / "checkpoints").glob("step-*"))[-1] == "step-00000003"


def test_settings_that_were_changed_in_a_checkpoint_are_refused(run):
    path = run / "checkpoints" / "step-00000002" / "config.yaml"
    path.write_text(path.read_text().replace("seed: 5", "seed: 7"))
    with pytest.raises(RedHeartError, match=r"config\.yaml is damaged.*step-00000001"):
        settings(None, [], run, "last")


def test_other_rows_and_a_shorter_run_are_refused(data, trained):
    source = trained / "checkpoints" / "step-00000002"
    index = SampleStream(data, "train").index
    accept(source, read_progress(source), resolved(data), trained, index, 2)
    for split in ("train", "dev"):
        other = copy.deepcopy(index)
        other["splits"][split]["shards"][0]["sha256"] = "0" * 64
        assert order_of_rows(other) != order_of_rows(index)
        with pytest.raises(RedHeartError, match="other rows than what"):
            accept(source, read_progress(source), resolved(data), trained, other, 2)
    with pytest.raises(RedHeartError, match=r"is at step 2 and .*max_steps"):
        accept(source, read_progress(source), resolved(data), trained, index, 1)


def test_the_command_to_go_on_with_survives_a_shell():
    assert shlex.split(command(Path("it's a run"))) == ["redheart", "train", "--out", "it's a run", "--resume"]


class Rows:
    """A dev split of eight rows without the labels in `missing`."""

    def __init__(self, missing: tuple[str, ...] = (), num_rows: int = 8):
        self.missing, self.num_rows = missing, num_rows

    def in_order(self, batch_size: int, max_rows: int) -> Iterator[Batch]:
        batch = make_batch(range(min(self.num_rows, max_rows)))
        for label in self.missing:
            batch.weights[label].zero_()
        yield batch


def test_a_best_metric_that_no_dev_row_can_give_is_refused_before_a_step():
    check_names(local("training.best_metric=bentham"), Rows())
    with pytest.raises(
        RedHeartError, match=r"best_metric = bentham: none of the 8 dev rows.*loss, unexplained, emotion"
    ) as error:
        check_names(local("training.best_metric=bentham"), Rows(("bentham",)))
    assert "bentham" not in str(error.value).split("choose from")[1]
    with pytest.raises(RedHeartError, match="none of the 8 dev rows"):
        check_names(local("training.best_metric=heads.bentham/bentham"), Rows(("bentham",)))
    with pytest.raises(RedHeartError, match="no dev rows"):
        check_names(local("training.best_metric=bentham"), Rows(num_rows=0))
    with pytest.raises(RedHeartError, match=r"left out by model\.ablate"):
        check_names(local("training.best_metric=heads.emotion/emotion", "model.ablate=[heads.emotion]"), Rows())


def test_what_is_unexplained_needs_a_final_answer_that_enters_the_loss():
    labels = tuple(make_batch(range(1)).weights)
    alone = Rows(tuple(x for x in labels if x != "vad"))
    check_names(local("training.best_metric=unexplained"), alone)
    check_names(local("training.best_metric=unexplained", "model.ablate=[aux.utility]"), alone)
    check_names(local("loss.weights={vad: 0}"), alone)  # what the analyzer says of it enters the loss
    with pytest.raises(RedHeartError, match=r"none of the 8 dev rows.*has a label that enters the loss"):
        check_names(local("training.best_metric=unexplained", "loss.weights={vad: 0}"), alone)


def test_what_needs_dev_rows_is_refused_without_them():
    for setting in ("training.patience=1", "checkpoint.keep_best=2"):
        check_names(local(setting), Rows())
        with pytest.raises(RedHeartError, match=f"{setting.replace('=', ' = ')}: the data has no dev rows"):
            check_names(local(setting), Rows(num_rows=0))


def test_a_final_rate_above_the_highest_is_refused():
    check_names(local("optimizer.learning_rate=1.0e-7"), Rows())  # nobody named the final one
    check_names(local("optimizer.final_learning_rate=0.0007"), Rows())
    with pytest.raises(RedHeartError, match=r"final_learning_rate = 0\.01 is above optimizer\.learning_rate = 0\.0007"):
        check_names(local("optimizer.final_learning_rate=0.01"), Rows())


def test_the_loss_needs_a_dev_label_that_enters_it():
    labels = tuple(make_batch(range(1)).weights)
    check_names(local(), Rows(num_rows=0))  # the newest counts as the best
    check_names(local(), Rows(tuple(x for x in labels if x != "vad")))
    with pytest.raises(RedHeartError, match="none of the 8 dev rows"):
        check_names(local(), Rows(labels))
    shares = ["loss.shares.heads=0", "loss.shares.analyzers=0", "loss.weights.vad=0"]
    with pytest.raises(RedHeartError, match="enters the loss"):
        check_names(local(*shares), Rows(tuple(x for x in labels if x != "vad")))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("loss.weights.emotoin=2", r"emotoin.*did you mean emotion"),
        ("memory.swap=[heads.x]", r"memory\.swap: 'heads\.x'"),
        ("model.ablate=[heads.x]", r"unknown module 'heads\.x'"),
        ("training.best_metric=emotoin", "best_metric = emotoin"),
    ],
)
def test_a_name_that_nothing_has_is_refused_before_anything_is_written(data, tmp_path, setting, words):
    with pytest.raises(RedHeartError, match=words):
        start(local(setting), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_report_says_which_texts_were_cut(data, trained, tmp_path, monkeypatch):
    counts = {"everyday": [2, 30], "other": [0, 9]}
    monkeypatch.setattr(
        "redheart.train.validate.cut_texts", lambda index: cut_texts({**index, "report": {"cut_counts": counts}})
    )
    validate(trained, None, "dev", tmp_path / "report.md")
    assert (
        "| texts cut | 2 of 30 texts of everyday exceed 64 tokens: their ends are not read |\n"
        in (tmp_path / "report.md").read_text()
    )


def test_the_report_is_about_the_checkpoint_that_is_judged(data, trained):
    """The first step was saved without a look at dev: its losses are measured, as those of the split are; thresholds are crossed."""
    report, _ = validate(trained / "checkpoints" / "step-00000001", None, "dev", None)
    told = report.to_json()
    after = {name: losses["after"] for name, losses in told["dev_losses"].items()}
    assert {"emotion", "regret"} <= set(after)
    assert after == pytest.approx({name: told["losses"][name] for name in after})
    assert told["checkpoint"].startswith("step-00000001 (1 ")
    assert told["thresholds_chosen_on"] == "the other half of dev"
    assert {line["count"] for line in told["lines"] if line["task"] == "emotion"} == {
        SampleStream(data, "dev").num_rows
    }
