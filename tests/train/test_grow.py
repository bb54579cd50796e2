"""`redheart grow` and `train --init`: tensor by tensor onto the disk, the same function on real rows, and training goes on from it."""

import json
import os
import re
import shlex
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from redheart.config import load_config
from redheart.memory.budget import status_bytes
from redheart.model import growth
from redheart.model.build import build_model
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.schema import RedHeartError
from redheart.train import grow as door
from redheart.train import stored as stored_room
from redheart.train.export import export as export_to
from redheart.train.export import load_model, write_card
from redheart.train.moments import open_moments
from redheart.train.progress import Progress
from redheart.train.stored import fill, fitting, load_stored, open_stored
from tests.runs import QUICK, redheart


def sizes(width: int = 24, heads: int = 2, task_width: int = 16, **more) -> dict:
    return {"width": width, "heads": heads, "layers": 2, "task_width": task_width, "task_heads": heads, **more}


# twice as wide as `whole_run`, and otherwise the same
TWICE = ["model.heads=6", "model.layers=2", "model.task_heads=4"]


def run_config(**changes):
    config = load_config("local")
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that was never trained, as an export."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("export")
    model = RedHeartModel(RedHeartConfig(**sizes(), encoder={"name": "some", "width": 768}))
    model.save_pretrained(out)
    write_card(out, model, run_config(**sizes()), Progress(encoder={"name": "some", "width": 768}))
    return out


def test_what_is_streamed_is_what_grows_in_memory(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(door, "SHARD_SIZE", 100_000)
    larger = run_config(**sizes(48, 4, 32))
    report = door.grow(export, larger, tmp_path / "grown", seed=7)
    assert (report.max_abs_difference, report.loss_before, report.loss_after) == (None, None, None)
    assert len(list((tmp_path / "grown").glob("model-0*-of-*.safetensors"))) > 3
    expected = growth.grow(RedHeartModel.from_pretrained(export), larger, seed=7)
    assert report.params_after == sum(p.numel() for p in expected.parameters())
    for loaded in (RedHeartModel.from_pretrained(tmp_path / "grown"), load_stored(open_stored(tmp_path / "grown"))):
        state = loaded.state_dict()
        assert all(torch.equal(t, state[n]) for n, t in expected.state_dict().items())
        assert loaded.config.encoder == {"name": "some", "width": 768}
    assert load_model(tmp_path / "grown").config.model.width == 48


def test_what_cannot_be_done_is_said_before_anything_is_written(export: Path, tmp_path: Path):
    for config, words in (
        (run_config(**sizes(36, 4, 32)), "no multiple of 24"),
        (run_config(**sizes(48, 4, 32, num_experts=2)), "num_experts"),
    ):
        with pytest.raises(RedHeartError, match=re.escape(words)):
            door.grow(export, config, tmp_path / "grown")
    with pytest.raises(RedHeartError, match="exists already"):
        door.grow(export, run_config(**sizes(48, 4, 32)), tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RedHeartError, match="link exists already"):  # not after all its work
        door.grow(export, run_config(**sizes(48, 4, 32)), tmp_path / "link")
    (tmp_path / "link").unlink()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("{}")
    assert list(tmp_path.iterdir()) == [tmp_path / "none"]


def test_what_the_target_does_not_name_stays_and_the_command_that_trains_it_says_so(tmp_path: Path):
    """Another encoder's width, other experts and a module left out: growth cannot change them, so nobody has to repeat them."""
    torch.manual_seed(0)
    features = {"name": "some", "width": 40}
    own = {"encoder_width": 40, "num_experts": 2, "ablate": ("aux.dsp",)}
    model = RedHeartModel(RedHeartConfig(**sizes(**own), encoder=features))
    small, out = tmp_path / "small", tmp_path / "grown"
    model.save_pretrained(small)
    write_card(small, model, run_config(**sizes(**own)), Progress(encoder=features))
    wanted = ["model.width=48", "model.heads=4", "model.task_width=32", "model.task_heads=4", "model.layers=3"]
    named = [word for setting in wanted for word in ("--set", setting)]
    done = redheart("grow", "--checkpoint", small, "--to", "local", *named, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    kept = {"model.encoder_width": 40, "model.num_experts": 2, "model.ablate": ["aux.dsp"]}
    assert json.loads(done.stdout)["kept"] == kept
    said = " ".join(done.stderr.split()).partition("train it with: ")[2]
    words = shlex.split(said.partition(" --data")[0])
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert settings[: len(wanted)] == wanted
    config = load_config(words[words.index("--preset") + 1], settings)
    fitting(RedHeartConfig(**config.model.model_dump(exclude={"activation_checkpointing"}), encoder=features), out)
    with pytest.raises(RedHeartError, match="num_experts"):  # what is named is meant
        door.grow(small, load_config("local", [*wanted, "model.num_experts=4"]), tmp_path / "other")


def initialise(model: RedHeartModel, path: Path) -> None:
    """As `train --init` gives a fresh network its weights (train/oom.py)."""
    stored = fitting(model.config, path)
    for name in model.built:
        fill(stored, name, model.get_submodule(name))


def test_a_streamed_network_holds_one_module_and_answers_as_the_whole_one(export: Path):
    stored = open_stored(export)
    held, most = 0, 0

    def released(size: int) -> None:
        nonlocal held
        held -= size

    def read(name: str) -> torch.Tensor:
        nonlocal held, most
        tensor = stored.read(name)
        held += tensor.nbytes
        most = max(most, held)
        weakref.finalize(tensor.untyped_storage(), released, tensor.nbytes)
        return tensor

    whole, streamed = load_stored(stored).eval(), door.streamed(stored._replace(read=read)).eval()
    batch = torch.randn(3, 5, 768)
    with torch.no_grad():
        expected, answers = growth.tensors_of(whole(batch)), growth.tensors_of(streamed(batch))
    assert answers.keys() == expected.keys()
    assert all(torch.equal(answers[name], value) for name, value in expected.items())
    sizes = [sum(t.nbytes for t in whole.get_submodule(name).state_dict().values()) for name in whole.built]
    assert (held, most) == (0, max(sizes))


def test_what_was_read_of_a_file_does_not_stay_in_memory(tmp_path: Path):
    save_file({name: torch.ones(8 * 2**20) for name in "abcd"}, tmp_path / "model.safetensors")
    read, shapes = stored_room._reader(tmp_path)
    before = status_bytes("RssFile")
    for name in shapes:
        assert read(name).sum() == 8 * 2**20
        assert status_bytes("RssFile") < before + 40 * 2**20  # one tensor has 32 MiB, and all of them 128


def test_weights_to_start_from_must_fit(export: Path):
    encoder = {"name": "some", "width": 768}
    model = RedHeartModel(RedHeartConfig(**sizes(), encoder=encoder))
    initialise(model, export)
    expected = load_model(export).model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    for changes, words in (
        ({**sizes(48, 4), "encoder": encoder}, "width = 24"),
        ({**sizes(ablate=["aux.dsp"]), "encoder": encoder}, "model.ablate"),
        ({**sizes(), "encoder": {"name": "other", "width": 768}}, "another encoder"),
    ):
        with pytest.raises(RedHeartError, match=words):
            initialise(RedHeartModel(RedHeartConfig(**changes)), export)


def _change_weights(out: Path, act) -> None:
    tensors = load_file(out / "model.safetensors")
    act(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _change_json(path: Path, act) -> None:
    values = json.loads(path.read_text())
    act(values)
    path.write_text(json.dumps(values))


UNSOUND = {
    "a tensor gone": (lambda o: _change_weights(o, lambda t: t.pop(min(t))), "lacks 1 tensor"),
    "a tensor more": (lambda o: _change_weights(o, lambda t: t.update(x=torch.ones(1))), r"unknown to this network, 1 tensor \(x\)"),
    "a shape": (
        lambda o: _change_weights(o, lambda t: t.update({"backbone.norm.weight": torch.ones(3)})),
        r"backbone.norm.weight \[3\] instead of \[24\]",
    ),
    "integers": (
        lambda o: _change_weights(o, lambda t: t.update({"backbone.norm.weight": torch.ones(24, dtype=torch.int8)})),
        "holds backbone.norm.weight as I8",
    ),
    "half the weights": (lambda o: os.truncate(o / "model.safetensors", 5000), "no whole safetensors file"),
    "no weights": (lambda o: (o / "model.safetensors").unlink(), "model.safetensors"),
    "a width that is a word": (lambda o: _change_json(o / "config.json", lambda v: v.update(width="wide")), "width"),
    "no JSON": (lambda o: (o / "config.json").write_text("{"), "JSON"),
    "an unknown key": (lambda o: _change_json(o / "redheart.json", lambda v: v["progress"].update(stepp=1)), "stepp"),
    "a step that is a word": (lambda o: _change_json(o / "redheart.json", lambda v: v["progress"].update(step="one")), "step"),
    "no progress": (lambda o: _change_json(o / "redheart.json", lambda v: v.pop("progress")), "must hold config and progress"),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNSOUND)
def test_an_export_without_a_manifest_is_still_looked_at_by_every_door(export: Path, tmp_path: Path, fault: str):
    spoil, words = UNSOUND[fault]
    out = Path(shutil.copytree(export, tmp_path / "export"))
    spoil(out)
    for read in (load_model, open_stored):
        with pytest.raises(RedHeartError, match=words):
            read(out)


@pytest.mark.parametrize(
    ("value", "words"), [(torch.nan, "values of backbone.norm.weight"), (3e38, "values of answer")]
)
def test_a_network_that_says_nan_is_not_exported(export: Path, tmp_path: Path, value: float, words: str):
    source = Path(shutil.copytree(export, tmp_path / "export"))
    _change_weights(source, lambda t: t["backbone.norm.weight"].fill_(value))
    with pytest.raises(RedHeartError, match=f"{words}.* not finite"):
        export_to(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]
    if value != value:
        with pytest.raises(RedHeartError, match="not finite"):
            door.grow(source, run_config(**sizes(48, 4, 32)), tmp_path / "out")


def test_a_changed_function_is_refused_and_nothing_stays(
    data: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def damaged(*arguments):
        for name, tensor in growth.grown_tensors(*arguments):
            yield name, tensor * 1.001 if name == "heads.bentham.gate.weight" else tensor

    monkeypatch.setattr(door, "grown_tensors", damaged)
    with pytest.raises(RedHeartError, match=r"theory_gate_logits differs by .* nothing was written"):
        door.grow(whole_run, load_config("local", TWICE), tmp_path / "twice", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_a_trained_network_grows_is_verified_and_trains_on(data: Path, whole_run: Path, tmp_path: Path):
    out = tmp_path / "twice"
    wanted = ["local", *(word for setting in TWICE for word in ("--set", setting))]
    to = ["--to", *wanted, "--out", out]
    grown = redheart("grow", "--checkpoint", whole_run, *to, "--verify", "--moments", "--json")
    assert grown.returncode == 0, grown.stderr
    told = json.loads(grown.stdout)
    expected = {
        "params_before",
        "params_after",
        "kept",
        "max_abs_difference",
        "loss_before",
        "loss_after",
        "host_peak_gib",
    }
    assert set(told) == expected
    assert told["params_after"] == sum(p.numel() for p in build_model(load_config("local", TWICE), None).parameters())
    assert told["params_after"] > 2 * told["params_before"]
    assert 0 < told["max_abs_difference"] <= 1e-5
    assert told["loss_after"] == pytest.approx(told["loss_before"], abs=1e-4)

    arguments = ["train", "--preset", *wanted, "--data", data, *QUICK, "--set", "training.max_steps=2", "--json"]
    arguments += ["--set", "memory.strategy=plain", "--set", "training.global_batch_size=8"]
    run = tmp_path / "run"
    trained = redheart(*arguments, "--init", out, "--out", run)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["initial_dev_loss"] == pytest.approx(told["loss_after"], abs=1e-4)
    source = open_stored(whole_run)
    with open_moments(source) as before, open_moments(open_stored(out)) as after:
        assert after.step == before.step > 0
        assert f"goes on with the moments of {after.step} steps" in trained.stderr
        name = "backbone.layers.up_weight"
        for power, (old, new) in enumerate(zip(before.read(name), after.read(name), strict=True), 1):
            assert old.abs().max() > 0
            assert torch.equal(new, old.repeat(1, 2, 2) / 2**power)

    for extra, words in (
        (["--out", run, "--resume", "--init", out], "give only one of them"),
        (["--out", tmp_path / "other", "--init", whole_run], "grow it first"),
    ):
        refused = redheart(*arguments, *extra)
        assert refused.returncode == 1
        assert words in refused.stderr
    assert not (tmp_path / "other").exists()
