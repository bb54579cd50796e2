"""How many processes a launch has: only a whole set of variables says so; half a set is named, or can only mean one process."""

import subprocess
import sys

import pytest

from redheart.ranks import LAUNCH, STARTERS, check_launch, is_launched, launched_rank, launched_world_size
from redheart.schema import RedHeartError

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    for name in (*LAUNCH, *STARTERS):
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_whole_launch_is_believed(monkeypatch):
    assert (is_launched(), launched_rank(), launched_world_size()) == (False, 0, 1)
    given(monkeypatch, WHOLE)
    check_launch()
    assert (is_launched(), launched_rank(), launched_world_size()) == (True, 1, 2)


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "4"}, {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"},
    {"RANK": "1.0"}, {"LOCAL_RANK": "a"}, {"MASTER_PORT": "http"}, {"RANK": "-1"},
    *({k: v for k, v in WHOLE.items() if k != name} for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")),
    *({**WHOLE, name: ""} for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")),
    {**WHOLE, "RANK": "2"}, {**WHOLE, "LOCAL_RANK": "7"}, {**WHOLE, "MASTER_PORT": "99999"}, {**WHOLE, "WORLD_SIZE": "two"},
    {**WHOLE, "MASTER_PORT": "0"},
    {"OMPI_COMM_WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "8"}, {"PMI_SIZE": "3", "MASTER_ADDR": "a"},
])  # fmt: skip
def test_half_a_launch_is_refused_by_name_and_counts_as_one_process(monkeypatch, variables):
    given(monkeypatch, variables)
    assert (is_launched(), launched_rank(), launched_world_size()) == (False, 0, 1)
    with pytest.raises(RedHeartError) as told:
        check_launch()
    wrong = {n for n, v in variables.items() if n in str(told.value) and v}
    assert wrong
    assert "accelerate launch" in str(told.value)
    assert "\n" not in str(told.value)


def test_what_is_missing_and_how_to_forget_the_rest_is_said(monkeypatch):
    given(monkeypatch, {"WORLD_SIZE": "4", "MASTER_ADDR": "here"})
    with pytest.raises(
        RedHeartError, match=r"WORLD_SIZE=4.*without RANK, LOCAL_RANK, MASTER_PORT, .*`unset WORLD_SIZE`"
    ):
        check_launch()


@pytest.mark.parametrize("variables", [
    {"RANK": ""}, {"RANK": "0"}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "3"}, {"MASTER_PORT": "29500"},
    {"MASTER_ADDR": "here"}, {"WORLD_SIZE": " "}, dict.fromkeys(LAUNCH, ""), {"SLURM_STEP_NUM_TASKS": "1"}, {"PMI_SIZE": ""},
])  # fmt: skip
def test_what_can_only_mean_one_process_is_ignored(monkeypatch, variables):
    given(monkeypatch, variables)
    check_launch()
    assert (is_launched(), launched_rank(), launched_world_size()) == (False, 0, 1)


def test_half_a_launch_reaches_neither_accelerate_nor_deepspeed(monkeypatch):
    import os

    from redheart.train.engine.machinery import import_machinery

    given(monkeypatch, {"WORLD_SIZE": "4", "LOCAL_RANK": "3"})
    import_machinery()
    world = [os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")]
    assert world == ["0", "0", "1", "127.0.0.1"]
    assert os.environ["MASTER_PORT"] == "0"  # whichever is free
    check_launch()
    for name in LAUNCH:
        monkeypatch.delenv(name)


def test_prepare_and_train_refuse_before_anything_is_read_or_written(monkeypatch, tmp_path):
    from redheart.config import DataConfig, load_config
    from redheart.data.prepare import prepare
    from redheart.train.start import train

    given(monkeypatch, {"RANK": "1"})
    with pytest.raises(RedHeartError, match="RANK=1"):
        prepare(["everyday"], tmp_path / "out", DataConfig())
    with pytest.raises(RedHeartError, match="RANK=1"):
        train(load_config("local"), tmp_path / "nothing", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ACCELERATE_USE_CPU", "ACCELERATE_USE_MEGATRON_LM"])
def test_what_would_turn_deepspeed_off_is_refused_by_name(monkeypatch, name):
    from redheart.train.engine.machinery import check_accelerate

    for harmless in ("", "false", "0"):
        monkeypatch.setenv(name, harmless)
        check_accelerate()
    monkeypatch.setenv(name, "true")
    with pytest.raises(RedHeartError, match=f"{name}=true turns DeepSpeed off.*unset {name}"):
        check_accelerate()


@pytest.mark.parametrize(("code", "left"), [(0, True), (1, False)])
def test_a_command_that_ends_well_leaves_its_group(code: int, left: bool):
    """A failed one goes as it is: the other ranks would not answer."""
    program = f"""
import torch.distributed as dist
from redheart.ranks import leaving
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
try:
    with leaving():
        raise SystemExit({code})
except SystemExit as end:
    print(end.code, not dist.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(code), str(left)]
