"""Where each value of a run comes from."""

from pathlib import Path

import pytest

from redheart.config import OWN, OWN_KEYS, OWN_UNDER, config_keys, load_config
from redheart.origins import origins, shown
from redheart.train.engine import check_engine


def test_every_value_says_whether_it_is_the_defaults_the_presets_or_the_command_lines(tmp_path: Path):
    overrides = ["training.epochs=3", "optimizer.learning_rate=5.0e-4", "data.labeler.max_texts=0"]
    found = {v.key: v for v in origins("local", overrides)}
    assert list(found) == list(config_keys())
    assert found["model.width"].origin == "preset local"
    assert found["model.dropout"].origin == "default"
    assert found["data.labeler.batch_size"].origin == "default"
    assert (found["training.epochs"].value, found["training.epochs"].origin) == (3, "command line")
    assert found["optimizer.learning_rate"].origin == "command line"  # though the preset says the same
    assert {k for k, v in found.items() if v.origin == "command line"} == {o.partition("=")[0] for o in overrides}
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {width: 96, heads: 3, task_width: 64, task_heads: 2}\n"
        "training: {epochs: 2, global_batch_size: 8, micro_batch_size: 8}\n"
    )
    mine = {v.key: v.origin for v in origins(str(file), [])}
    assert mine["training.epochs"] == mine["model.heads"] == f"file {file}"
    assert mine["training.precision"] == "default"
    lines = shown(list(found.values())).splitlines()
    assert len(lines) == len(found)
    assert any(line.startswith("training.epochs = 3") and line.endswith("# command line") for line in lines)


def test_what_comes_with_a_table_of_ones_own_says_so(tmp_path: Path):
    table = [f"data.file={tmp_path / 'texts.csv'}"]
    found = {v.key: v.origin for v in origins("local", table)}
    assert found["memory.strategy"] == found["data.labeler.max_texts"] == "own table"
    assert found["data.file"] == "command line"
    named = {v.key: v.origin for v in origins("local", [*table, "memory.strategy=plain"])}
    assert named["memory.strategy"] == "command line"
    assert set(_paths(OWN)) | set(_paths(OWN_UNDER)) == OWN_KEYS


def test_a_launch_file_is_a_wish_for_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a table of one's own, too, and on one process: `plain` would be refused under it."""
    table, usual = [f"data.file={tmp_path / 'texts.csv'}"], load_config("local").memory.strategy
    assert load_config("local", table).memory.strategy == "plain" != usual
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", f"ds_configs/{usual}.json")
    assert load_config("local", table).memory.strategy == usual
    check_engine(load_config("local", table))


def test_a_key_under_its_old_name_has_the_origin_of_who_said_it(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: local\ntraining: {keep_checkpoints: 2}\n")
    for overrides, value, origin in (
        ([], 2, f"file {file}"),
        (["checkpoint.keep_last=10"], 10, "command line"),
        (["training.keep_checkpoints=2"], 2, "command line"),
    ):
        found = {v.key: v for v in origins(str(file), overrides)}["checkpoint.keep_last"]
        assert (found.value, found.origin) == (value, origin)


def _paths(values: dict, path: str = ""):
    for key, value in values.items():
        yield from _paths(value, f"{path}{key}.") if isinstance(value, dict) else [path + key]


@pytest.mark.parametrize(("processes", "strategy"), [("1", "plain"), ("2", "zero2_offload")])
def test_a_table_of_ones_own_is_plain_on_one_process_alone(processes, strategy, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert load_config("local", ["data.file=texts.csv"]).memory.strategy == strategy
    assert load_config("local", ["data.file=texts.csv", "memory.strategy=zero1"]).memory.strategy == "zero1"
