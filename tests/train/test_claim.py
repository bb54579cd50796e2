"""What is in a run directory: the run's own is replaced and removed, everything else is left, and one process is at work."""

import json
import resource
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from redheart.cli import app
from redheart.config import RunConfig, load_config
from redheart.files import sha256_of, verify_manifest
from redheart.owned import MARKER, exclusive, own, owned
from redheart.schema import RedHeartError
from redheart.train import trainer
from redheart.train.checkpoint import best, committed, last, read_progress
from redheart.train.export import resolve
from redheart.train.start import train
from redheart.train.told import data_and_commands
from tests.runs import last_weights
from tests.train.tiny import SETTINGS

QUICK = ["memory.strategy=plain", "training.log_every=1", "training.evaluate_every=1", "training.log_samples=true"]


def config(steps: int, *settings: str) -> RunConfig:
    return load_config(
        "local", [*SETTINGS, "training.synergy_every=1000", *QUICK, f"training.max_steps={steps}", *settings]
    )


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, each evaluated and, where better, saved."""
    run = tmp_path_factory.mktemp("claim") / "run"
    train(config(3), data, run)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def content(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): sha256_of(p) for p in sorted(directory.rglob("*")) if p.is_file()}


def test_overwriting_removes_the_run_and_nothing_else(data: Path, run: Path):
    (run / "thesis.txt").write_text("mine")
    (run / "checkpoints.old").mkdir()
    (run / "report.md").write_text("mine: evaluate never wrote one")
    before = {p.name for p in run.iterdir()}
    with pytest.raises(RedHeartError, match="holds a run already: go on with --resume, replace"):
        train(config(1), data, run)
    train(config(1), data, run, overwrite=True)
    assert [d.name for d in committed(run)] == ["step-00000001"]
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert {p.name for p in run.iterdir()} == before
    assert (run / "thesis.txt").read_text() == "mine"
    assert (run / "report.md").read_text().startswith("mine")
    shutil.rmtree(run / "checkpoints")  # killed before its first one: nothing to go on from
    with pytest.raises(RedHeartError, match="no checkpoint yet: replace it with --overwrite"):
        train(config(1), data, run)
    with pytest.raises(RedHeartError, match=r"has no last checkpoint: .*--overwrite"):
        train(config(1), data, run, resume="last")


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints", "tensorboard", "ds_config.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_the_user_s_is_refused_by_name_and_left(data: Path, tmp_path: Path, name: str, overwrite: bool):
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / name).write_text("mine")
    (project / "data" / "index.json").write_text("mine")
    with pytest.raises(RedHeartError, match=f"{name} is there already and was not written by redheart"):
        train(config(1), data, project, overwrite=overwrite)
    assert sorted(p.relative_to(project).as_posix() for p in project.rglob("*")) == sorted(
        [name, "data", "data/index.json"]
    )


def test_prepared_data_are_no_place_for_a_run(data: Path, tmp_path: Path):
    own(tmp_path, "data", ["index.json"])
    with pytest.raises(RedHeartError, match="holds a data, not a run"):
        train(config(1), data, tmp_path, overwrite=True)


def test_a_second_process_is_refused_before_it_writes_anything(data: Path, run: Path):
    before = content(run)
    step_2 = str(run / "checkpoints" / "step-00000002")
    with exclusive(run, "training"):
        held = content(run)
        for resume, overwrite in (("last", False), (step_2, False), (None, True)):
            with pytest.raises(RedHeartError, match=r"another process \(pid \d+\) is training in"):
                train(config(6, "training.seed=1"), data, run, resume, overwrite)
        assert content(run) == held
    assert {n: d for n, d in held.items() if n != ".redheart.lock"} == {
        n: d for n, d in before.items() if n != ".redheart.lock"
    }
    assert train(config(4), data, run, "last").state.step == 4


def test_a_run_of_an_earlier_version_goes_on_and_is_not_overwritten(data: Path, run: Path):
    (run / MARKER).unlink()
    (run / "thesis.txt").write_text("mine")
    before = content(run)
    for overwrite in (False, True):
        with pytest.raises(RedHeartError, match=r"an earlier version wrote it"):
            train(config(4), data, run, overwrite=overwrite)
    assert content(run) == before
    train(config(4), data, run, "last")
    assert {"config.yaml", "checkpoints", "tensorboard", "samples-rank0.jsonl"} <= set(owned(run, "run"))
    assert "thesis.txt" not in owned(run, "run")


@pytest.mark.parametrize("begun", ["init", "branch"])
def test_a_report_s_line_for_the_same_again_begins_where_the_run_began(
    data: Path, run: Path, tmp_path: Path, begun: str
):
    """From weights, or from another run's checkpoint with settings of its own."""
    two, new = tmp_path / "two", tmp_path / "new"
    train(config(2), data, two)
    source = last(two)
    settings = config(3, "optimizer.learning_rate=0.01")
    assert not {"--init", "--resume"} & set(again(run))
    if begun == "init":
        train(settings, data, new, init=source)
    else:
        train(settings, data, new, str(source))
    words = again(new)
    assert words[-2:] == [{"init": "--init", "branch": "--resume"}[begun], str(source)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    repeated, there = last_weights(Path(f"{new}-again")), last_weights(new)
    assert all(torch.equal(repeated[name], tensor) for name, tensor in there.items())


def again(run: Path) -> list[str]:
    newest = last(run)
    progress = read_progress(newest)
    told = data_and_commands(run, newest, progress.data, "dev", {"sources": {}}, progress)
    return shlex.split(told[1].commands[0])[1:]


def test_what_would_undo_itself_is_refused(data: Path, run: Path):
    before = content(run)
    with pytest.raises(RedHeartError, match="give only one"):
        train(config(4), data, run, "last", overwrite=True)
    with pytest.raises(RedHeartError, match="--init reads"):
        train(config(4), data, run, overwrite=True, init=run)
    after = content(run)
    assert after == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["memory.strategy=gpu_8bit"], "none is visible"),
        (["memory.strategy=zero2_offload", "memory.swap=[analyzers.emotion]"], r"needs memory\.strategy=plain"),
        (["optimizer.name=adamw_8bit", "memory.swap=[analyzers.emotion]"], r"without memory\.swap"),
    ],
)
def test_what_the_engine_cannot_run_is_refused_before_a_run_is_removed_or_begun(
    data: Path, run: Path, tmp_path: Path, settings: list[str], words: str
):
    before = content(run)
    with pytest.raises(RedHeartError, match=words):
        train(config(4, *settings), data, run, overwrite=True)
    assert content(run) == before
    with pytest.raises(RedHeartError, match=words):
        train(config(4, *settings), data, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_USE_CPU", "true"), ("DS_ACCELERATOR", "cuda"), ("WORLD_SIZE", "2")]
)
def test_so_is_what_the_launcher_and_the_environment_say(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
):
    before = content(run)
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, said in {**(launcher if name == "WORLD_SIZE" else {}), name: value}.items():
        monkeypatch.setenv(variable, said)
    settings = [] if name == "WORLD_SIZE" else ["memory.strategy=zero2_offload"]
    with pytest.raises(RedHeartError, match=name if settings else "runs on one process"):
        train(config(4, *settings), data, run, overwrite=True)
    assert content(run) == before


def test_losses_that_are_not_finite_leave_the_best_where_it_was(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    good = best(run)
    real = trainer.evaluate

    def broken(*arguments, **options):
        result = real(*arguments, **options)
        return replace(result, total=float("nan"), losses=dict.fromkeys(result.losses, float("nan")))

    monkeypatch.setattr(trainer, "evaluate", broken)
    monkeypatch.setattr("redheart.train.trainer.every", lambda step, n: n == 1 or step % n == 0)
    result = train(config(6, "training.checkpoint_every=1", "checkpoint.keep_last=1"), data, run, "last")
    assert (best(run), last(run).name) == (good, "step-00000006")
    assert result.state.best_step == read_progress(good).step
    assert result.state.last_dev_loss is None
    json.dumps(result.to_json(), allow_nan=False)
    for name in ("trainer.json",):
        assert "NaN" not in (last(run) / name).read_text()
    verify_manifest(good)
    fresh = run.parent / "fresh"
    train(config(2), data, fresh)
    assert best(fresh) is None
    assert resolve(fresh) == last(fresh)
    assert "reading the last, step-00000002" in capsys.readouterr().err
    assert not (fresh / "checkpoints" / "best").exists()


def test_a_disk_that_fills_up_is_one_line_and_costs_nothing_that_was_saved(data: Path, run: Path):
    before = content(run / "checkpoints")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(p.stat().st_size for p in run.rglob("plain_state.pt"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))
    try:
        with pytest.raises(
            RedHeartError,
            match=r"writing .*step-00000004\.tmp/plain_state\.pt failed .* --resume goes on from .*step-00000003",
        ):
            train(config(5, "training.checkpoint_every=1"), data, run, "last")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(run / "checkpoints") == before
    assert train(config(5), data, run, "last").state.step == 5


def test_a_tensorboard_that_finds_no_room_is_told_once_and_ends_no_run(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    assert train(config(5), data, run, "last").state.step == 5
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.count("TensorBoard's files cannot be written any more") == 1


@pytest.mark.parametrize("refused", ["a name", "init", "memory"])
def test_what_no_data_decides_is_refused_before_a_table_is_prepared(tmp_path, monkeypatch, refused: str):
    def no_room(*_: object) -> None:
        raise RedHeartError("no memory")

    monkeypatch.setattr("redheart.train.start.prepared", lambda *_: pytest.fail("the table was prepared"))
    monkeypatch.setattr("redheart.train.start.check_memory", no_room)
    name = "nonsense" if refused == "a name" else "loss"
    wanted = config(1, "data.file=texts.csv", f"training.best_metric={name}")
    words = {"a name": "best_metric = nonsense", "init": "does not exist", "memory": "no memory"}[refused]
    with pytest.raises(RedHeartError, match=words):
        train(wanted, None, tmp_path / "run", overwrite=True, init=tmp_path / "x" if refused == "init" else None)
    assert not (tmp_path / "run").exists()
