"""Configurations: presets are complete, every wrong key or value is named, and a dumped run reads back as itself."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from redheart.cli import app
from redheart.config import (
    RunConfig,
    config_keys,
    dump_config,
    leaves,
    load_config,
    parse_config,
    preset_names,
    read_config,
)
from redheart.files import seal
from redheart.schema import RedHeartError
from redheart.train.resume import _ON_RESUME, ON_RESUME, changes

PRESETS = ("330m", "base", "local")


# every key that the presets leave to its default, as the presets wrote them out when they still named every key
DEFAULTS = {
    "model": {"encoder_width": 768, "layers": 6, "num_experts": 8, "dropout": 0.1, "ablate": (), "activation_checkpointing": False},
    "data.encoder": {"name": "package:minilm", "layers": (4, 6), "max_tokens": 64, "batch_size": 32, "device": "auto",
                     "languages": None},
    "data.labeler": {"name": "package:smollm2", "quantization": "nf4", "weight": 0.3, "max_texts": None, "batch_size": 8,
                     "unpack": True, "min_mass": 0.05, "min_spread": 0.01, "min_agreement": 0.55},
    "data.augment": {"kind": None, "max_texts": None, "min_similarity": 0.8, "max_shift": 0.05, "min_gain": 0.05},
    "data.remote": {"attempts": 5, "timeout_s": 30.0, "cache_gib": 20.0},
    "data": {"rows_per_shard": 2048, "dedup": False, "dedup_threshold": 0.95, "columns": {}, "mixture": {}},
    "optimizer": {"name": None, "learning_rate": 1e-4, "final_learning_rate": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8,
                  "weight_decay": 0.01, "warmup_fraction": 0.05, "max_grad_norm": 1.0},
    "loss": {"weights": {}, "focal_gamma": 2.0, "huber_delta": 0.25, "extreme_penalty": 0.1, "balance": 0.001, "router_z": 0.001,
             "regret_edges": (1 / 3, 2 / 3), "constant_floor": 0.01},
    "loss.shares": {"heads": 0.7, "analyzers": 0.3, "aux": 1.0},
    "training": {"seed": 0, "epochs": None, "max_steps": None, "precision": "bf16", "log_every": 10, "evaluate_rows": 2048,
                 "synergy_every": 100, "best_metric": "loss", "log_samples": False, "patience": None,
                 "max_bad_steps": 3, "collective_timeout_s": 600},
    "guard": {"on_spike": "warn", "window": 32, "threshold": 20.0, "skip_steps": 4, "max_rewinds": 3},
    "checkpoint": {"minutes": None, "keep_last": 2, "keep_best": 1, "keep_every": None, "background": False,
                   "on_error": "end"},
    "memory": {"strategy": "zero2_offload", "gpu_memory_gib": 8.0, "host_memory_gib": 16.0, "swap": ()},
}  # fmt: skip
# what each preset says itself, in the order of its file
SAID = {
    "330m": (768, 12, 512, 8, 64, 64, 200, 200, "zero2_offload_8bit"),
    "1b3": (1536, 24, 1024, 16, True, 64, 64, 200, 200, "zero2_offload_8bit", 32),
    "base": (192, 6, 128, 4, 5e-4, 32, 32, "fp32", 0, 200),
    "local": (96, 3, 64, 2, 7e-4, 32, 32, "fp32", 0, 50),
}


def preset_file(name: str) -> dict[str, Any]:
    """A preset's own keys by their dotted paths."""
    text = resources.files("redheart").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    sections = yaml.safe_load(text)
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def repeated_defaults(keys: dict[str, Any]) -> list[str]:
    known = config_keys()
    return [k for k, value in keys.items() if value == known[k].get_default(call_default_factory=True)]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_resolves_to_what_it_always_did(name):
    found, said = leaves(load_config(name)), preset_file(name)
    assert tuple(said.values()) == SAID[name]
    assert {k: found[k] for k in said} == said
    defaults = {f"{section}.{key}": value for section, keys in DEFAULTS.items() for key, value in keys.items()}
    assert {k: found[k] for k in defaults if k not in said} == {k: v for k, v in defaults.items() if k not in said}
    assert found["preset"] == name


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_repeats_no_default(name):
    assert repeated_defaults(preset_file(name)) == []


def test_a_repeated_default_would_be_noticed():
    assert repeated_defaults({"loss.huber_delta": 0.25, "loss.weights": {}, "model.width": 96}) == [
        "loss.huber_delta",
        "loss.weights",
    ]


def undescribed(section: type[BaseModel]) -> list[str]:
    return [key for key, field in config_keys(section).items() if not field.description]


def test_every_key_says_what_it_means():
    assert undescribed(RunConfig) == []

    class Longer(RunConfig):
        note: str = ""

    assert undescribed(Longer) == ["note"]


def test_the_help_names_every_key_with_its_default_and_meaning(capsys):
    for arguments in (["--help-config"], ["--help-config", "--json"], ["--json", "--help-config"]):
        with pytest.raises(SystemExit) as stopped:
            app(["train", *arguments])
        assert stopped.value.code == 0
    lines, *schemas = capsys.readouterr().out.split('{"$defs"')
    told = dict(zip(lines.splitlines()[::2], lines.splitlines()[1::2], strict=True))
    assert [line.split(" = ")[0] for line in told] == list(config_keys())
    assert "most memory taken on each GPU" in told["memory.gpu_memory_gib = 8.0"]
    assert "width of the backbone" in told["model.width"]  # no default
    assert (
        schemas == [json.dumps(RunConfig.model_json_schema(), ensure_ascii=False).removeprefix('{"$defs"') + "\n"] * 2
    )


def schema_keys(schema: dict[str, Any], whole: dict[str, Any], path: str = "") -> dict[str, dict[str, Any]]:
    """The leaf keys of a JSON Schema by their dotted paths."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in schema["properties"].items():
        inner = (
            (value.get("anyOf", [{}])[0] | value).get("$ref", "").removeprefix("#/$defs/")
        )  # itself, or the first kind it may be
        found |= schema_keys(whole["$defs"][inner], whole, f"{path}{name}.") if inner else {path + name: value}
    return found


def test_an_editor_learns_every_key_and_refuses_others():
    schema = RunConfig.model_json_schema()
    keys = schema_keys(schema, schema)
    assert list(keys) == [*config_keys(), "extends"]
    assert all(value["description"] for value in keys.values())
    assert all(s["additionalProperties"] is False for s in [schema, *schema["$defs"].values()])
    assert "required" not in schema  # a file without `preset` takes its own name, one that extends a preset anything
    assert keys["model.dropout"]["exclusiveMaximum"] == 1
    assert "zero3_offload_8bit" in keys["memory.strategy"]["enum"]


def test_a_file_that_extends_a_preset_holds_what_differs(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: local\nmodel: {dropout: 0.2}\ntraining: {seed: 5}\n")
    got = load_config(str(path), ["training.seed=6"])
    assert changes(load_config("local"), got) == {
        "preset": ("local", "mine"),
        "model.dropout": (0.1, 0.2),
        "training.seed": (0, 6),
    }
    path.write_text("extends: locl\n")
    with pytest.raises(RedHeartError, match="did you mean local"):
        load_config(str(path))


def test_a_table_of_ones_own_has_settings_of_its_own_unless_others_are_said(tmp_path: Path):
    own = load_config("local", ["data.file=a.csv"])
    assert (own.data.labeler.max_texts, own.training.evaluate_every) == (0, 0)
    assert (own.memory.strategy, load_config("330m", ["data.file=a.csv"]).memory.strategy) == (
        "plain",
        "zero2_offload_8bit",
    )
    said = load_config("local", ["data.file=a.csv", "data.labeler.max_texts=null", "training.patience=2"])
    assert (said.data.labeler.max_texts, said.training.evaluate_every, said.training.patience) == (None, 0, 2)
    (tmp_path / "a.yaml").write_text("extends: local\ndata: {file: a.csv}\ntraining: {evaluate_every: 7}\n")
    assert load_config(str(tmp_path / "a.yaml")).training.evaluate_every == 7
    assert load_config("1b3").training.evaluate_every == 200


@pytest.mark.parametrize(
    ("key", "meant"),
    [("optimizer.lr", "learning_rate"), ("training.batch_size", "global_batch_size"), ("training.epoch", "epochs")],
)
def test_a_key_is_known_by_the_names_that_others_give_it(key: str, meant: str):
    with pytest.raises(RedHeartError, match=rf"unknown config key {key} \(did you mean {meant}\?\)"):
        load_config("local", [f"{key}=1"])


def test_a_key_that_has_moved_is_read_under_its_old_name_too(tmp_path: Path):
    assert load_config("local", ["training.keep_checkpoints=5"]).checkpoint.keep_last == 5
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: local\ntraining: {keep_checkpoints: 7}\n")
    assert load_config(str(mine)).checkpoint.keep_last == 7
    assert load_config(str(mine), ["checkpoint.keep_best=2"]).checkpoint.keep_last == 7
    values = load_config("local", ["checkpoint.keep_last=5"]).model_dump(mode="json")
    values["training"]["keep_checkpoints"] = values["checkpoint"].pop("keep_last")
    written = tmp_path / "config.yaml"
    written.write_text(seal(yaml.safe_dump(values)))  # as an earlier version did
    assert load_config(str(written)).checkpoint.keep_last == 5
    assert read_config(written, "").checkpoint.keep_last == 5
    for named in (["checkpoint.keep_last=10"], ["training.keep_checkpoints=3", "checkpoint.keep_last=10"]):
        for file in (mine, written):  # the later one decides, whichever name it uses
            assert load_config(str(file), named).checkpoint.keep_last == 10
    assert load_config(str(mine), ["checkpoint.keep_last=10", "training.keep_checkpoints=3"]).checkpoint.keep_last == 3
    mine.write_text("extends: local\ntraining: {keep_checkpoints: 7}\ncheckpoint: {keep_last: 8}\n")
    with pytest.raises(RedHeartError, match=r"training\.keep_checkpoints is called checkpoint\.keep_last now"):
        load_config(str(mine))


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
    "override", ["training.epochs", "=3", "preset.name=x", "training.seed=[1", "training.precision.x=1"]
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
    del values["training"]["global_batch_size"]
    values["model"]["widht"] = 3
    with pytest.raises(RedHeartError, match="missing") as error:
        parse_config(values)
    assert "config key training.global_batch_size is missing" in str(error.value)
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


def test_every_key_stands_once_in_the_table_of_resuming():
    keys = set(config_keys())
    assert {"preset", "training.seed", "loss.shares.heads", "data.encoder.layers"} <= keys
    assert sorted(key for _, _, group in _ON_RESUME for key in group.split()) == sorted(keys)
    assert set(leaves(load_config("local"))) == keys
    assert all(rule.why for rule in ON_RESUME.values())


def test_a_new_key_would_be_missed_in_the_table():
    class Longer(RunConfig):
        note: str = ""

    assert config_keys(Longer).keys() - set(ON_RESUME) == {"note"}


def test_keys_that_do_not_go_together_are_named_without_all_the_others():
    with pytest.raises(
        RedHeartError, match=r"^optimizer\.name = adamw contradicts memory\.strategy = gpu_8bit: leave one"
    ):
        load_config("local", ["optimizer.name=adamw", "memory.strategy=gpu_8bit"])
