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
from redheart.train.engine.machinery import check_launch_file, check_launch_options, ds_config_path
from redheart.train.engine.possible import check_engine
from redheart.train.start import train

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


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"CONFIG_DS_FIELDS": "zero_stage,zero3_init_flag,gradient_clipping,mixed_precision", "DEEPSPEED_ZERO_STAGE": "2"},
            r"zero_stage, gradient_clipping, mixed_precision, .*memory\.strategy.*--config_file launch/accelerate/zero2\.yaml",
        ),
        ({"DEEPSPEED_ZERO_STAGE": "3"}, r"--zero_stage 3 .*memory\.strategy is zero2.*accelerate/zero2\.yaml"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "--offload_optimizer_device cpu .*would not be heard"),
        ({"MIXED_PRECISION": "bf16"}, r"--mixed_precision bf16 .*training\.precision is fp32"),
        ({"GRADIENT_CLIPPING": "0.1"}, r"--gradient_clipping 0\.1 .*optimizer\.max_grad_norm is 1\.0"),
    ],
)  # fmt: skip
def test_what_a_launch_asks_for_and_would_not_get_is_refused_by_name(variables, words, monkeypatch, tmp_path):
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(RedHeartError, match=words):
        train(load_config("local", ["memory.strategy=zero2"]), tmp_path / "data", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_our_launch_files_and_the_settings_say_is_no_contradiction(monkeypatch):
    for strategy, traits in TRAITS.items():
        config = load_config("local", [f"memory.strategy={strategy}", "training.precision=bf16"])
        given = {
            "MIXED_PRECISION": "no",
            "CONFIG_DS_FIELDS": "deepspeed_config_file,deepspeed_multinode_launcher,zero3_init_flag",
        }
        as_set = {"MIXED_PRECISION": "bf16", "DEEPSPEED_ZERO_STAGE": str(traits.stage), "GRADIENT_CLIPPING": "1.0"}
        for variables in (given, as_set):
            with monkeypatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(f"ACCELERATE_{name}", value)
                check_launch_file(strategy)
                check_launch_options(config)


def test_a_launch_that_names_no_file_leaves_the_strategy_alone(monkeypatch):
    launch = yaml.safe_load((ROOT / "launch" / "multinode" / "accelerate.yaml").read_text("utf-8"))
    assert "deepspeed_config_file" not in launch["deepspeed_config"]
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    for strategy in get_args(Strategy):
        check_launch_file(strategy)
    assert ds_config_path("gpu_8bit").stem == "zero2"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds_configs/zero2.json")
    check_launch_file("gpu_8bit")  # it runs on the file of another
