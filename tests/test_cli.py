"""What a user may get wrong: one line that names the thing and the remedy, exit code 1 or 2, no traceback, nothing half-written."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from redheart.cli import main
from redheart.console import show_answers
from tests.runs import redheart


def fails(*arguments: str | Path, code: int = 1) -> str:
    result = redheart(*arguments)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [x for x in result.stderr.splitlines() if x.startswith("redheart: ")]
    assert code == 2 or len(lines) == 1, result.stderr
    return result.stderr


def source(tmp_path: Path, content: object) -> str:
    path = tmp_path / "processed_dataset.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"own={path}"


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ("[{]", ["not valid JSON"]),
        ([], ["empty"]),
        ({"text": "x"}, ["list of records"]),
        ([{"text": "fine"}, {"text": 3}], ["record 1", "field text"]),
        ([{"text": "fine", "regret": 1.4}], ["record 0", "field regret", "1.4"]),
        ([{"text": "fine", "emotion": [0.1, 0.2]}], ["field emotion", "7 numbers"]),
        ([{"text": "fine", "lang": "ko"}], ["'ko'", "data.encoder.languages"]),
    ],
)
def test_bad_records_are_named_and_nothing_is_written(tmp_path: Path, records: object, words: list[str]):
    told = fails("prepare", "--source", source(tmp_path, records), "--out", tmp_path / "out")
    assert all(word in told for word in words), told
    assert not (tmp_path / "out").exists()


def test_other_mistakes(tmp_path: Path):
    assert "does not exist" in fails("prepare", "--source", f"own={tmp_path}/none.json", "--out", tmp_path / "out")
    assert "did you mean local" in fails("params", "--preset", "locl")
    assert "did you mean micro_batch_size" in fails(
        "params", "--preset", "local", "--set", "training.micro_batchsize=4"
    )
    assert "redheart prepare" in fails("train", "--data", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "manifest" in fails("evaluate", "--checkpoint", tmp_path / "empty", "--data", tmp_path)
    assert "--data is missing" in fails("train")
    assert "No such option" in fails("train", "--dta", "x", code=2)


def test_params_prints_every_module_as_json():
    told = json.loads(redheart("params", "--preset", "330m", "--json").stdout)
    assert told["total"] == sum(told["modules"].values())
    design = {"backbone": 50e6, "heads.emotion": 22e6, "heads.bentham": 20e6, "heads.regret": 22e6, "heads.surd": 16e6}
    design |= {"analyzers.emotion": 50e6, "analyzers.bentham": 45e6, "analyzers.regret": 50e6, "analyzers.surd": 25e6}
    design |= {"aux.dsp": 10e6, "aux.kalman": 5e6, "aux.utility": 15e6}
    assert told["modules"].keys() == design.keys()
    for name, size in design.items():
        assert told["modules"][name] == pytest.approx(size, rel=0.02), name


def test_a_debugger_gets_the_traceback():
    result = redheart("--debug", "params", "--preset", "none")
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "x"),
        OSError(27, "x"),
        RuntimeError("open file failed with strerror: No space left on device"),
        RuntimeError("file write failed at 3"),
    ],
)
def test_a_write_that_finds_no_room_is_one_line_at_every_door(monkeypatch, capsys, error):
    def full(*_):
        raise error

    monkeypatch.setattr("redheart.cli.check", full)
    monkeypatch.setattr("sys.argv", ["redheart", "export"])
    monkeypatch.delenv("REDHEART_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("redheart: writing failed (")
    assert said[0].endswith("make room, or raise the limit (quota, ulimit -f)")
    error.args = ("a fault of ours",)
    if isinstance(error, RuntimeError):
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 70
        assert capsys.readouterr().err.startswith("Traceback")


def pipe_without_a_reader():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


@pytest.mark.parametrize("arguments", [("train", "--help-config"), ("train", "--help"), ("answers",)])
def test_a_pipe_that_nobody_reads_ends_a_command_as_sigpipe_does(monkeypatch, capsys, arguments):
    """Of more than a stream keeps back: before a command runs, in typer, and from rich's console."""
    show = lambda *_, **__: [show_answers("joy " * 9000, {"regret": 0.5})]  # noqa: E731
    if arguments == ("answers",):
        monkeypatch.setattr("redheart.cli.check", show)
    with suppress(BrokenPipeError), pipe_without_a_reader() as stdout:  # as it is closed
        monkeypatch.setattr("sys.stdout", stdout)
        monkeypatch.setattr("sys.argv", ["redheart", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert (ended.value.code, capsys.readouterr().err) == (128 + signal.SIGPIPE, "")


def test_a_directory_that_is_gone_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["redheart", "export", "--checkpoint", str(tmp_path / "model"), "--out", "new"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "redheart: the directory that this was called in is no longer there: change to another one\n"
    )
