"""What a run shows: what it writes to TensorBoard, read back and seen in a browser, and says where stderr is no terminal."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from redheart.config import load_config, read_config
from redheart.console import LiteralConsole
from redheart.data.stream import SampleStream
from redheart.evaluation.curves import RATE, tag
from redheart.evaluation.evaluate import forward, predict_all
from redheart.evaluation.examples import Example
from redheart.losses.combine import factors
from redheart.tasks import TASKS, task_weights
from redheart.train import board, trainer
from redheart.train.board import _table
from redheart.train.engine import Update
from redheart.train.export import load_model
from redheart.train.progress import Progress
from redheart.train.saving import Saver
from redheart.train.start import train as start
from redheart.train.synergy import Synergy
from tests.browser import browser, colours, look
from tests.runs import SMALL, scalars, train
from tests.train.conftest import WHOLE
from tests.train.tiny import SETTINGS


@pytest.fixture(scope="module")
def events(whole_run: Path) -> EventAccumulator:
    return EventAccumulator(str(whole_run / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def content(events: EventAccumulator, tag: str) -> bytes:
    return events.Tensors(tag)[-1].tensor_proto.string_val[0]


def test_the_first_tags_are_the_overview_and_then_come_quality_modules_synergy(events: EventAccumulator):
    tags = sorted(events.Tags()["scalars"])
    assert list(dict.fromkeys(tag.split("/")[0] for tag in tags)) == ["0_overview", "1_quality", "2_modules"]
    overview = {
        "loss",
        "dev_loss",
        "dev_unexplained",
        "constant",
        "learning_rate",
        "samples_per_s",
        "host_rss_gib",
        "grad_norm",
    }
    assert {tag.split("/")[1] for tag in tags if tag.startswith("0_")} == overview | {"skipped_steps"}
    final = {name for name, task in TASKS.items() if task.final}
    assert {tag.split("/")[1] for tag in tags if tag.startswith("1_")} <= final


def test_what_answers_leave_open_on_dev_chooses_the_checkpoint_where_asked_for(data: Path, tmp_path: Path):
    """`unexplained`, here computed from the answers of the checkpoint itself."""
    run, asked = tmp_path / "run", ("training.best_metric=unexplained", f"training.evaluate_every={WHOLE // 2}")
    told = train(data, run, WHOLE, *SMALL, "--set", "memory.strategy=plain", *(x for a in asked for x in ("--set", a)))
    looks = scalars(run, "0_overview/dev_unexplained")
    state = json.loads(sorted((run / "checkpoints").glob("step-*/trainer.json"))[-1].read_text())
    assert f"best unexplained {state['best_value']:.4f} at step {state['best_step']}" in told.stderr
    assert (state["best_step"], state["best_value"]) == (min(looks, key=looks.get), pytest.approx(min(looks.values())))
    model = load_model(run / "checkpoints" / f"step-{state['best_step']:08d}").model
    said: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name, task in TASKS.items() if task.final}
    for batch in SampleStream(data, "dev").in_order(16):
        answers = predict_all(forward(model, batch.to("cpu", torch.float32)))
        for name in said:
            label = TASKS[name].label
            said[name].append((answers[name], batch.labels[label], batch.weights[label] > 0))
    left = {}
    for name, parts in said.items():
        answer, true, known = (torch.cat(x).double() for x in zip(*parts, strict=True))
        if TASKS[name].kind == "binary":
            answer, true, known = torch.cat([answer, 1 - answer]), torch.cat([true, 1 - true]), known.repeat(2, 1)
        pairs = [(a[k > 0], t[k > 0]) for a, t, k in zip(answer.T, true.T, known.T, strict=True) if k.any()]
        if pairs:
            errors = sum(float((a - t).square().sum()) for a, t in pairs)
            left[name] = errors / sum(len(t) * max(0.01, float(t.var(correction=0))) for _, t in pairs)
    weights = task_weights(read_config(run / "config.yaml", "").loss)
    mean = sum(weights[n] * v for n, v in left.items()) / sum(weights[n] for n in left)
    assert mean == pytest.approx(state["best_value"], rel=1e-3)


def test_the_constant_predictor_s_line_is_that_of_the_losses_beside_it(whole_run: Path):
    state = json.loads(next((whole_run / "checkpoints").glob("step-*/trainer.json")).read_text())
    constant = scalars(whole_run, "1_quality/regret/constant")
    assert set(constant) == {0, WHOLE // 2, WHOLE}
    assert constant == pytest.approx(dict.fromkeys(constant, state["scales"]["regret"]), rel=1e-6)
    # the overview's lines are the sums of both over all answers and gates, weighed alike
    loss = read_config(whole_run / "config.yaml", "").loss
    weighed = factors(task_weights(loss), state["scales"], loss.constant_floor)
    looks = {n: found for n in weighed if (found := scalars(whole_run, tag(n, "dev_loss")))}
    expected = {
        "constant": dict.fromkeys(constant, sum(weighed[n] * state["scales"][n] for n in looks)),
        "dev_loss": {step: sum(weighed[n] * found[step] for n, found in looks.items()) for step in constant},
    }
    for name, line in expected.items():
        assert scalars(whole_run, f"0_overview/{name}") == pytest.approx(line, rel=1e-5), name


def test_settings_figures_charts_and_texts_are_there(events: EventAccumulator, whole_run: Path):
    assert "global_batch_size: 8" in content(events, "config/text_summary").decode()
    said = content(events, "dev_texts/text_summary").decode().splitlines()
    assert said[0] == "| text | answer | label | said |"
    assert any(re.search(r"\| regret \| \d\.\d\d \| \d\.\d\d \|$", line) for line in said)
    layout = layout_pb2.Layout.FromString(content(events, "custom_scalars__config__"))
    assert [c.title for c in layout.category] == ["overview", "answers", "modules"]
    tags = events.Tags()["scalars"]
    for chart in layout.category[0].chart:
        assert all(any(re.search(pattern, tag) for tag in tags) for pattern in chart.multiline.tag)
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert settings["training.global_batch_size"].number_value == 8
    assert "training.seed" not in settings  # as it is by default
    experiment = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(experiment).experiment.metric_infos
    assert {"0_overview/dev_loss", "1_quality/regret/dev_loss"} <= {m.name.tag for m in metrics} <= set(tags)


@pytest.mark.parametrize("step", [0, 2])
def test_what_an_abandoned_attempt_wrote_is_hidden_from_whichever_step_the_run_goes_on(tmp_path: Path, step: int):
    for begin, value in ((0, 1.0), (step, 2.0)):
        shown = board.Board(tmp_path, load_config("local"), Progress(step=begin), {}, 9)
        for at in range(begin + 1, 6 - int(value)):
            shown.synergy(at, {"x": value})
        shown.close()
        for file in (tmp_path / "tensorboard").iterdir():  # their names are in order from one second to the next
            file.rename(file.with_name(f"events.out.tfevents.{int(value)}") if value == 1 else file)
    assert scalars(tmp_path, "3_synergy/x") == {n: 2.0 if n > step else 1.0 for n in range(1, 4)}


def test_of_a_text_nothing_is_markup():
    line = _table([Example("a | b <img src=x>\n# *c*", "regret", 0.5, 0.25)]).splitlines()[-1]
    assert line == r"| a \| b &lt;img src=x&gt; \# \*c\* | regret | 0.50 | 0.25 |"


def test_a_line_for_every_logged_step_stands_in_for_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(board, "console", LiteralConsole(stderr=True))
    shown = board.Board(tmp_path, load_config("local"), Progress(step=20), {}, 100)
    shown._clock = shown._start = 0.0
    monkeypatch.setattr(board.time, "perf_counter", lambda: 10.0)
    shown.count(64)
    update = Update(applied=True, module_norms={"backbone": 1.0})
    assert shown.train(40, {"regret": 0.5}, 0.75, update, 1e-4) == 6.4
    shown.close()
    told = capsys.readouterr().err
    assert re.fullmatch(
        r"step 40/100  loss 0\.7500  6\.4 samples/s  ETA 0:00:30  host_rss \d+\.\d\d GiB(, gpu_.*)?\n", told
    )


@pytest.mark.parametrize("wanted", ["evaluate_every", "checkpoint_every", "synergy_every", "minutes"])
def test_samples_per_s_is_the_speed_of_the_steps_alone(data: Path, tmp_path: Path, monkeypatch, wanted: str):
    """A step takes a second on this clock, and everything else an hour; dev never improves."""
    now = [0.0]

    def takes(owner: object, name: str, seconds: float) -> None:
        work = getattr(owner, name)

        def slow(*given, **named):
            now[0] += seconds
            return work(*given, **named)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(board, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Progress, "improves", lambda *_: False)
    takes(trainer.stages, "update", 1.0)
    for owner, name in ((trainer, "evaluate"), (Synergy, "analyse"), (Saver, "_save")):
        takes(owner, name, 3600.0)
    rarely = dict.fromkeys(("evaluate_every", "checkpoint_every", "synergy_every"), 99)
    settings = [f"training.{key}={1 if key == wanted else n}" for key, n in rarely.items()]
    settings += ["checkpoint.minutes=1e-9"] if wanted == "minutes" else []
    settings += ["memory.strategy=plain", "training.log_every=1", "training.max_steps=3"]
    start(load_config("local", [*SETTINGS, *settings]), data, tmp_path / "run")
    assert scalars(tmp_path / "run", RATE) == dict.fromkeys((1, 2, 3), 8.0)


@pytest.mark.slow  # TensorBoard and a browser take some 20 s
def test_tensorboard_s_first_screen_is_the_overview(whole_run: Path, tmp_path: Path):
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(whole_run / "tensorboard"), "--port", "0"]
    with browser() as chromium, subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            address = next(m[0] for line in server.stderr if (m := re.search(r"http://localhost:\d+/", line)))
            deadline = time.monotonic() + 60
            while b"0_overview" not in urllib.request.urlopen(f"{address}data/plugin/scalars/tags").read():
                assert time.monotonic() < deadline
                time.sleep(0.5)
            with look(chromium, f"{address}?darkMode=false#timeseries", 1400) as page:
                page.locator("card-view").first.wait_for()
                page.wait_for_timeout(3000)
                groups = page.locator(".group-title").all_inner_texts()
                assert [g for g in groups if g != "Pinned"][:3] == ["0_overview", "1_quality", "2_modules"]
                page.screenshot(path=tmp_path / "tensorboard.png")
            assert colours(tmp_path / "tensorboard.png") > 50
        finally:
            server.terminate()
