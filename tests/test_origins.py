"""Where each value of a run comes from."""

from pathlib import Path

from redheart.config import config_keys
from redheart.origins import origins, shown


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
