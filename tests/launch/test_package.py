"""The package outside the checkout, and the files that images, CI and issues are made of."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=kept | variables, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as `python -m build` makes it, by way of the source distribution."""
    checkout, out = (tmp_path_factory.mktemp(name) for name in ("checkout", "dist"))
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in ("redheart", "ds_configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    (made,) = out.glob("redheart-*-py3-none-any.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed: before everything else that this interpreter sees."""
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_every_file_of_the_package(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [p for p in (ROOT / "redheart").rglob("*") if p.is_file() and p.suffix not in (".pyc", ".so")]
    assert {p.relative_to(ROOT).as_posix() for p in files} <= names
    assert {f"redheart/ds_configs/{p.name}" for p in (ROOT / "ds_configs").glob("*.json")} <= names
    assert {"redheart/py.typed", "redheart/optim/csrc/adam8bit.cpp", "redheart/presets/local.yaml"} <= names
    assert not [n for n in names if not n.startswith(("redheart/", "redheart-"))]


def test_the_wheel_tells_its_extras_and_its_command(wheel: Path):
    files = zipfile.ZipFile(wheel)
    (folder,) = {n.split("/")[0] for n in files.namelist() if ".dist-info/" in n}
    told = message_from_string(files.read(f"{folder}/METADATA").decode())
    assert set(told.get_all("Provides-Extra")) == {"gpu", "retrieval", "dev", "test-browser"}
    assert "redheart = redheart.cli:main" in files.read(f"{folder}/entry_points.txt").decode()


def test_the_installed_package_finds_its_own_files(site: Path, tmp_path: Path):
    code = """
import json, sys
from pathlib import Path
import redheart
from redheart.config import load_config, preset_names
from redheart.train.engine.machinery import ds_config_path
here = Path(redheart.__file__).parent
assert here.parent == Path(sys.argv[1]), here
for name in preset_names():
    load_config(name)
for name in ("zero2_offload", "zero2_offload_8bit", "zero3", "gpu_8bit"):
    assert here in ds_config_path(name).parents
    json.loads(ds_config_path(name).read_text())
"""
    run(sys.executable, "-c", code, site, cwd=tmp_path, PYTHONPATH=str(site))
    assert "train" in run(site / "bin" / "redheart", "--help", cwd=tmp_path, PYTHONPATH=str(site))


@pytest.mark.slow  # trains in a process of its own
def test_the_chain_runs_from_the_wheel_in_another_directory(site: Path, tmp_path: Path):
    code = """
import redheart
data = redheart.prepare("everyday", "data", samples=24)
run = redheart.train(data, "runs/first", training__max_steps=4)
print(run.evaluate(), *run.pipeline()("I promised to call and forgot."), sep="\\n")
"""
    told = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert "Evaluated: test split" in told
    assert "regret" in told.splitlines()
    assert (tmp_path / "runs" / "first" / "report.md").is_file()


def test_the_image_takes_the_steps_of_the_set_up():
    """One RUN for what a container lacks, which is what setup_env.sh asks for by name, and one for the script itself."""
    lines = (ROOT / "launch" / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    runs = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]
    assert len(runs) == 2
    assert runs[1] == 'REDHEART_GPU="${GPU}" bash launch/setup_env.sh'
    asked = set(re.findall(r"apt-get install ([\w+-]+)", (ROOT / "launch" / "setup_env.sh").read_text()))
    assert asked == {"g++", "python3-venv", "python3-dev"}
    assert asked <= set(runs[0].split())
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    assert all((ROOT / name).exists() for names in copied for name in names)
    folder = next(line.split()[1] for line in lines if line.startswith("WORKDIR "))
    assert f'ENV PATH="{folder}/red_heart_env/bin:${{PATH}}"' in lines


def test_ci_runs_what_the_readme_says_runs_the_tests():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == ["bash launch/run_tests.sh"]
    assert commands[0] in (ROOT / "README.md").read_text()
    assert commands[0] in (ROOT / ".ci" / "run").read_text()


def test_an_issue_asks_for_what_the_doctor_says():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    asked = {field["attributes"]["label"]: field for field in form["body"]}
    (label,) = [label for label in asked if "redheart doctor --json" in label]
    assert asked[label]["validations"]["required"]
