"""ds_configs/ and launch/accelerate/ are what the planner writes; every file starts a real engine in tests/memory/test_engines.py."""

import json
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml

from redheart.config import load_config
from redheart.memory.ds_files import FILES, ds_settings, write_ds_configs
from redheart.memory.states import TRAITS
from redheart.schema import RedHeartError
from redheart.sections import Strategy
from redheart.train.engine.machinery import check_launch_file, ds_config_path
from redheart.train.engine.possible import check_engine

ROOT = Path(__file__).parents[2]


def test_the_checked_in_files_are_what_the_planner_writes(tmp_path):
    written = write_ds_configs(tmp_path)
    assert len(written) == 2 * len(FILES)
    for path in written:
        assert (ROOT / path.relative_to(tmp_path)).read_text("utf-8") == path.read_text("utf-8"), path.name


def test_no_other_files_lie_there():
    assert {p.stem for p in (ROOT / "ds_configs").glob("*.json")} == set(FILES)
    assert {p.stem for p in (ROOT / "launch" / "accelerate").glob("*.yaml")} == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_files_are_complete_and_say_what_the_planner_assumes(file):
    settings, traits = ds_settings(file), TRAITS[FILES[file]]
    text = json.dumps(settings)
    assert "auto" not in text.replace("autocast", "")
    zero = settings["zero_optimization"]
    assert 5e6 <= zero["reduce_bucket_size"] <= 5e7
    assert zero["stage"] == traits.stage
    assert ("offload_optimizer" in zero) == traits.offload
    assert ("data_types" in settings) == traits.fp32_accumulation
    batch = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"]
    assert settings["train_batch_size"] == batch


@pytest.mark.parametrize("file", FILES)
def test_the_launch_file_names_its_deepspeed_file(file):
    launch = yaml.safe_load((ROOT / "launch" / "accelerate" / f"{file}.yaml").read_text("utf-8"))
    assert (ROOT / launch["deepspeed_config"]["deepspeed_config_file"]).stem == file
    assert launch["use_cpu"] is False


@pytest.mark.parametrize("file", FILES)
def test_the_line_at_the_head_of_a_launch_file_asks_for_what_the_file_says(file, monkeypatch):
    head = (ROOT / "launch" / "accelerate" / f"{file}.yaml").read_text("utf-8").splitlines()[0]
    words = shlex.split(head.removeprefix("# "))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", f"ds_configs/{file}.json")
    settings = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
    strategy = load_config(words[words.index("--preset") + 1], settings).memory.strategy
    check_launch_file(strategy)
    assert ds_config_path(strategy).stem == file


@pytest.mark.parametrize(
    ("file", "strategy", "words"),
    [
        (
            "ds_configs/zero3.json",
            "zero2_offload",
            r"zero3, and memory\.strategy is zero2_offload: --set memory\.strategy=zero3, or",
        ),
        ("ds_configs/zero3.json", "zero2_offload", "accelerate/zero2_offload.yaml"),
        ("ds_configs/zero3_multinode.json", "zero2", "--set memory.strategy=zero3, "),
        ("ds_configs/zero2.json", "plain", "start without a launcher"),
        ("mine/tuned.json", "zero2", "tuned, which is none of ds_configs/"),
    ],
)
def test_a_launch_file_of_another_strategy_is_refused_by_name(file, strategy, words, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", file)
    with pytest.raises(RedHeartError, match=words):
        check_engine(load_config("local", [f"memory.strategy={strategy}"]))


def test_a_launch_that_names_no_file_leaves_the_strategy_alone(monkeypatch):
    launch = yaml.safe_load((ROOT / "launch" / "multinode" / "accelerate.yaml").read_text("utf-8"))
    assert "deepspeed_config_file" not in launch["deepspeed_config"]
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    for strategy in get_args(Strategy):
        check_launch_file(strategy)
    assert ds_config_path("gpu_8bit").stem == "zero2"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds_configs/zero2.json")
    check_launch_file("gpu_8bit")  # it runs on the file of another
