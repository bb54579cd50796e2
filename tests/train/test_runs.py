"""Whole runs: the same parameters on every path, after every interruption, on every number of ranks."""

import html
import json
import math
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

from redheart.config import load_config
from redheart.files import read_pointer
from redheart.model.build import build_model
from redheart.model.select import MODULES
from redheart.owned import exclusive
from tests.runs import (
    BIN,
    SMALL,
    distance,
    forked,
    last_weights,
    losses,
    redheart,
    scalars,
    start_and_signal,
    train,
)
from tests.train.conftest import WHOLE

ACCELERATE = [
    str(BIN / "accelerate"),
    "launch",
    "--config_file",
    "launch/accelerate/zero2_offload.yaml",
    "--main_process_port",
    "0",
]
AS_WHOLE = [*SMALL, "--set", f"training.evaluate_every={WHOLE // 2}"]  # `whole_run`


def assert_same_losses(got: dict[int, float], expected: dict[int, float]) -> None:
    """The same up to rounding, which the first steps show; later ones amplify it, by how much depends on the processor."""
    assert got.keys() == expected.keys()
    first = range(1, 7)
    assert [got[step] for step in first] == pytest.approx([expected[step] for step in first], rel=1e-4)
    assert got == pytest.approx(expected, rel=2e-2)


def test_plain_torch_and_deepspeed_end_with_the_same_parameters(data: Path, tmp_path: Path):
    for strategy in ("plain", "zero2_offload"):
        done = train(data, tmp_path / strategy, 6, *SMALL, "--set", f"memory.strategy={strategy}")
        assert "built successfully" not in done.stderr  # what DeepSpeed prints is in its log
    torch.manual_seed(0)
    start = build_model(load_config("local", SMALL[1::2]), None).state_dict()
    plain, deepspeed = last_weights(tmp_path / "plain"), last_weights(tmp_path / "zero2_offload")
    # relative to how far training has moved; without weight decay it would be 30 times as far. Element by element rounding
    # shows more: Adam divides a tiny gradient by its own size
    assert distance(plain, deepspeed) < 1e-3 * distance(plain, start)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_and_resumed_run_is_bitwise_the_uninterrupted_one(data, whole_run, tmp_path, number):
    run = tmp_path / "interrupted run"
    code, output = start_and_signal(data, run, WHOLE, 2, number, *AS_WHOLE)
    assert code == 128 + number, output
    stopped_at = json.loads((read_pointer(run / "checkpoints" / "last") / "trainer.json").read_text())["step"]
    assert 2 <= stopped_at < WHOLE
    hint = next(line for line in output.splitlines() if line.startswith("go on with: "))
    resumed = redheart(*shlex.split(hint.removeprefix("go on with: redheart ")))  # carries every --set of the run
    assert resumed.returncode == 0, resumed.stderr
    expected, got = last_weights(whole_run), last_weights(run)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert losses(run) == losses(whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_a_launch_into_a_run_that_trains_already_ends_at_once_on_every_rank(
    launcher: str, data: Path, whole_run: Path, tmp_path: Path
):
    """The rank that finds out says so; its launcher ends the other, which would wait for it."""
    shutil.copytree(whole_run, tmp_path / "run")
    command = {
        "accelerate": [*ACCELERATE, "--num_processes", "2", "-m", "redheart"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29571", "--module", "redheart"],
    }[launcher]
    with exclusive(tmp_path / "run", "training"):
        before = {p: p.stat().st_mtime_ns for p in sorted((tmp_path / "run").rglob("*"))}
        done = redheart("train", "--data", data, "--out", tmp_path / "run", "--resume", launcher=command, timeout=120)
        assert {p: p.stat().st_mtime_ns for p in sorted((tmp_path / "run").rglob("*"))} == before
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "is training in" in said, said[-3000:]
    assert "redheart: " in said


def test_8_bit_adam_under_zero_resumes_bitwise_and_learns(data: Path, tmp_path: Path):
    """How near to fp32 it stays is asserted where it can be told: tests/optim, `redheart bench parity`. Steps of a whole
    network are chaotic: two processors end as far apart as two optimizers (17.4 and 16.1 have been seen)."""
    settings = [*AS_WHOLE, "--set", "memory.strategy=zero2_offload_8bit"]
    whole, run = tmp_path / "whole", tmp_path / "resumed"
    train(data, whole, WHOLE, *settings, "--set", "training.checkpoint_every=6", "--set", "checkpoint.keep_last=9")
    shutil.copytree(whole / "checkpoints" / "step-00000006", run / "checkpoints" / "step-00000006")
    train(data, run, WHOLE, *settings, "--resume", run / "checkpoints" / "step-00000006")
    expected, got = last_weights(whole), last_weights(run)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    dev = scalars(whole, "0_overview/dev_loss")
    assert dev[WHOLE] < 0.9 * dev[0]


def test_two_ranks_under_accelerate_give_the_losses_of_one_process(data: Path, whole_run: Path, tmp_path: Path):
    arguments = [*ACCELERATE, "--num_processes", "2", "-m", "redheart"]
    done = train(data, tmp_path / "two", WHOLE, *AS_WHOLE, launcher=arguments)
    assert "Warning" not in done.stderr  # nobody could do anything about DeepSpeed's calls of torch
    trainer = json.loads((read_pointer(tmp_path / "two" / "checkpoints" / "last") / "trainer.json").read_text())
    assert trainer["world_size"] == 2
    assert_same_losses(losses(tmp_path / "two"), losses(whole_run))


def test_two_ranks_under_deepspeed_give_the_losses_of_one_process(data: Path, whole_run: Path, tmp_path: Path):
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29677", "--module", "redheart"]
    train(data, tmp_path / "two", WHOLE, *SMALL, launcher=launcher)
    trainer = json.loads((read_pointer(tmp_path / "two" / "checkpoints" / "last") / "trainer.json").read_text())
    assert trainer["world_size"] == 2
    assert_same_losses(losses(tmp_path / "two"), losses(whole_run))


@pytest.mark.slow  # the default suite compares the gradients (tests/model/test_model.py)
def test_cutting_the_batch_into_micro_batches_changes_nothing(data: Path, whole_run: Path, tmp_path: Path):
    train(data, tmp_path / "cut", WHOLE, *AS_WHOLE, "--set", "training.micro_batch_size=4")
    assert_same_losses(losses(tmp_path / "cut"), losses(whole_run))


def test_tensorboard_holds_what_a_run_is_judged_by(whole_run: Path):
    answers = ("emotion", "culture", "bentham", "acceptability", "ethics", "regret", "regret_views", "surd")
    alone = ("heads.emotion/emotion", "aux.kalman/emotion", "analyzers.surd/density")
    norms = [f"2_modules/{m}/grad_norm" for m in MODULES]
    for tag in [
        *(f"1_quality/{t}/train_loss" for t in answers),
        *(f"2_modules/{t}/train_loss" for t in alone),
        *(f"0_overview/{name}" for name in ("loss", "grad_norm", "samples_per_s", "host_rss_gib")),
        *norms,
    ]:
        values = scalars(whole_run, tag)
        assert len(values) == WHOLE, tag
        assert all(0 < v < math.inf for v in values.values()), tag
    rate = scalars(whole_run, "0_overview/learning_rate")
    assert rate[1] == pytest.approx(7e-4)  # one step of warm-up
    assert all(rate[k] > rate[k + 1] for k in range(2, WHOLE))
    assert set(scalars(whole_run, "0_overview/dev_loss")) == {0, WHOLE // 2, WHOLE}
    squares = sum(scalars(whole_run, norm)[7] ** 2 for norm in norms)
    assert squares**0.5 == pytest.approx(scalars(whole_run, "0_overview/grad_norm")[7], rel=1e-4)


def test_the_dev_loss_falls(whole_run: Path):
    dev = scalars(whole_run, "0_overview/dev_loss")
    assert dev[WHOLE] < 0.9 * dev[0]


def test_a_run_that_gets_no_better_ends_early_and_goes_on_where_it_is_told_to(data: Path, tmp_path: Path):
    out, spoilt = (
        tmp_path / "spoilt",
        ("--set", "optimizer.learning_rate=1.0", "--set", "training.evaluate_every=1", "--json"),
    )
    told = json.loads(train(data, out, 20, *SMALL, *spoilt, "--set", "training.patience=2").stdout)
    assert told["steps"] == told["best_step"] + 2 < 20
    assert told["calibration"]  # it has come to its end
    assert read_pointer(out / "checkpoints" / "best") == out / "checkpoints" / f"step-{told['best_step']:08d}"
    more = ("train", "--data", data, "--out", out, "--resume", "--json")
    again = json.loads(redheart(*more).stdout)
    assert again["steps"] == told["steps"]
    longer = redheart(*more, "--set", "training.patience=3")
    assert json.loads(longer.stdout)["steps"] == told["steps"] + 1


def test_a_dry_run_changes_no_parameter_and_saves_nothing(data: Path, tmp_path: Path):
    result = train(data, tmp_path / "dry", 3, *SMALL, "--no-param-update", "--json")
    told = json.loads(result.stdout)
    assert told["last_dev_loss"] == told["initial_dev_loss"]
    assert not (tmp_path / "dry" / "checkpoints").exists()


def test_everything_lies_under_the_run_directory_and_can_be_used(data: Path, whole_run: Path, tmp_path: Path):
    evaluated = redheart("evaluate", "--checkpoint", whole_run, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads(evaluated.stdout)
    judged = [line for line in report["lines"] if line["judged"]]
    assert {line["origin"] for line in judged} == {"author", "people"}  # people: of all kinds together
    assert {"emotion", "culture", "acceptability", "regret"} <= {line["task"] for line in judged}
    names = {p.name for p in whole_run.iterdir()}
    assert {"config.yaml", "ds_config.json", "checkpoints", "tensorboard", "report.md", "learning_curve.png"} <= names
    page = (whole_run / "report.html").read_text()
    for line in [
        *report["verdict"]["lines"],
        f"{WHOLE} optimizer steps of the last launch",
        "kept: step",
        "the user's own",
    ]:
        assert line[1:] in html.unescape(page)
    assert page.count("<svg") > 9  # learning curves of all answers and of each, reliability
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)  # nothing is fetched

    exported = redheart("export", "--checkpoint", whole_run, "--out", tmp_path / "export", "--json")
    assert exported.returncode == 0, exported.stderr
    text = "I broke the cup and told nobody."
    answers = [redheart("predict", "--checkpoint", p, text, "--json") for p in (whole_run, tmp_path / "export")]
    answer, exported_answer = (json.loads(a.stdout)[0] for a in answers)
    assert answer["regret"] == pytest.approx(exported_answer["regret"], rel=1e-5)
    assert answer["emotion"] == pytest.approx(exported_answer["emotion"], rel=1e-5)
    assert set(answer["emotion"]) == {"joy", "sadness", "anger", "fear", "surprise", "disgust", "neutral"}
    views = list(answer["regret_views"].values())
    assert views == sorted(views)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    train(data, run, 4, *SMALL, "--set", "training.checkpoint_every=2", "--set", "memory.strategy=plain")
    victim = run / "checkpoints" / "step-00000004" / "plain_state.pt"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    result = redheart("train", "--data", data, "--out", run, "--resume")
    assert result.returncode == 1
    assert "plain_state.pt is damaged" in result.stderr
    assert "step-00000002" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_old_run_is_neither_overwritten_nor_invented(data: Path, whole_run: Path, tmp_path: Path):
    over = redheart("train", "--data", data, "--out", whole_run)
    assert over.returncode == 1
    assert "--resume" in over.stderr
    assert "--overwrite" in over.stderr
    nothing = redheart("train", "--data", data, "--out", tmp_path / "none", "--resume")
    assert nothing.returncode == 1
    assert not (tmp_path / "none").exists()


def test_a_world_that_cannot_share_the_batch_is_told_so(data: Path, tmp_path: Path):
    arguments = ["train", "--data", data, "--out", tmp_path / "odd", "--set", "training.global_batch_size=9"]
    result = forked("redheart", *arguments, ranks=2)
    assert result.returncode == 1
    assert "cannot be shared by 2 ranks" in result.stderr
    assert not (tmp_path / "odd").exists()
