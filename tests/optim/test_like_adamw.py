"""What users of torch.optim.AdamW expect of an optimizer; with torch's own table of inputs and of errors as an oracle.

torch ships `common_optimizers.optim_db`, which its test suite draws on; the bodies of that suite come with its sources alone.
Left out of the table, for CPUAdamW8bit has no such argument: amsgrad, maximize, capturable, foreach, fused, differentiable.
"""

import copy
import io
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from redheart.optim import CPUAdamW8bit
from redheart.optim.state import SCALE_STATES, STATES, dtype_of
from redheart.schema import RedHeartError

OURS = {"lr", "betas", "eps", "weight_decay"}


@pytest.fixture(scope="module")
def table():
    """(settings, errors) of AdamW in torch's table, by another process: the import changes torch's global settings."""
    code = (
        "import pickle, sys, torch; from torch.testing._internal.common_optimizers import optim_db\n"
        "info = next(i for i in optim_db if i.optim_cls is torch.optim.AdamW)\n"
        "errors = info.optim_error_inputs_func(device='cpu', dtype=torch.float32)\n"
        "given = [(e.optimizer_error_input, e.error_type, e.error_regex) for e in errors]\n"
        "print(pickle.dumps(([(i.desc, i.kwargs) for i in info.optim_inputs_func(device='cpu')],\n"
        "    [(i.desc, i.params, i.kwargs, kind, words) for i, kind, words in given])).hex())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return pickle.loads(bytes.fromhex(told.stdout))


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 4))


def train(model, optimizer, steps: int, seed: int = 0):
    """Least squares on noise; the same for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(32, 20, generator=generator), torch.randn(32, 4, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def same(model, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.fixture
def trained():
    model = network()
    optimizer = CPUAdamW8bit(model.parameters(), lr=1e-2, seed=3)
    train(model, optimizer, 3)
    return model, optimizer


def stepped_as_adamw_does(settings) -> bool:
    ours, theirs, start = network(), network(), network()
    for kind, model in ((CPUAdamW8bit, ours), (torch.optim.AdamW, theirs)):
        train(model, kind(model.parameters(), **{"lr": 1e-3, "weight_decay": 0.01, **copy.deepcopy(settings)}), 3)
    return all(
        (a - b).norm() <= 0.1 * (b - s).norm()  # rounding noise of the codes
        for a, b, s in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"lr": 0.01}, {"weight_decay": 0.5}, {"lr": torch.tensor(0.01)}, {"betas": (0.5, 0.9), "eps": 1e-4}],
)
def test_every_setting_steps_as_adamw_does(settings):
    assert stepped_as_adamw_does(settings)


@pytest.mark.slow
def test_torchs_table_of_settings(table, subtests):
    for name, settings in table[0]:
        with subtests.test(name, settings=str(settings)):
            if set(settings) <= OURS:
                assert stepped_as_adamw_does(settings)
            else:
                with pytest.raises(TypeError, match="unexpected keyword"):
                    CPUAdamW8bit(network().parameters(), **settings)


@pytest.mark.slow
def test_torchs_table_of_errors(table, subtests):
    left_out = []
    for name, given, settings, kind, words in table[1]:
        if not set(settings) <= OURS:
            left_out.append(name)
            continue
        with subtests.test(name):
            params = [torch.nn.Parameter(torch.zeros(2))] if given is None else given
            expected = pytest.warns if issubclass(kind, Warning) else pytest.raises
            with expected(kind, match=re.compile(words)):
                CPUAdamW8bit(params, **settings)
    assert all("foreach" in name for name in left_out)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, "learning rate: -1.0"), ({"lr": float("nan")}, "learning rate: nan"),
        ({"eps": -1e-8}, "epsilon value"), ({"eps": 0.0}, "epsilon value"), ({"eps": float("nan")}, "epsilon value"),
        ({"betas": (0.9, 1.0)}, "index 1: 1.0"), ({"betas": (float("nan"), 0.9)}, "index 0: nan"),
        ({"weight_decay": float("inf")}, "weight_decay value: inf"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_value_errors_of_ours(settings, words):
    for kind in (ValueError, RedHeartError):
        with pytest.raises(kind, match=words):
            CPUAdamW8bit([torch.nn.Parameter(torch.zeros(2))], **settings)


def test_no_parameters_at_all_is_torchs_error():
    with pytest.raises(ValueError, match="empty parameter list"):
        CPUAdamW8bit([])


def lone(n: int):
    p = torch.nn.Parameter(torch.zeros(n))
    p.grad = torch.ones(n)
    return p, CPUAdamW8bit([p], lr=1.0)


@pytest.mark.parametrize("n", [300, 70_000])
@pytest.mark.parametrize(
    "harm", ["larger", "smaller", "stale gradient", "state of another size", "state of another type"]
)
def test_tensors_that_do_not_fit_are_runtime_errors_and_nothing_is_written(n, harm):
    p, optimizer = lone(n)
    optimizer.step()
    if harm in ("larger", "smaller"):
        p.data = torch.zeros(3 * n if harm == "larger" else 7)
        p.grad = torch.ones_like(p)
    elif harm == "stale gradient":
        p.data = torch.zeros(3 * n)
    else:
        name = STATES[1]
        state = optimizer.state[p]
        state[name] = state[name][:-1].clone() if "size" in harm else state[name].float()
    before = p.detach().clone()
    for kind in (RuntimeError, RedHeartError):
        with pytest.raises(kind, match=r"CPUAdamW8bit: .*(resized|another's)"):
            optimizer.step()
    assert torch.equal(p, before)
    if harm != "stale gradient":
        with pytest.raises(RuntimeError):
            optimizer.moments(p)
        with pytest.raises(RuntimeError):
            optimizer.set_moments(p, torch.zeros(p.numel()), torch.zeros(p.numel()))


def test_one_misfit_among_many_stops_the_step_before_any_parameter_moves(trained):
    model, optimizer = trained
    before = copy.deepcopy(model)
    last = list(model.parameters())[-1]
    optimizer.state[last][STATES[0]] = torch.zeros(1, dtype=torch.int8)
    with pytest.raises(RuntimeError):
        train(model, optimizer, 1)
    assert same(model, before)


def test_sparse_gradients_are_refused_as_adamw_refuses_them():
    for kind in (torch.optim.AdamW, CPUAdamW8bit):
        p = torch.nn.Parameter(torch.zeros(5))
        p.grad = torch.ones(5).to_sparse()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            kind([p]).step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_nobodys_business(dtype):
    p, optimizer = lone(70_000)
    torch.set_default_dtype(dtype)
    try:
        optimizer.step()
        m, v = optimizer.moments(p)
    finally:
        torch.set_default_dtype(torch.float32)
    assert m.dtype == v.dtype == torch.float32
    assert torch.allclose(m, torch.tensor(0.1), rtol=0.07)  # a step of the code
    assert torch.allclose(v, torch.tensor(0.001), rtol=0.2)
    with torch.device("meta"):
        optimizer.step()
        assert optimizer.moments(p)[0].device.type == "cpu"


def test_an_empty_parameter_and_one_without_gradient_are_left(trained):
    p, q = torch.nn.Parameter(torch.zeros(0)), torch.nn.Parameter(torch.ones(9))
    optimizer = CPUAdamW8bit([p, q])
    p.grad = torch.zeros(0)
    optimizer.step()
    assert torch.equal(q, torch.ones(9))
    assert q not in optimizer.state
    with pytest.raises(RedHeartError, match="never been stepped"):
        optimizer.moments(q)


def test_a_gradient_of_zero_moves_nothing_without_decay():
    p = torch.nn.Parameter(torch.full((500,), 3.0))
    optimizer = CPUAdamW8bit([p], lr=1.0, weight_decay=0.0)
    p.grad = torch.zeros(500)
    optimizer.step()
    assert torch.equal(p, torch.full((500,), 3.0))


@pytest.mark.parametrize("copies", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_goes_on_as_the_original_does(trained, copies):
    if copies == "deepcopy":
        model, optimizer = copy.deepcopy(trained)
    elif copies == "pickle":
        model, optimizer = pickle.loads(pickle.dumps(trained))
    else:
        file = io.BytesIO()
        torch.save(trained, file)
        file.seek(0)
        model, optimizer = torch.load(file, weights_only=False)
    assert same(model, trained[0])
    for one in ((model, optimizer), trained):
        train(*one, 3, seed=1)
    assert same(model, trained[0])  # the noise too: the seed came along


@pytest.mark.parametrize("flat", [False, True])
def test_torchs_distributed_checkpoint_carries_it(trained, tmp_path, flat):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process: torch says so
        dcp.save(
            {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path / "c"
        )
        other = copy.deepcopy(model)
        fresh = CPUAdamW8bit(other.parameters(), lr=5.0, seed=3)
        state = {"optimizer": get_optimizer_state_dict(other, fresh, options=options)}
        dcp.load(state, checkpoint_id=tmp_path / "c")
        set_optimizer_state_dict(other, fresh, state["optimizer"], options=options)
    for p in other.parameters():
        assert [fresh.state[p][name].dtype for name in STATES] == [dtype_of(name) for name in STATES]
    for one in ((other, fresh), trained):
        train(*one, 3, seed=1)
    assert same(other, model)


def test_hooks_see_and_change_what_is_loaded(trained):
    model, optimizer = trained
    other = copy.deepcopy(model)
    fresh = CPUAdamW8bit(other.parameters(), seed=3)
    seen = []

    def ours_first(_, state_dict):
        """Takes a state dict of an older layout, as a user who migrates one would."""
        return {
            "state": {i: s["wrapped"] for i, s in state_dict["state"].items()},
            "param_groups": state_dict["param_groups"],
        }

    fresh.register_load_state_dict_pre_hook(ours_first)
    fresh.register_load_state_dict_post_hook(lambda o: seen.extend(s[STATES[0]].dtype for s in o.state.values()))
    saved = optimizer.state_dict()
    fresh.load_state_dict({**saved, "state": {i: {"wrapped": s} for i, s in saved["state"].items()}})
    assert seen == [torch.int8] * 4
    for one in ((other, fresh), trained):
        train(*one, 2, seed=1)
    assert same(other, model)


def test_a_loaded_state_is_a_copy(trained):
    model, optimizer = trained
    saved = optimizer.state_dict()
    other = copy.deepcopy(model)
    fresh = CPUAdamW8bit(other.parameters(), lr=1e-2)
    fresh.load_state_dict(saved)
    kept = {i: s[STATES[0]].clone() for i, s in saved["state"].items()}
    train(other, fresh, 2)
    assert all(torch.equal(kept[i], s[STATES[0]]) for i, s in saved["state"].items())


def test_a_state_that_cannot_be_is_refused_by_name_and_nothing_is_loaded(trained):
    model, optimizer = trained

    def refused(words, kind=ValueError, **changes):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][2].update(changes)
        other = copy.deepcopy(model)
        fresh = CPUAdamW8bit(other.parameters())
        with pytest.raises(kind, match=words):
            fresh.load_state_dict(saved)
        assert not fresh.state
        assert fresh.param_groups[0]["lr"] == 1e-4

    scales = optimizer.state_dict()["state"][2][SCALE_STATES[0]]
    refused(f"{STATES[0]} must be 160 .* this is 160 of torch.float32", RuntimeError, **{STATES[0]: torch.zeros(160)})
    refused(f"{STATES[1]} must be 160 .* this is 3", RuntimeError, **{STATES[1]: torch.zeros(3, dtype=torch.uint8)})
    for bad in (float("nan"), float("inf"), -1.0, 1.5):
        refused(f"{SCALE_STATES[0]} of parameter 2 is damaged", **{SCALE_STATES[0]: torch.full_like(scales, bad)})
    refused("step is -3", step=-3)
    refused("step is 1.5", step=1.5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [(torch.optim.AdamW, "AdamW's in fp32"), (torch.optim.Adagrad, "another optimizer's, with step, sum")],
)
def test_the_state_of_another_optimizer_is_named(kind, words):
    model = network()
    theirs = kind(model.parameters())
    train(model, theirs, 1)
    with pytest.raises(ValueError, match=words):
        CPUAdamW8bit(model.parameters()).load_state_dict(theirs.state_dict())


def test_another_number_of_groups_or_parameters_is_torchs_error(trained):
    saved = trained[1].state_dict()
    groups = [{"params": [p]} for p in network().parameters()]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        CPUAdamW8bit(groups).load_state_dict(saved)
    with pytest.raises(ValueError, match="doesn't match the size"):
        CPUAdamW8bit(groups[0]["params"]).load_state_dict(saved)


def test_a_tensor_learning_rate_is_read_at_every_step_and_a_scheduler_sets_it():
    models = [network(), network()]
    rate = torch.tensor(1e-2)
    optimizers = [CPUAdamW8bit(models[0].parameters(), lr=rate), CPUAdamW8bit(models[1].parameters(), lr=1e-2)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.1) for o in optimizers]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1, seed=step)
        rate.mul_(0.5)
        optimizers[1].param_groups[0]["lr"] *= 0.5
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)  # the tensor holds its rate in fp32
    for scheduler in schedulers:
        scheduler.step()
    assert float(rate) == pytest.approx(optimizers[1].param_groups[0]["lr"], rel=1e-6)


def test_closures_hooks_and_new_groups_work_as_ever(trained):
    model, optimizer = trained
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "weight_decay": 0.0})

    def closure():
        optimizer.zero_grad()
        loss = extra.sum() + sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    expected = closure().item()
    assert optimizer.step(closure).item() == pytest.approx(expected)
    assert calls == ["before", "after"]
    assert torch.allclose(extra, torch.full((3,), 0.5))


def test_it_goes_down_rosenbrocks_valley_as_adamw_does():
    """From (1.5, 1.5) with a loss of 56.5: into the valley, and along it towards (1, 1) as far as AdamW."""
    ends = []
    for kind in (CPUAdamW8bit, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.tensor([1.5, 1.5]))
        optimizer = kind([p], lr=1e-2, weight_decay=0.0)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert ends[0] < 0.1
    assert ends[0] == pytest.approx(ends[1], rel=0.2)
