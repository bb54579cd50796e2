"""Configurations: presets are complete, every wrong key or value is named, and a dumped run reads back as itself."""

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from redheart.config import (
    _ON_RESUME,
    ON_RESUME,
    RunConfig,
    dump_config,
    known_keys,
    leaves,
    load_config,
    parse_config,
    preset_names,
)
from redheart.schema import RedHeartError

PRESETS = ("330m", "base", "local")


def unset_keys(model: BaseModel, path: str = "") -> list[str]:
    """Dotted paths of the keys a preset leaves to a default of the code."""
    missing = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            missing += unset_keys(value, f"{path}{name}.")
        elif name not in model.model_fields_set:
            missing.append(path + name)
    return missing


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_every_key_itself(name):
    config = load_config(name)
    assert config.preset == name
    assert unset_keys(config) == ["loss.regret_edges"]  # what the data says


def test_a_key_that_is_left_to_its_default_would_be_noticed():
    values = yaml.safe_load(dump_config(load_config("local")))
    del values["loss"]["huber_delta"]
    assert unset_keys(parse_config(values)) == ["loss.huber_delta"]


def test_the_presets_are_listed():
    assert set(PRESETS) <= set(preset_names())


def test_the_330m_preset_has_the_sizes_of_the_design():
    model = load_config("330m").model
    assert (model.width, model.heads, model.layers, model.task_width, model.encoder_width) == (768, 12, 6, 512, 768)


def test_an_unknown_preset_is_refused_with_a_suggestion():
    with pytest.raises(RedHeartError, match=r"'locl' \(did you mean local\?\).*330m"):
        load_config("locl")


def test_a_file_that_is_absent_is_named(tmp_path):
    with pytest.raises(RedHeartError, match=r"absent\.yaml does not exist"):
        load_config(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("text", "reason"), [("a: [", "not valid YAML"), ("- 1\n- 2\n", "mapping of sections"), ("", "mapping of sections")]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, reason):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(RedHeartError, match=reason):
        load_config(str(path))


def test_a_file_takes_its_own_name_as_preset(tmp_path):
    values = yaml.safe_load(dump_config(load_config("local")))
    del values["preset"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    config = load_config(str(tmp_path / "mine.yaml"), ["training.seed=7"])
    assert (config.preset, config.training.seed) == ("mine", 7)


@pytest.mark.parametrize(
    ("override", "path", "suggestion"),
    [
        ("training.epoch=3", "training.epoch", "epochs"),
        ("optimizer.learning_rat=3", "optimizer.learning_rat", "learning_rate"),
        ("trainig.epochs=3", "trainig", "training"),
        ("data.encoder.layer=[1]", "data.encoder.layer", "layers"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(override, path, suggestion):
    with pytest.raises(RedHeartError, match=rf"unknown config key {path} \(did you mean {suggestion}\?\)"):
        load_config("local", [override])


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("optimizer.learning_rate=1.5E-5", "optimizer.learning_rate", 1.5e-5),
        ("optimizer.betas=[0.8, 0.95]", "optimizer.betas", (0.8, 0.95)),
        ("training.max_steps=12", "training.max_steps", 12),
        ("training.max_steps=null", "training.max_steps", None),
        ("training.max_steps=1e2", "training.max_steps", 100),
        ("model.activation_checkpointing=true", "model.activation_checkpointing", True),
        ("data.encoder.layers=[6]", "data.encoder.layers", (6,)),
        ("data.encoder.name=org/model=x", "data.encoder.name", "org/model=x"),
        ("loss.weights.emotion=2", "loss.weights", {"emotion": 2.0}),
        ("loss.weights={regret: 0.5}", "loss.weights", {"regret": 0.5}),
    ],
)
def test_set_reads_every_type(override, path, value):
    found = load_config("local", [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_a_later_set_wins():
    assert load_config("local", ["training.epochs=3", "training.epochs=5"]).training.epochs == 5


@pytest.mark.parametrize(
    "override", ["training.epochs", "=3", "preset.name=x", "training.seed=[1", "training.seed.x=1"]
)
def test_a_set_that_cannot_be_applied_is_quoted(override):
    with pytest.raises(RedHeartError) as error:
        load_config("local", [override])
    assert f"--set {override!r}" in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "training.global_batch_size=0",
        "training.global_batch_size=2.5",
        "training.epochs=-1",
        "training.epochs=.nan",
        "optimizer.learning_rate=fast",
        "optimizer.betas=0.9",
        "optimizer.warmup_fraction=1",
        "model.dropout=1",
        "model.num_experts=0",
        "data.encoder.layers=[]",
        "data.encoder.max_tokens=3",
        "data.labeler.quantization=int3",
        "memory.strategy=zero9",
        "training.seed=-1",
        "training.seed=9223372036854775808",
        "optimizer.learning_rate=.inf",
        "optimizer.max_grad_norm=.nan",
    ],
)
def test_a_bad_value_is_named_with_its_dotted_path(override):
    path, _, _ = override.partition("=")
    with pytest.raises(RedHeartError, match=f"config key {path} = "):
        load_config("local", [override])


@pytest.mark.parametrize(
    ("override", "path"),
    [("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1"), ("loss.weights.emotion=-1", "loss.weights.emotion")],
)
def test_a_bad_entry_is_named_too(override, path):
    with pytest.raises(RedHeartError, match=f"config key {path} = "):
        load_config("local", [override])


@pytest.mark.parametrize("override", ["model.heads=5", "model.task_heads=3"])
def test_widths_must_be_divisible_by_their_heads(override):
    with pytest.raises(RedHeartError, match=r"config key model .*divisible"):
        load_config("local", [override])


def test_a_missing_key_and_a_second_error_are_both_named():
    values = yaml.safe_load(dump_config(load_config("local")))
    del values["training"]["epochs"]
    values["model"]["widht"] = 3
    with pytest.raises(RedHeartError, match="missing") as error:
        parse_config(values)
    assert "config key training.epochs is missing" in str(error.value)
    assert "model.widht (did you mean width?)" in str(error.value)


def test_a_configuration_is_frozen():
    config = load_config("local")
    with pytest.raises(ValidationError, match="frozen"):
        config.training.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.training = config.training


@pytest.mark.parametrize("name", PRESETS)
def test_a_dump_reads_back_as_itself(name, tmp_path):
    config = load_config(name, ["optimizer.learning_rate=1e-7", "data.encoder.name=모델", "loss.weights.surd=0.25"])
    text = dump_config(config)
    assert "모델" in text
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert parse_config(yaml.safe_load(text)) == config
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_known_keys_reach_the_innermost_section():
    assert {"training", "epochs", "encoder", "layers", "quantization"} <= set(known_keys(RunConfig))


def leaf_keys(section: type[BaseModel], path: str = "") -> set[str]:
    """Dotted paths of a section's keys, from its classes alone."""
    found: set[str] = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel)
        found |= leaf_keys(kind, f"{path}{name}.") if inner else {path + name}
    return found


def test_every_key_stands_once_in_the_table_of_resuming():
    keys = leaf_keys(RunConfig)
    assert {"preset", "training.seed", "loss.shares.heads", "data.encoder.layers"} <= keys
    assert sorted(key for _, _, group in _ON_RESUME for key in group.split()) == sorted(keys)
    assert set(leaves(load_config("local"))) == keys
    assert all(rule.why for rule in ON_RESUME.values())


def test_a_new_key_would_be_missed_in_the_table():
    class Longer(RunConfig):
        note: str = ""

    assert leaf_keys(Longer) - set(ON_RESUME) == {"note"}
