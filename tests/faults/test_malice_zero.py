"""Pickles that ask for a call in DeepSpeed's own files, their manifest sealed anew: refused at every door that reads them, and not run."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from redheart.files import write_manifest
from redheart.train.engine.machinery import tensors_only
from tests.faults.kinds import SETTINGS
from tests.faults.test_malice import Evil, checkpoint_of
from tests.faults.trials import TABLE, Reply, Server, fresh, refused, train

pytestmark = pytest.mark.faults
STATES = {"model": "*_model_states.pt", "optimizer": "*_optim_states.pt", "random": "random_states_*.pkl"}
DOORS = ("resume", "resume on 2", "export", "grow", "evaluate", "init")
HOW = ("added", "legacy", "bare", "nested", "called")


@pytest.fixture(scope="module", params=[2, 3], ids=["ZeRO-2", "ZeRO-3"])
def trained(
    request: Any, server: Server, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A run of one process, and its settings."""
    return made(server, world, tmp_path_factory.mktemp("zero") / "home", f"zero{request.param}_offload_8bit", 1)


def made(server: Server, world: Path, home: Path, strategy: str, ranks: int) -> tuple[Path, list[str]]:
    more = [f"memory.strategy={strategy}", "training.collective_timeout_s=10"]
    reply = train(server, fresh(world, home), more=[*more, "training.max_steps=1"], ranks=ranks)
    assert reply.code == 0, reply.said[-3000:]
    return home, [*more, "training.max_steps=2"]


def poison(file: Path, how: str, evil: Any) -> None:
    if how == "bare":
        file.write_bytes(pickle.dumps(evil))
        return
    with tensors_only():
        whole = torch.load(file, weights_only=False)
    if how == "nested":
        key = next(k for k, v in whole.items() if isinstance(v, dict))
        whole[key] = {**whole[key], "more": [{"x": (1, evil)}]}
    elif how == "called":  # in place of the enumeration that is on the list
        whole["zero_stage"] = evil
    else:
        whole["more"] = evil
    torch.save(whole, file, _use_new_zipfile_serialization=how != "legacy")


def knock(server: Server, home: Path, door: str, more: list[str]) -> Reply:
    run, out = home / "run", home / "out"
    if door.startswith("resume"):
        return train(server, home, more=more, ranks=2 if door.endswith("2") else 1)
    commands = {
        "export": ["export", "--checkpoint", run, "--out", out],
        "grow": ["grow", "--checkpoint", run, "--to", "base", "--out", out, "--moments"],
        "evaluate": ["evaluate", "--checkpoint", run, "--data", home / "data", "--split", "dev"],
        "init": ["train", "--data", home / "data", "--out", out, "--init", run, *(f"--set={s}" for s in SETTINGS)],
    }
    return server.command(*commands[door], seconds=60)


def judge(reply: Reply, home: Path) -> None:
    """Refused in one line; of two ranks by the one that read it, and the other ends by name, at once or once it has waited."""
    named = [line for line in reply.lines if "a state of this checkpoint" in line]
    if len(reply.codes) == 1:
        end = refused(reply, ("a state of this checkpoint",))
    elif (
        named and set(reply.codes) <= {1, 75} and 1 in reply.codes and "Traceback" not in reply.said and not reply.late
    ):
        end = "refused"
    else:
        end = reply.said[-3000:]
    TABLE.add("malicious pickle in a ZeRO shard", end)
    assert end == "refused", end
    assert not (home / "made").exists()
    assert not (home / "out").exists()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("state", ["model", "optimizer"])
def test_a_pickle_in_a_shard_is_refused_and_not_run(
    server: Server, trained: tuple[Path, list[str]], tmp_path: Path, state: str, door: str
):
    home, how = Path(shutil.copytree(trained[0], tmp_path / "home")), HOW[(DOORS.index(door) + len(state)) % len(HOW)]
    checkpoint = checkpoint_of(home)
    (file,) = checkpoint.rglob(STATES[state])
    poison(file, how, Evil(home / "made"))
    write_manifest(checkpoint)
    judge(knock(server, home, door, trained[1]), home)


@pytest.mark.parametrize("how", HOW)
def test_a_pickle_in_random_states_is_never_run(
    server: Server, trained: tuple[Path, list[str]], tmp_path: Path, how: str
):
    """Accelerate writes them; nothing of a run depends on them."""
    ends = []
    for name in ("whole", "home"):
        home = Path(shutil.copytree(trained[0], tmp_path / name))
        if name == "home":
            (file,) = checkpoint_of(home).rglob(STATES["random"])
            file.write_bytes(pickle.dumps(Evil(home / "made")))
            if how != "bare":
                torch.save({"step": Evil(home / "made")}, file, _use_new_zipfile_serialization=how != "legacy")
            write_manifest(file.parent)
        ends.append(train(server, home, more=trained[1], ranks=1))
        assert ends[-1].code == 0, ends[-1].said[-2000:]
        assert not (home / "made").exists()
    assert ends[0].result[:3] == ends[1].result[:3]
    TABLE.add("malicious pickle in a ZeRO shard", "of no matter, not run")


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_pickle_in_the_second_rank_s_shard(server: Server, world: Path, tmp_path: Path, ranks: int):
    """On one rank the checkpoint is converted first."""
    home, more = made(server, world, tmp_path / "home", "zero2_offload_8bit", 2)
    checkpoint = checkpoint_of(home)
    poison(sorted(checkpoint.rglob(STATES["optimizer"]))[1], "nested", Evil(home / "made"))
    write_manifest(checkpoint)
    judge(train(server, home, more=more, ranks=ranks), home)
