"""The recipes are what their figures were measured with."""

import re

import pytest

from redheart.config import load_config
from redheart.files import read_json
from tests.runs import ROOT

RESULTS = ROOT / "tests" / "benchmarks" / "results"


@pytest.mark.parametrize("preset", ["local", "base"])
def test_a_recipe_trains_as_its_result_says(preset):
    path = ROOT / "launch" / "recipes" / f"{preset}.yaml"
    config, told = load_config(str(path)), read_json(RESULTS / f"control-{preset}-test.json", "")
    as_read = {"encoder_width": config.model.encoder_width}  # which the encoder's layers decide
    assert config.model == load_config(preset).model.model_copy(update=as_read)
    assert (config.training.max_steps, config.training.global_batch_size) == (told["steps"], told["batch"])
    row = next(
        line for line in (ROOT / "tests" / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines()
        if f"{told['steps']} steps of {told['batch']}" in line and "--split test" in line
    )  # fmt: skip
    assert f"optimizer.learning_rate={config.optimizer.learning_rate:.0e}".replace("e-0", "e-") in row
    metrics = told["legs"][preset]["metrics"]
    text = path.read_text(encoding="utf-8")
    for name, entry in (
        ("7 emotions", "emotion"),
        ("28 emotions", "emotion_fine"),
        ("valence", "vad.valence"),
        ("utilitarian pairs", "preference"),
    ):
        said = re.search(rf"{name} (0\.\d\d)", re.sub(r"\n# *", " ", text))
        assert said is not None, name
        assert float(said[1]) == round(metrics[entry]["mean"], 2), name


@pytest.mark.parametrize(
    ("name", "layers", "entries"),
    [
        ("goemotions", tuple(range(7)), ("7 emotions", "28 emotions")),
        ("mpnet", (0, 3, 6, 9, 12), ("7 emotions", "28 emotions", "valence", "pairs")),
    ],
)
def test_a_recipe_of_other_features_says_what_its_figure_says(name, layers, entries):
    path = ROOT / "launch" / "recipes" / f"{name}.yaml"
    config, text = load_config(str(path)), re.sub(r"\n# *", " ", path.read_text(encoding="utf-8"))
    told = next(f for f in read_json(RESULTS / "figures.json", "") if path.name in f["command"])
    assert config.data.encoder.layers == layers
    assert config.model.encoder_width == len(layers) * {"goemotions": 384, "mpnet": 768}[name]
    assert f"{config.training.max_steps:,} steps of {config.training.global_batch_size}" in told["what"]
    for entry in entries:
        said, measured = (re.search(rf"{entry} \**(0\.\d+)", t) for t in (text, told["figure"]))
        assert said is not None, entry
        assert measured is not None, entry
        assert said[1] == measured[1], entry
