"""ds_configs/ and launch/accelerate/ are what the planner writes; every file starts a real engine in tests/memory/test_engines.py."""

import json
from pathlib import Path

import pytest
import yaml

from redheart.memory.ds_files import FILES, ds_settings, write_ds_configs
from redheart.memory.states import TRAITS

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
