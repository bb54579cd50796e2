"""training.compile: what is refused, where compiled layers run, and that they compute the same."""

import os

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from redheart.config import RunConfig, load_config
from redheart.losses.combine import factors
from redheart.model import regional
from redheart.model.backbone import EncoderStack, encoder_layer
from redheart.model.build import build_model
from redheart.model.layers import QueryStack, query_layer
from redheart.model.redheart import RedHeartModel
from redheart.schema import RedHeartError
from redheart.tasks import GATES, TASKS, task_weights
from redheart.train import stages
from redheart.train.measure import synthetic_batch


def small(*overrides: str) -> RunConfig:
    sizes = {"encoder_width": 8, "width": 16, "heads": 2, "layers": 2, "task_width": 16, "task_heads": 2}
    settings = [*(f"model.{k}={v}" for k, v in sizes.items()), "memory.strategy=plain", "training.precision=fp32"]
    return load_config("local", [*settings, "training.compile=regional", *overrides])


@pytest.mark.parametrize(
    ("setting", "said"),
    [("memory.strategy=zero3", "zero3 gathers weights"), ("memory.swap=[heads.surd]", "memory.swap moves weights")],
)
def test_what_compiled_layers_have_not_been_shown_to_stand_is_refused(setting: str, said: str):
    with pytest.raises(RedHeartError, match=said):
        regional.check_compilation(small(setting))
    regional.check_compilation(small(setting, "training.compile=off"))


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch):
    regional.check_compilation(small())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RedHeartError, match=r"no-such-compiler is missing: .*training\.compile=off"):
        regional.check_compilation(small())


def test_shapes_are_few_where_each_is_compiled():
    assert regional.few_shapes(small())
    assert regional.few_shapes(small("training.compile=off")) == torch.cuda.is_available()
    assert load_config("local").training.compile == "off"


def test_every_layer_of_every_stack_is_the_compiled_one_in_training_alone():
    model, calls = build_model(small("model.dropout=0"), None), []
    stacks = [m for m in model.modules() if isinstance(m, EncoderStack | QueryStack)]
    for stack in stacks:
        plain = encoder_layer if isinstance(stack, EncoderStack) else query_layer
        stack.compiled_layer = lambda *given, plain=plain: (calls.append(plain), plain(*given))[1]
    answers = model(torch.ones(2, 4, 8))
    layers = sum(len(stack.up_weight) for stack in stacks)
    assert len(calls) == layers
    model.eval()
    torch.testing.assert_close(model(torch.ones(2, 4, 8)).emotion_logits, answers.emotion_logits)
    assert len(calls) == layers


@pytest.mark.parametrize("by_user", [False, True])
def test_what_is_compiled_is_kept_in_our_cache_or_where_the_user_says(tmp_path, monkeypatch, by_user: bool):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(regional.CACHE, str(tmp_path / "mine") if by_user else default_cache_dir())
    told = str(regional.Compiler())
    wanted = tmp_path / ("mine" if by_user else "redheart/inductor")
    assert wanted.is_dir()
    assert told.endswith(f"kept in {wanted}")


def gradients(model: RedHeartModel, config: RunConfig) -> list[torch.Tensor]:
    one = dict.fromkeys((*TASKS, *GATES), 1.0)
    given = synthetic_batch(4, 8, 8).to("cpu", torch.float32)
    loss = stages.compute(
        stages.forward(model, given), given, one, factors(task_weights(config.loss), one, 0.01), 1, config.loss
    )[0]
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.slow  # two minutes of compiling
def test_compiled_layers_have_the_same_gradients(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(regional.CACHE, str(tmp_path / "inductor"))
    regional.compiler.cache_clear()
    config = small()
    torch.manual_seed(0)
    model = build_model(config, None)
    wanted = gradients(model, config)
    regional.compile_layers(model)
    for checkpointing in (False, True):
        model.checkpoint_activations(checkpointing)
        scale = max(float(w.abs().max()) for w in wanted)
        for given, right in zip(gradients(model, config), wanted, strict=True):
            torch.testing.assert_close(given, right, rtol=1e-5, atol=1e-5 * scale)
    told = regional.compiler().report()
    assert told["seconds"] > 0
    assert told["shapes"] == 1
    assert told["graphs"] >= 2 * 5  # forward and backward of five kinds of stacks; layers of one share theirs
    assert any(files for _, _, files in os.walk(tmp_path / "inductor"))
