"""A table of one's own: one command from texts to answers, settings that are asked for, and mistakes that are named with their remedy."""

import json
import os
import pty
import random
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from redheart.cli import app
from redheart.closing import close
from redheart.config import load_config
from redheart.data.own import SOURCE
from redheart.data.store import Store
from redheart.schema import RedHeartError
from redheart.train import init as module
from redheart.train.calibrate import calibrate
from redheart.train.init import init
from redheart.train.own import _constant as constant
from redheart.train.own import settings
from redheart.train.validate import validate
from tests.runs import ROOT, environment, last_weights, redheart

TINY = [
    *("--set", "model.width=24", "--set", "model.heads=2", "--set", "model.layers=1", "--set", "model.task_width=16"),
    *("--set", "model.task_heads=2", "--set", "memory.strategy=plain", "--set", "training.global_batch_size=4"),
    *("--set", "training.micro_batch_size=4"),
]
COLUMNS = ["--text", "body", "--label", "sorry=regret", "--label", "happy=emotion.joy"]
SORRY = [
    "I am sorry I missed your call",
    "I wish I had never said it",
    "I broke my promise again",
    "I regret selling it",
]
HAPPY = ["We danced all night", "The baby smiled at last", "I got the job today", "They sang and we laughed"]
PLAIN = ["The bus comes at nine", "There are three chairs here"]


def table(path: Path) -> Path:
    """30 rows, of every kind of text three."""
    lines = ["body;sorry;happy"]
    for n in range(3):
        place = ("at home", "in town", "by the lake")[n]
        lines += [f"{t} {place};yes;no" for t in SORRY] + [f"{t} {place};no;yes" for t in HAPPY]
        lines += [f"{t} {place};no;no" for t in PLAIN]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own texts")


@pytest.fixture(scope="module")
def first(folder: Path) -> subprocess.CompletedProcess[str]:
    """Six epochs of 20 rows: 30 steps."""
    data = table(folder / "texts.csv")
    done = redheart("train", "--data", data, *COLUMNS, "--out", folder / "run", *TINY, "--set", "training.epochs=6")
    assert done.returncode == 0, done.stderr
    return done


def test_one_command_leads_from_a_table_to_a_report_and_answers_of_what_was_labelled_alone(folder, first):
    index = Store(folder / "run" / "data").index
    assert {split: facts["rows"] for split, facts in index["splits"].items()} == {"train": 20, "dev": 5, "test": 5}
    assert index["labeler"] is None
    kept = load_config(str(folder / "run" / "config.yaml"))
    assert kept.data.columns == {"own": {"body": "text", "sorry": "regret", "happy": "emotion.joy"}}
    assert kept.training.evaluate_every == 3  # of 30 steps a tenth
    answers = [line.split("│")[1].strip() for line in first.stdout.splitlines() if line.startswith("│")]
    assert set(answers) <= {"emotion", "emotion_chosen", "regret"}
    assert {"emotion", "regret"} <= set(answers)
    assert first.stderr.count("has no column `split`") == 1
    report = (folder / "run" / "report.md").read_text()
    told = report[: report.index("No label trained these answers")]
    for silent in ("vad", "culture", "bentham", "preference", "ethics", "acceptability", "surd"):
        assert f"| {silent}" not in told
    assert not any(silent in first.stdout + first.stderr for silent in ("culture", "bentham", "ethics"))
    for said in (first.stdout, first.stderr, report):
        assert "None" not in said
    shown = redheart("predict", "--checkpoint", folder / "run", "I am sorry", "--json")
    assert set(json.loads(shown.stdout)[0]) <= {"text", "emotion", "emotion_chosen", "regret"}
    assert set(json.loads(shown.stdout)[0]["emotion"]) == {"joy"}


def test_a_table_that_has_changed_is_refused_on_a_resume_that_names_it(folder, first):
    run, data = folder / "run", folder / "texts.csv"
    named = (str(data), "body", ["sorry=regret", "happy=emotion.joy"])
    before = data.read_bytes()
    assert settings(None, None, [], run, "last", *named).data == str(run / "data")
    try:
        data.write_bytes(before.replace(b";yes;no", b";no;no", 1))  # one label
        with pytest.raises(
            RedHeartError, match=r"texts\.csv has changed since .*leave it out .*--resume\); .*another --out"
        ):
            settings(None, None, [], run, "last", *named)
        assert settings(None, None, [], run, "last").data == str(run / "data")
        data.write_bytes(before.replace(b"\n", b"\r\n"))  # the same rows
        assert settings(None, None, [], run, "last", *named).data == str(run / "data")
    finally:
        data.write_bytes(before)


def test_data_that_was_prepared_anew_is_not_taken_for_what_was_trained_on(tmp_path):
    """A start that is refused after its table was prepared leaves the earlier run beside the new rows."""
    data, run = table(tmp_path / "texts.csv"), tmp_path / "run"
    again = ["train", "--data", data, *COLUMNS, "--out", run, *TINY, "--set", "training.max_steps=1"]
    assert redheart(*again).returncode == 0
    data.write_text(data.read_text().replace("by the lake", "on the hill"))
    refused = redheart(*again, "--overwrite", "--set", "training.best_metric=culture")  # the data says so
    assert (refused.returncode, "best_metric = culture" in refused.stderr) == (1, True)
    for door in (lambda: validate(run, None, "test", None), lambda: calibrate(run)):
        with pytest.raises(RedHeartError, match=r"run/data holds other rows than this was trained on .*--data"):
            door()


def test_what_closes_a_run_leaves_stdout_to_its_json(folder, first, capsys):
    close(folder / "run", aside=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert "│ regret" in said.err


@pytest.mark.slow  # three runs
def test_what_was_prepared_is_used_again_and_a_run_is_not_replaced_unasked(folder, first):
    index = folder / "run" / "data" / "index.json"
    before = index.stat().st_mtime_ns
    again = ["train", "--data", folder / "texts.csv", *COLUMNS, "--out", folder / "run", *TINY]
    refused = redheart(*again)
    assert (refused.returncode, index.stat().st_mtime_ns) == (1, before)
    assert "holds a run already" in refused.stderr
    done = redheart(*again, "--overwrite", "--set", "training.max_steps=1", "--json")
    assert json.loads(done.stdout)["steps"] == 1
    assert (done.returncode, index.stat().st_mtime_ns) == (0, before), done.stderr
    other = ["train", "--data", folder / "texts.csv", *COLUMNS[:4], "--out", folder / "run", *TINY, "--overwrite"]
    done = redheart(*other, "--set", "training.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert index.stat().st_mtime_ns > before
    assert "emotion" not in Store(index.parent).index["report"]["labels"]


@pytest.mark.slow  # three runs
def test_the_line_printed_at_an_interruption_leads_to_the_parameters_of_the_undisturbed_run(folder, tmp_path):
    """Interrupted at a step that the seed of the day chooses."""
    data, step = table(tmp_path / "texts.csv"), random.Random(time.time()).randrange(2, 15)
    arguments = [
        "train",
        "--data",
        data,
        *COLUMNS,
        *TINY,
        "--set",
        "training.max_steps=40",
    ]
    arguments += ["--set", "training.log_samples=true", "--set", "optimizer.learning_rate=0.002"]
    whole = redheart(*arguments, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    code, output = interrupted(arguments, tmp_path / "a run", step)
    assert code == 128 + signal.SIGINT, output
    line = next(x for x in output.splitlines() if x.startswith("go on with: ")).removeprefix("go on with: ")
    assert shlex.split(line) == ["redheart", "train", "--out", str(tmp_path / "a run"), "--resume"]
    resumed = redheart(*shlex.split(line)[1:])
    assert resumed.returncode == 0, resumed.stderr
    expected, got = last_weights(tmp_path / "whole"), last_weights(tmp_path / "a run")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[k], got[k]) for k in expected), f"interrupted at {step}"


def interrupted(arguments: Sequence[str | Path], run: Path, step: int) -> tuple[int, str]:
    command = [sys.executable, "-m", "redheart", *map(str, arguments), "--out", str(run)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log, deadline = run / "samples-rank0.jsonl", time.monotonic() + 200
    while not log.exists() or len(log.read_bytes().splitlines()) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def test_init_writes_an_entry_a_line_however_long_it_is(tmp_path):
    folder = tmp_path / "My Documents of the research group" / "Survey on regret in the spring of 2026, cleaned twice"
    folder.mkdir(parents=True)
    column, file = (
        "How sorry were you, all in all, " + "and looking back at it now, " * 5,
        folder / "texts of the survey.csv",
    )
    table(folder / "first.csv")
    text = (folder / "first.csv").read_text("utf-8-sig")
    file.write_text(text.replace("sorry", f'"{column}"', 1))
    init(str(file), "body", [f"{column}=regret"], "none", 1, "en", tmp_path / "long.yaml")
    written = settings(str(tmp_path / "long.yaml"), None, [], None, None).config.data
    assert (written.file, written.columns[SOURCE][column]) == (str(file), "regret")


def test_init_writes_settings_that_say_what_the_options_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "texts.csv")
    given = ("texts.csv", "body", ["sorry=regret", "happy=emotion.joy"])
    init(*given, "none", 0.1, "en", Path("a.yaml"))
    written = settings("a.yaml", None, [], None, None).config
    options = settings(None, None, [], None, None, *given).config
    assert written.data == options.data
    assert written.training.epochs == pytest.approx(0.1 * 60 * 88 / 20, abs=0.1)
    assert Path("a.yaml").read_text().startswith("# Settings of a run on texts.csv: redheart train a.yaml\n")
    Path("kept").mkdir()
    init(*given, "8GB", 60, "ko", Path("kept/b.yml"))
    assert "redheart train kept/b.yml\n" in Path("kept/b.yml").read_text()
    words = shlex.split(
        "init --data texts.csv --text body --label sorry=regret --gpu-memory none --minutes 1 --language en"
    )
    said = CliRunner().invoke(app, [*words, "--out", "my a.yml"])
    assert "train with: redheart train 'my a.yml' --out 'runs/my a'\n" in said.stderr
    assert Path("my a.yml").read_text().splitlines()[0].endswith(": redheart train 'my a.yml'")
    told = settings("kept/b.yml", None, [], None, None).config
    assert told.memory.gpu_memory_gib == pytest.approx(7.45, abs=0.01)
    assert told.data.encoder.languages == ("ko",)
    assert told.training.epochs == options.training.epochs
    Path("pretty.jsonl").write_text('[\n {"body": "One."}\n]')
    with pytest.raises(RedHeartError, match=r"pretty\.jsonl:1: not valid JSON"):
        init("pretty.jsonl", *given[1:], "none", 1, "en", Path("c.yaml"))
    with pytest.raises(RedHeartError, match="exists already"):
        init(*given, "none", 1, "en", Path("a.yaml"))
    with pytest.raises(RedHeartError, match=r"'korean': package:e5-small-ko reads af, .*data\.encoder\.name"):
        init(*given, "none", 1, "korean", Path("c.yaml"))
    monkeypatch.setattr(module, "_ask", lambda *_: "nan")
    with pytest.raises(RedHeartError, match="--minutes 'nan': give a number above 0"):
        init(*given, "none", None, "en", Path("c.yaml"))
    assert not Path("c.yaml").exists()


def answered(directory: Path, answers: dict[str, str], *arguments: str) -> str:
    """`redheart init` on a pseudo-terminal: each question (its first words) gets its answer as it is asked; what the terminal shows."""
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "redheart", "init", *arguments]
    process = subprocess.Popen(command, cwd=directory, env=environment(), stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown, left = b"", list(answers.items())
    while True:
        ready, _, _ = select.select([ours], [], [], 120)
        assert ready, shown.decode()
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other side was closed
            break
        shown += part
        question = shown.decode(errors="replace").rpartition("\n")[2]
        if left and question.startswith(left[0][0]) and question.endswith(": "):
            os.write(ours, left.pop(0)[1].encode() + b"\n")
    os.close(ours)
    assert process.wait(60) == 0, shown.decode()
    assert not left, shown.decode()
    return shown.decode()


FIVE = {
    "Your texts (": "texts.csv",
    "Which column holds the texts [body]": "",  # what is usual
    "Which columns are answers": "sorry=regret happy=emotion.joy",
    "Memory of your GPU": "none",
    "How many minutes": "1",
    "Language of the texts": "en",
}


def test_init_asks_on_a_terminal_and_says_which_encoder_reads_another_language(tmp_path):
    table(tmp_path / "texts.csv")
    shown = answered(tmp_path, FIVE)
    assert "its columns: body, sorry, happy" in shown
    assert "redheart train redheart.yaml --out runs/redheart" in shown
    assert "the default encoder reads English" not in shown
    config = load_config(str(tmp_path / "redheart.yaml"))
    assert config.data == load_config("local", own_columns("texts.csv")).data
    korean = answered(tmp_path, {**FIVE, "Language of the texts": "ko"}, "--out", "ko.yaml")
    assert "for 'ko' it is package:e5-small-ko" in " ".join(korean.split())
    encoder = load_config(str(tmp_path / "ko.yaml")).data.encoder
    assert (encoder.name, encoder.languages) == ("package:e5-small-ko", ("ko",))
    assert "setup_env.sh --e5" in (tmp_path / "ko.yaml").read_text()


def test_init_reads_headings_with_blanks_and_a_table_whose_name_of_texts_tells_how_it_is_separated(
    tmp_path, monkeypatch
):
    text = table(tmp_path / "first.csv").read_text("utf-8-sig")
    (tmp_path / "texts.csv").write_text(text.replace("sorry", "sorry, really", 1))
    asked = iter(["body", "'sorry, really=regret' happy=emotion.joy"])
    columns = {"body": "text", "sorry, really": "regret", "happy": "emotion.joy"}
    monkeypatch.setattr(module, "_ask", lambda *_: next(asked))
    for name, given in (("a", ("body", ["sorry, really=regret", "happy=emotion.joy"])), ("b", (None, []))):
        init(str(tmp_path / "texts.csv"), *given, "none", 1, "en", tmp_path / f"{name}.yaml")
        assert load_config(str(tmp_path / f"{name}.yaml")).data.columns == {"own": columns}


def own_columns(file: str) -> list[str]:
    columns = {"own": {"body": "text", "sorry": "regret", "happy": "emotion.joy"}}
    return [f"data.file={file}", f"data.columns={json.dumps(columns)}"]


@pytest.mark.slow
def test_what_init_wrote_on_a_terminal_trains(tmp_path):
    table(tmp_path / "texts.csv")
    told = answered(tmp_path, FIVE)
    line = told[told.index("redheart train ") :].split()[:5]
    command = [sys.executable, "-m", *line, *TINY, "--set", "training.max_steps=3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "at step 3 of 3" in done.stderr
    assert Store(tmp_path / "runs" / "redheart" / "data").index["splits"]["train"]["rows"] == 20


MISTAKES = [
    (["--data", "{d}/none.csv"], "none.csv does not exist"),
    (["--data", "{d}"], "redheart prepare"),
    (["--data", "{d}", "--label", "a=regret"], "is none: give --data a file"),
    (["--data", "{d}/t.csv", "--label", "sorry"], "write it as COLUMN=ANSWER"),
    (["--data", "{d}/t.csv", "--text", "body", "--label", "happy=joy"], "did you mean emotion.joy?"),
    (["--data", "{d}/t.csv", "--text", "Body", "--label", "sorry=regret"], "did you mean 'body'?"),
    (["--data", "{d}/t.csv", "--text", "body"], "--label COLUMN=regret"),
    (["--data", "{d}/five.csv", "--text", "body", "--label", "mood=vad.valence"], "five.csv:2: column 'mood' holds 4"),
    (["--data", "{d}/ragged.csv", "--text", "body", "--label", "mood=regret"], "ragged.csv:3: 3 columns, not 2"),
    (["--data", "{d}/twice.csv", "--text", "body", "--label", "mood=regret"], "two columns have the same name"),
    (["--data", "{d}/empty.csv", "--text", "body", "--label", "mood=regret"], "is empty"),
    (["--data", "{d}/head.csv", "--text", "body", "--label", "mood=regret"], "the data set is empty"),
    (["--data", "{d}/nul.csv", "--text", "body", "--label", "mood=regret"], "nul.csv:2, field text: a NUL"),
    (["--data", "{d}/t.txt", "--text", "body", "--label", "mood=regret"], "is none of .json"),
    (["{d}/t.csv"], "your own table is given as --data"),
    ([], "--data is missing"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy_and_leaves_nothing(tmp_path, arguments, words):
    table(tmp_path / "t.csv")
    for name, content in {
        "five.csv": "body,mood\nOne.,4\n", "ragged.csv": "body,mood\nOne.,1\nTwo.,1,2\n", "twice.csv": "body,mood,mood\nOne.,1,1\n",
        "empty.csv": "", "head.csv": "body,mood\n", "nul.csv": "body,mood\nO\0e.,1\n", "t.txt": "body,mood\nOne.,1\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    given = [a.format(d=tmp_path) for a in arguments]
    done = redheart("train", *given, "--out", tmp_path / "run", *TINY)
    assert done.returncode == 1, done.stdout
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("redheart: ")]
    assert words in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_very_few_rows_end_in_a_word_about_it_and_not_in_an_error(tmp_path, rows):
    lines = table(tmp_path / "t.csv").read_text(encoding="utf-8-sig").splitlines()[: rows + 1]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\r\n\n\n")
    done = redheart(
        "train",
        "--data",
        tmp_path / "t.csv",
        *COLUMNS,
        "--out",
        tmp_path / "run",
        *TINY,
        "--set",
        "training.max_steps=2",
    )
    assert done.returncode == 0, done.stderr
    assert "None" not in done.stderr + done.stdout
    assert ("too few to choose a checkpoint by" in done.stderr) == (rows < 3)
    assert ("no row was held out" in done.stderr) == (rows < 3)
    assert "every training row says the same of emotion.joy, regret: nothing can be learned from that" in done.stderr


def test_pairs_that_always_name_the_better_text_first_are_no_constant():
    assert constant({"preference": [[(100, 5.0)]], "regret": [[(50, 5.0)]], "counterfactual": [[(0, 5.0)]]}) == [
        "regret",
        "counterfactual",
    ]
