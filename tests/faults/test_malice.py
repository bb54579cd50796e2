"""What somebody else made on purpose: pickles that ask for a call, YAML that explodes, names that lead elsewhere. Nothing of it is
executed, nothing is written outside, memory and time are bounded.
"""

import json
import os
import pickle
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from redheart.data.shards import INDEX
from redheart.files import MANIFEST, write_manifest, write_sealed_json
from redheart.train.checkpoint import last
from tests.faults.trials import TABLE, Server, refused

SAMPLE = {
    "test_a_pickle_in_a_checkpoint_is_refused_and_not_run[export-torch]", "test_yaml_that_is_not_plain_is_one_line[aliases]",
    "test_yaml_that_is_not_plain_is_one_line[twice]", "test_a_shard_is_a_name_in_its_folder[../secret]",
}  # fmt: skip


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def checkpoint_of(home: Path) -> Path:
    found = last(home / "run")
    assert found is not None
    return found


def refuses(server: Server, fault: str, *command: str | Path, named: tuple[str, ...] = ()) -> None:
    end = refused(server.command(*command), named)
    TABLE.add(fault, end)
    assert end == "refused", (command, end)


# pickles


@pytest.mark.parametrize("how", ["torch", "legacy", "bare", "nested", "optimizer"])
@pytest.mark.parametrize("door", ["export", "grow", "resume"])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(server: Server, home: Path, how: str, door: str):
    state = checkpoint_of(home) / "plain_state.pt"
    evil, whole = Evil(home / "made"), torch.load(state, weights_only=True)
    if how == "bare":
        state.write_bytes(pickle.dumps(evil))
    else:
        content = {"model": {**whole["model"], "evil": evil}, "optimizer": whole["optimizer"]}
        if how == "nested":
            content = {**whole, "more": [{"x": (1, evil)}]}
        if how == "optimizer":
            content = {**whole, "optimizer": {**whole["optimizer"], "state": {0: evil}}}
        torch.save(content, state, _use_new_zipfile_serialization=how != "legacy")
    write_manifest(state.parent)  # whoever can write the one can write the other
    commands = {
        "export": ["export", "--checkpoint", home / "run", "--out", home / "out"],
        "grow": ["grow", "--checkpoint", home / "run", "--to", "base", "--out", home / "out", "--moments"],
        "resume": [
            "train",
            "--data",
            home / "data",
            "--out",
            home / "run",
            "--resume",
            "--set",
            "training.max_steps=2",
        ],
    }
    refuses(server, "malicious pickle", *commands[door])
    assert not (home / "made").exists()
    assert not (home / "out").exists()


# YAML

BOMBS = {
    "aliases": "a: &a [x]\n" + "\n".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]" for p, c in pairwise("abcdefghijkl")),
    "merge": "base: &b {preset: x}\nmodel:\n  <<: *b\n",
    "depth": "model: " + "[" * 5000 + "]" * 5000,
    "flow depth": "model: " + "{a: " * 3000 + "}" * 3000,
    "size": "# " + "x" * 2_000_000,
    "python": "model: !!python/object/apply:os.mkdir ['/tmp/redheart-made']\n",
    "python name": "model: !!python/name:os.system\n",
    "tag": "model: !evil {a: 1}\n",
    "date": "training: {epochs: 2001-99-99}\n",
    "twice": "training: {epochs: 3}\ntraining: {epochs: 4}\n",
    "binary": "model: !!binary '*'\n",
    "documents": "preset: a\n---\npreset: b\n",
    "recursion": "model: &m {a: *m}\n",
    "int": "training: {epochs: " + "9" * 5000 + "}\n",
    "base 60": "training: {max_steps: 1" + ":59" * 2000 + "}\n",
    "key": "? [a, b]\n: 1\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_that_is_not_plain_is_one_line(server: Server, tmp_path: Path, name: str):
    file = tmp_path / "run.yaml"
    file.write_text(BOMBS[name])
    refuses(server, "YAML bombs", "params", "--preset", file)
    assert not Path("/tmp/redheart-made").exists()


def test_a_value_of_set_that_is_not_plain_is_one_line(server: Server):
    for value in ("2001-99-99", "[" * 3000, "&a [*a]", "!!python/name:os.system", "{a: 1, a: 2}"):
        refuses(server, "YAML bombs", "params", "--set", f"training.epochs={value}")


# names that lead elsewhere

OUTSIDE = ("../secret", "/etc/hostname", "deep/../../secret", "..", ".", "", "a\0b", "x\\..\\y")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_shard_is_a_name_in_its_folder(server: Server, home: Path, name: str):
    index = json.loads((home / "data" / INDEX).read_text())
    index.pop("sha256")
    index["splits"]["train"]["shards"][0]["file"] = name
    write_sealed_json(home / "data" / INDEX, index)
    before = sorted(str(p) for p in home.rglob("*"))
    refuses(
        server, "names that lead elsewhere", "train", "--data", home / "data", "--out", home / "new", named=(INDEX,)
    )
    refuses(
        server, "names that lead elsewhere", "dedup", "--data", home / "data", "--out", home / "new", named=(INDEX,)
    )
    refuses(server, "names that lead elsewhere", "train", "--data", f"file://{home / 'data'}", "--out", home / "new")
    assert sorted(str(p) for p in home.rglob("*")) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_files_in_its_folder(server: Server, home: Path, name: str):
    folder = checkpoint_of(home)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("sha256")
    manifest["files"][name] = manifest["files"]["trainer.json"]
    write_sealed_json(folder / MANIFEST, manifest)
    refuses(
        server,
        "names that lead elsewhere",
        "export",
        "--checkpoint",
        home / "run",
        "--out",
        home / "out",
        named=(MANIFEST,),
    )
    assert not (home / "out").exists()


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "moments.json"])
def test_an_index_of_weights_names_files_in_its_folder(server: Server, home: Path, grown: Path, index: str, name: str):
    folder = Path(shutil.copytree(grown, home / "copy"))
    content = json.loads((folder / index).read_text())
    places = content["weight_map" if "weight_map" in content else "files"]
    places[sorted(places)[0]] = name
    (folder / index).write_text(json.dumps(content))
    write_manifest(folder)
    if index == "moments.json":
        sizes = [
            f"--set=model.{k}"
            for k in ("width=96", "heads=8", "task_width=64", "task_heads=8", "encoder_width=8", "layers=1")
        ]
        command = ["grow", "--checkpoint", folder, "--to", "local", "--moments", *sizes, "--out", home / "out"]
    else:
        command = ["grow", "--checkpoint", folder, "--to", "base", "--out", home / "out"]
    refuses(server, "names that lead elsewhere", *command, named=(index,))
    assert not (home / "out").exists()


@pytest.fixture(scope="module")
def grown(server: Server, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = Path(shutil.copytree(world, tmp_path_factory.mktemp("grown") / "home"))
    server.done("grow", {"home": str(home), "moments": True})
    return home / "grown"


@pytest.mark.parametrize("what", ["step-00000009.tmp", "step-00000009.removed", "step-00000009.old"])
def test_a_link_is_removed_and_not_what_it_points_to(server: Server, home: Path, tmp_path: Path, what: str):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "text").write_text("mine")
    (home / "run" / "checkpoints" / what).symlink_to(mine)
    server.done("train_again", {"home": str(home)})
    assert (mine / "text").read_text() == "mine"
    TABLE.add("names that lead elsewhere", "left alone")
