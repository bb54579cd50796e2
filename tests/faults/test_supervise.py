"""launch/supervise.sh starts again what starting again can cure, and nothing else."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.kinds import SETTINGS, write_data
from tests.faults.trials import ROOT, TABLE
from tests.faults.works import parameters
from tests.runs import BIN, environment

SUPERVISE = ["bash", str(ROOT / "launch" / "supervise.sh"), "--wait", "0"]
# a line that saves a checkpoint at each start it is told to (s; n: not even its run is seen), tells a code and ends with another
LINE = """
import os, sys
from pathlib import Path
run, plan = Path(sys.argv[sys.argv.index("--out") + 1]), sys.argv[1].split(",")
log = run.parent / "log"
starts = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as file:
    file.write(" ".join(sys.argv[2:]) + "\\n")
saves, told, code = plan[min(starts, len(plan) - 1)].split(":")
if saves != "n":
    run.mkdir(exist_ok=True)
    (run / ".redheart.json").touch()
if saves == "s":
    step = run / "checkpoints" / f"step-{starts:08d}"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
if told:
    with open(os.environ["REDHEART_EXIT_CODES"], "a") as file:
        file.write("".join(f"{c}\\n" for c in told.split("+")))
if int(code) < 0:
    os.kill(os.getpid(), -int(code))
sys.exit(int(code))
"""


def supervised(folder: Path, plan: str, *more: str, options: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
    """(exit code, the words of each start without --out RUN, what the supervisor said) of starts that end as `plan` says."""
    command = [*SUPERVISE, *options, "--", sys.executable, "-c", LINE, plan, *more, "--out", str(folder / "run")]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120)
    log = (folder / "log").read_text().replace(f"--out {folder / 'run'}", "").splitlines()
    return done.returncode, [" ".join(line.split()) for line in log], done.stderr


@pytest.mark.parametrize(
    ("plan", "more", "code", "starts", "said"),
    [
        # saves : what its processes tell : its own exit code, at each start
        ("s:0:0", (), 0, [""], ""),
        ("s::-9,s::-9,s:0:0", (), 0, ["", "--resume", "--resume"], "it was killed"),
        ("::-9,s:0:0", (), 0, ["", "--overwrite"], "it was killed"),
        ("s:75:1,s:0:0", (), 0, ["", "--resume"], "was lost"),  # a peer's end, under a launcher with a code of its own
        ("s:75+143:1,s:0:0", (), 0, ["", "--resume"], "was lost"),
        ("s:70:70,s:0:0", (), 0, ["", "--resume"], "nobody foresaw"),
        ("s:pid 1+pid 2+0:0,s:pid 1+0:0", (), 0, ["", "--resume"], "it was killed"),  # of a launcher that calls it well
        ("s:pid 1+75:0,s:pid 1+0:0", (), 0, ["", "--resume"], "was lost"),
        ("s:pid 1+1+pid 2+0:0", (), 0, [""], ""),  # of a line with its own idea of what matters, as `|| true`
        ("s:141:1", (), 1, [""], "nobody reads its stdout any more"),
        ("s::-9,s:0:0", ("--init", "a b", "--preset", "x"), 0, ["--init a b --preset x", "--preset x --resume"], ""),
        ("s::-9,s:0:0", ("--resume", "old", "--x"), 0, ["--resume old --x", "--x --resume"], ""),
        # how it was to begin stays until it has made a checkpoint
        (
            "::-9,s::-9,s:0:0",
            ("--init", "a b"),
            0,
            ["--init a b", "--init a b --overwrite", "--resume"],
            "--overwrite in",
        ),
        (
            "::-9,s::-9,s:0:0",
            ("--init=a", "--overwrite"),
            0,
            [*["--init=a --overwrite"] * 2, "--resume"],
            "the same line",
        ),
        ("::-9,s:0:0", ("--resume", "--x"), 0, ["--resume --x"] * 2, ""),
        ("s::-9,s:0:0", ("--overwrite",), 0, ["--overwrite", "--resume"], ""),
        (":1:1", (), 1, [""], "were refused"),
        ("s:1:1", (), 1, [""], "were refused"),
        ("s:1+75:1", (), 1, [""], "were refused"),  # its own fault, of which another rank only saw the end
        (":2:2", (), 2, [""], "were refused"),
        ("::2", (), 2, [""], "cannot be started"),
        ("::127", (), 127, [""], "cannot be started"),
        ("s:143:143", (), 143, [""], "somebody asked it"),
        ("s:143+130:1", (), 1, [""], "somebody asked it"),  # of a launcher that was asked, and has a code of its own
        ("n::-9,n:1:1", (), 1, ["", ""], "the same line"),  # what it does not see it does not replace
        ("::-9", (), 137, ["", *["--overwrite"] * 2], "3 starts in a row"),
        ("s::-9,::-9", (), 137, ["", *["--resume"] * 3], "3 starts in a row"),
        ("s::-9,s::-9,s::-9,s::-9,s:0:0", (), 0, ["", *["--resume"] * 4], ""),  # each brought something
    ],
)
def test_when_a_line_is_started_again(
    tmp_path: Path, plan: str, more: tuple[str, ...], code: int, starts: list[str], said: str
):
    ended, log, told = supervised(tmp_path, plan, *more, options=("--restarts", "2"))
    assert (ended, log) == (code, starts), told
    assert said in told
    TABLE.add("what the supervisor does by exit code", "as the table says")


@pytest.mark.parametrize(
    ("plan", "more", "starts"),
    [
        ("::-9,::-9,s::-9,s:0:0", ["--resume", "old"], [*["--resume old"] * 3, "--resume"]),
        ("::-9,s::-9,s:0:0", ["--resume=old"], [*["--resume=old"] * 2, "--resume"]),
        ("::-9,s::-9,s:0:0", ["--overwrite"], [*["--overwrite"] * 2, "--resume"]),
        ("::-9,:1:1", [], ["", ""]),  # it was to begin where a run lies: nothing to go on with, nor to replace
    ],
)
def test_checkpoints_of_before_are_not_its_own(tmp_path: Path, plan: str, more: list[str], starts: list[str]):
    """One that is whole, and one that an earlier end left half-done."""
    for name in ("step-00000099", "step-00000100.tmp"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name / "manifest.json").write_text("{}")
    ended, log, told = supervised(tmp_path, plan, *more)
    assert (ended, log) == (1 if plan.endswith("1") else 0, starts), told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--", "redheart", "train"], "no --out"),
        (["--restarts", "many", "--", "x"], "whole number"),
        (["train"], "unknown option"),
        ([], "the line that trains"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: list[str], words: str):
    done = subprocess.run([*SUPERVISE, *arguments], text=True, capture_output=True)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_signal_goes_on_to_the_line_and_ends_both(tmp_path: Path):
    line = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print('up', flush=True); time.sleep(60)"
    command = [*SUPERVISE, "--", sys.executable, "-c", line, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, "ended by SIGTERM, as asked" in said) == (143, True)


# a launcher that knows no signals, as deepspeed's, and leaves its two ranks behind; these end as redheart's do, some time after SIGTERM
LAUNCHER = """
import os, subprocess, sys, time
from pathlib import Path
with open(Path(sys.argv[2]) / "starts", "a") as file:
    file.write(".")
Path(sys.argv[2], "launcher").write_text(str(os.getpid()))
sys.exit(max(r.wait() for r in [subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]]) for _ in range(2)]))
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
def tell(line):
    with open(os.environ["REDHEART_EXIT_CODES"], "a") as file:
        file.write(f"{line}\\n")
def note(what, wait=0.0):
    time.sleep(wait)
    Path(sys.argv[1], f"{what}-{os.getpid()}").touch()
def stop(*_):
    note("saved", 0.5)
    tell(143)
    os._exit(143)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, lambda *_: note("asked"))
tell(f"pid {os.getpid()}")
note("up")
time.sleep(30)
"""


def until(folder: Path, pattern: str, count: int = 2) -> None:
    """Waits for so many notes of ranks."""
    deadline = time.monotonic() + 30
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, pattern
        time.sleep(0.02)


def launched(folder: Path) -> "subprocess.Popen[str]":
    """A supervised launcher, once its ranks are up."""
    line = [sys.executable, "-c", LAUNCHER, RANK, str(folder), "--out", str(folder / "run")]
    process = subprocess.Popen([*SUPERVISE, "--", *line], stderr=subprocess.PIPE, text=True)
    until(folder, "up-*")
    return process


def test_signals_reach_the_processes_that_train_past_their_launcher(tmp_path: Path):
    process = launched(tmp_path)
    process.send_signal(signal.SIGUSR1)
    until(tmp_path, "asked-*")
    os.kill(
        int((tmp_path / "launcher").read_text()), signal.SIGUSR1
    )  # of a batch system that sends it to all processes
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert "ended by SIGTERM, as asked" in said
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert (tmp_path / "starts").read_text() == "."


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_that_outlive_their_launcher_are_waited_for(tmp_path: Path, number: signal.Signals):
    """Who asks the launcher to end asks them; where it was killed they go on, and nothing starts beside them."""
    process = launched(tmp_path)
    os.kill(int((tmp_path / "launcher").read_text()), number)
    if number == signal.SIGKILL:
        time.sleep(1)
        assert (tmp_path / "starts").read_text() == "."
        assert not list(tmp_path.glob("saved-*"))
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert ("somebody asked it to end" if number == signal.SIGTERM else "as asked") in said
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert (tmp_path / "starts").read_text() == "."


def node(folder: Path, launcher: str) -> tuple[list[str], dict[str, str]]:
    """run_node.sh of a checkout whose torchrun is these lines of Python, and the environment for it."""
    shutil.copytree(ROOT / "launch", folder / "checkout" / "launch", dirs_exist_ok=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "torchrun").write_text(f"#!{sys.executable}\n{launcher}")
    (folder / "bin" / "torchrun").chmod(0o755)
    script = ["bash", str(folder / "checkout" / "launch" / "multinode" / "run_node.sh"), "--launcher", "torchrun"]
    return [*script, "--node-rank", "0"], {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def test_a_run_of_run_node_is_seen_where_its_relative_path_starts(tmp_path: Path):
    launcher = f"import sys; sys.argv[1:] = ['s::-9,s:0:0', *sys.argv[sys.argv.index('redheart') + 1:]]\n{LINE}"
    script, variables = node(tmp_path, launcher)
    line = [*script, "--", "train", "--out", "runs/one"]
    (tmp_path / "checkout" / "runs").mkdir()
    done = subprocess.run(
        [*SUPERVISE, "--", *line], text=True, capture_output=True, timeout=60, cwd=tmp_path, env=variables
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "checkout" / "runs" / "log").read_text()
    assert log.splitlines() == ["train --out runs/one", "train --out runs/one --resume"]


def test_a_node_without_a_supervisor_passes_signals_on_past_its_launcher(tmp_path: Path):
    launcher = f"import sys; sys.argv[1:] = [{RANK!r}, {str(tmp_path)!r}]\n{LAUNCHER}"
    script, variables = node(tmp_path, launcher)
    process = subprocess.Popen([*script, "--", "train", "--out", "x"], env=variables)
    until(tmp_path, "up-*")
    process.send_signal(signal.SIGUSR1)
    until(tmp_path, "asked-*")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_looking_for_processes_leaves_what_was_started_last_as_it_is(tmp_path: Path):
    """A signal that comes between `sleep &` and `child=$!` looks for them: the pause would be left behind, or the line's launcher."""
    script = """set -euo pipefail
    mark=REDHEART_EXIT_CODES=$codes; source launch/processes.sh
    for marked in 0 1; do
      if [ $marked = 1 ]; then (declare -x "$mark"; exec sleep 60) & else sleep 60 & fi
      started=$! all=(none yet)
      while [ ${#all[@]} != $marked ]; do find_processes; done
      [ "$started" = "$!" ] && echo "$marked ${all[*]/$started/that}"
      kill "$started"
    done"""
    environment = {**os.environ, "codes": str(tmp_path / "codes")}
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60)
    assert (ran.stdout, ran.returncode) == ("0 \n1 that\n", 0), ran.stderr


def test_the_longest_pause_is_bounded_and_a_signal_ends_it(tmp_path: Path):
    line = f"import os; open({str(tmp_path / 'log')!r}, 'a').write('.'); os.kill(os.getpid(), 9)"
    command = [*SUPERVISE[:-1], "100", "--", sys.executable, "-c", line, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "in 100 s" not in process.stderr.readline():
        pass
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert (tmp_path / "log").read_text() == "."


TWO = [
    *(str(BIN / "accelerate"), "launch", "--config_file", "launch/accelerate/zero2_offload_8bit.yaml"),
    *("--num_processes", "2", "--main_process_port", "0"),
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("launcher", [[sys.executable], TWO], ids=["one process", "two ranks"])
def test_a_training_that_is_killed_twice_ends_as_one_that_is_not(tmp_path: Path, launcher: list[str]):
    """Of two ranks the second one is killed."""
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    strategy = "plain" if len(launcher) == 1 else "zero2_offload_8bit"
    given = [
        f"--set={s}" for s in (*SETTINGS, "training.max_steps=5", "training.seed=3", f"memory.strategy={strategy}")
    ]
    runs = {}
    for name, steps in (("whole", "99"), ("killed", "2,4")):
        run, starts = tmp_path / name, tmp_path / f"{name}-starts"
        line = [*launcher, "-m", "tests.faults.dies", str(starts), steps, "train", "--data", str(tmp_path / "data")]
        done = subprocess.run(
            [*SUPERVISE, "--", *line, *given, "--out", str(run)],
            text=True, capture_output=True, timeout=500, cwd=ROOT, env=environment() | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        runs[name] = parameters(run)
        assert len(starts.read_text()) == (1 if name == "whole" else 3)
    assert runs["killed"] == runs["whole"]
    TABLE.add("a supervised training killed twice", "same parameters")


@pytest.mark.faults
@pytest.mark.parametrize("wrong", ["--set=training.epoch=3", "--set=model.width=25", "--data=nowhere"])
def test_a_training_that_is_refused_is_not_started_again(tmp_path: Path, wrong: str):
    line = [sys.executable, "-m", "redheart", "train", "--data", str(tmp_path), wrong, "--out", str(tmp_path / "run")]
    done = subprocess.run([*SUPERVISE, "--", *line], text=True, capture_output=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 1
    assert len([text for text in done.stderr.splitlines() if text.startswith("redheart: ")]) == 1, done.stderr
    assert "were refused" in done.stderr
    TABLE.add("a supervised training that is refused", "ended at once")
