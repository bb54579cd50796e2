"""`--show-config` says of Accelerate's and DeepSpeed's values what a started engine really holds."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest

from redheart.config import load_config
from redheart.model.build import build_model
from redheart.train.engine import make_engine
from redheart.train.engine.shown import ACCELERATE, DEEPSPEED, _flat, _read, _value, engine_values
from tests.train.tiny import SETTINGS


def test_a_value_says_who_gave_it_changed_it_and_who_dropped_it():
    stages = {"file": {"a": 1, "b": "auto"}, "this run": {"a": 2, "b": "auto"}}
    stages |= {ACCELERATE: {"a": 2, "b": 8, "c": 0}, DEEPSPEED: {"a": 2, "b": 8, "d": 1}}
    assert {key: _value(key, stages)[1:] for key in "abcd"} == {
        "a": (2, "this run (before: 1)"),
        "b": (8, "Accelerate (before: 'auto')"),
        "c": (0, "dropped by DeepSpeed (Accelerate, filled in gave 0)"),
        "d": (1, "DeepSpeed, filled in"),
    }


@pytest.mark.parametrize("strategy", [pytest.param("zero2_offload_8bit", marks=pytest.mark.slow), "zero3"])
def test_the_values_are_those_of_a_started_engine(strategy: str, monkeypatch: pytest.MonkeyPatch):
    for name in [n for n in os.environ if n.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    config = load_config("local", [*SETTINGS, f"memory.strategy={strategy}", "optimizer.max_grad_norm=0.25"])
    before = dict(os.environ)
    found = {v.key.removeprefix("deepspeed."): v for v in engine_values(config, 8, 3)}
    assert dict(os.environ) == before
    engine = make_engine(partial(build_model, config, None), config, 3, 8)
    try:
        read = engine._engine._config
        held, ours = _flat(_read(read, read._param_dict)), _flat(engine.settings)
    finally:
        engine.close()
    del held["global_rank"], held["world_size"]  # of the process group
    assert {key: v.value for key, v in found.items() if not v.origin.startswith("dropped")} == held
    assert ours.keys() <= found.keys()
    assert found["gradient_accumulation_steps"][1:] == (3, "this run (before: 1)")
    assert found["gradient_clipping"].value == read.gradient_clipping == 0.25
    assert found["steps_per_print"].origin == "Accelerate (before: 1000000000)"
    assert found["zero_optimization.sub_group_size"].origin.startswith(
        "ds_configs/" if strategy == "zero3" else DEEPSPEED
    )
    if strategy == "zero3":
        assert found["zero_optimization.stage3_max_reuse_distance"][1:] == (0, "this run (before: 200000000)")


def test_what_accelerate_launch_sets_is_named_with_what_becomes_of_it(monkeypatch: pytest.MonkeyPatch):
    config = load_config("local", [*SETTINGS, "memory.strategy=zero2"])
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.5")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    found = {v.key: v for v in engine_values(config, 8, 1)}
    assert found["ACCELERATE_GRADIENT_CLIPPING"][1:] == ("0.5", "Accelerate's own setting, dropped")
    assert found["ACCELERATE_DYNAMO_BACKEND"].origin == "Accelerate's own setting, sets dynamo.backend"
    assert found["deepspeed.gradient_clipping"].value == config.optimizer.max_grad_norm


@pytest.mark.parametrize("strategy", ["plain", pytest.param("zero2", marks=pytest.mark.slow)])
def test_torch_starts_for_the_strategies_that_deepspeed_runs_alone(strategy: str):
    arguments = ["train", "--data", "x", "--set", f"memory.strategy={strategy}", "--show-config", "--json"]
    code = (
        "import json, sys\nfrom redheart.cli import main\nsys.argv = ['redheart', *json.loads(sys.argv[1])]\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert any(key.startswith("deepspeed.") for key in values) == (strategy != "plain")
    assert done.stderr.splitlines()[-1] == str(strategy != "plain")
