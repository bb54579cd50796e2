"""Weights that are not whole never become a network in silence; what the caller allows is drawn as in a fresh one."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from redheart.files import MANIFEST, write_manifest
from redheart.model.loading import LAYOUT, shapes_of
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.schema import RedHeartError

SMALL = {"width": 24, "heads": 2, "layers": 2, "task_width": 16, "task_heads": 2}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def trained() -> RedHeartModel:
    """A network none of whose tensors is as it begins."""
    torch.manual_seed(1)
    model = RedHeartModel(RedHeartConfig(**SMALL))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 7)
    return model


@pytest.fixture
def saved(trained: RedHeartModel, tmp_path: Path) -> Path:
    trained.save_pretrained(tmp_path)
    return tmp_path


def change(directory: Path, act) -> None:
    tensors = load_file(directory / WEIGHTS)
    act(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def drop(pattern: str):
    return lambda tensors: [tensors.pop(n) for n in list(tensors) if re.match(pattern, n)]


FAULTS = {
    "a head": (drop("heads.regret"), r"lacks 32 tensors \(heads\.regret\..* and 29 more\)"),
    "an old layout": (
        lambda t: t.update({"backbone.layers.0.norm.weight": torch.ones(2)}),
        "made by an earlier version of this program",
    ),
    "a later old layout": (
        lambda t: t.update({"backbone.layers.attention_bias": torch.ones(2, 2, 24)}),
        "made by an earlier version of this program",
    ),
    "an old layout of the fusion": (
        lambda t: t.update({"aux.utility.correction.bias": t.pop("aux.utility.shift.bias")}),
        "made by an earlier version of this program",
    ),
    "the layout before this one": (
        lambda t: t.update({"heads.bentham.verdicts.bias": t.pop("heads.bentham.verdict.bias")}),
        "made by an earlier version of this program",
    ),
    "a buffer": (drop("backbone.positions"), r"lacks 1 tensor \(backbone\.positions\)"),
    "a stranger": (lambda t: t.update({"heads.joy.weight": torch.ones(2)}), r"unknown to this network, 1 tensor \(heads\.joy\.weight"),
    "integers": (
        lambda t: t.update({"backbone.pooling.query": t["backbone.pooling.query"].to(torch.int8)}),
        r"model\.safetensors holds backbone\.pooling\.query as I8, and the network has floats there",
    ),
    "a shape": (
        lambda t: t.update({"backbone.pooling.query": torch.ones(4, 2, 9)}),
        r"another shape 1 tensor \(backbone\.pooling\.query \[4, 2, 9\] instead of \[4, 2, 8\]",
    ),
}  # fmt: skip


OPTIONS = [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"output_loading_info": True}]


@pytest.mark.parametrize(("fault", "options"), [*((f, {}) for f in FAULTS), *(("a head", o) for o in OPTIONS[1:])])
def test_tensors_that_are_not_the_networks_are_refused_by_name(saved: Path, fault: str, options: dict):
    act, words = FAULTS[fault]
    change(saved, act)
    with pytest.raises(RedHeartError, match=words):
        (AutoModel if options else RedHeartModel).from_pretrained(saved, **options)


def test_a_shard_that_lacks_what_the_index_promises_is_refused(trained: RedHeartModel, tmp_path: Path):
    trained.save_pretrained(tmp_path, max_shard_size="200KB")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / places["heads.surd.norm.weight" if "heads.surd.norm.weight" in places else max(places)]
    tensors = load_file(shard)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(RedHeartError, match=re.escape(name)):
        RedHeartModel.from_pretrained(tmp_path)


def test_half_a_file_is_refused(saved: Path):
    content = (saved / WEIGHTS).read_bytes()
    for cut in (4, 1000, len(content) - 9):
        (saved / WEIGHTS).write_bytes(content[:cut])
        with pytest.raises(RedHeartError, match="no whole safetensors file"):
            RedHeartModel.from_pretrained(saved)


def test_what_is_allowed_to_be_missing_is_what_a_fresh_network_has(trained: RedHeartModel, saved: Path):
    change(saved, drop(r".*"))
    torch.manual_seed(5)
    fresh = RedHeartModel(RedHeartConfig(**SMALL)).state_dict()
    torch.manual_seed(5)
    loaded = RedHeartModel.from_pretrained(saved, ignore_mismatched_sizes=True).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in fresh.items())
    torch.manual_seed(5)
    asked = RedHeartModel.from_pretrained(None, config=RedHeartConfig(**SMALL), state_dict={}).state_dict()
    assert all(torch.equal(asked[n], t) for n, t in fresh.items())


def test_what_is_there_is_kept_and_the_rest_is_drawn(trained: RedHeartModel, saved: Path):
    gone = r"heads\.emotion|backbone\.(positions|pooling)|aux\.(utility|kalman)|analyzers\.surd|.*\.bias$"
    change(saved, drop(gone))
    change(saved, lambda t: t.update({"analyzers.emotion.query": torch.ones(3)}))
    torch.manual_seed(5)
    fresh = RedHeartModel(RedHeartConfig(**SMALL)).state_dict()
    torch.manual_seed(5)
    model, info = RedHeartModel.from_pretrained(saved, ignore_mismatched_sizes=True, output_loading_info=True)
    drawn = {n for n in fresh if re.match(gone, n)} | {"analyzers.emotion.query"}
    assert info["missing_keys"] | {n for n, *_ in info["mismatched_keys"]} == drawn
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (fresh if name in drawn else trained.state_dict())[name]), name


def test_a_network_made_real_from_meta_is_a_fresh_one():
    with torch.device("meta"):
        model = RedHeartModel(RedHeartConfig(**SMALL))
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    model.init_weights()
    torch.manual_seed(5)
    fresh = RedHeartModel(RedHeartConfig(**SMALL)).state_dict()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in fresh.items())


def test_building_draws_every_layer_once():
    """init_weights of a network that was just built changes nothing, so that a seed means the same as ever."""
    model = RedHeartModel(RedHeartConfig(**SMALL))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", MANIFEST])
def test_a_flipped_bit_in_an_export_is_refused_by_name_and_the_card_is_free(saved: Path, name: str):
    (saved / "README.md").write_text("a card")
    write_manifest(saved)
    (saved / "README.md").write_text("a better card")
    assert RedHeartModel.from_pretrained(saved) is not None
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(RedHeartError, match=rf"{re.escape(name)} .*remove .*manifest\.json if the change is yours"):
        RedHeartModel.from_pretrained(saved, config=RedHeartConfig(**SMALL))


def test_sizes_that_make_no_network_are_named():
    for values, words in (
        ({"width": "wide"}, "width"),
        ({"heads": 5}, "divisible"),
        ({"dropout": 2}, "dropout"),
        ({"layers": -1}, "layers"),
    ):
        with pytest.raises(RedHeartError, match=words):
            RedHeartConfig(**{**SMALL, **values})


def test_another_layout_of_the_tensors_has_another_number():
    """What the network of this size is made of, by name and shape: whoever changes it counts LAYOUT up, so that runs and exports of
    the version before are refused by what they are, in every command."""
    shapes = sorted(shapes_of(RedHeartModel(RedHeartConfig(**SMALL)).state_dict()).items())
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
    assert {LAYOUT: digest} == {6: "c6c0ebe8e0f96c63"}


def test_loaded_weights_lie_where_torch_allocates(saved: Path):
    """So that an export answers as the checkpoint that it was made from, to the last bit."""
    model = RedHeartModel.from_pretrained(saved)
    assert [name for name, p in model.named_parameters() if p.data_ptr() % 64] == []
