"""The transfer bench: its arithmetic on known curves, and one whole bench of tiny runs that is taken up again."""

import json
from pathlib import Path

import pytest

from redheart.bench.transfer import compare, steps_to
from tests.runs import redheart
from tests.train.conftest import data  # noqa: F401 (fixture)


def test_steps_are_counted_to_the_first_that_is_good_enough():
    curve = [[0, 9.0], [10, 3.0], [20, 4.0], [30, 2.0]]
    assert [steps_to(curve, loss) for loss in (9.0, 3.0, 2.9, 1.9)] == [0, 10, 30, None]


def test_ratios_count_the_source_where_they_say_so():
    curves = {
        "source": [[0, 9.0], [40, 4.0], [80, 4.5]],
        "scratch": [[0, 9.0], [20, 6.0], [40, 4.0], [60, 3.0]],
        "grown": [[0, 4.0], [20, 3.0], [40, 2.0]],
        "moments": [[0, 4.0], [20, 2.5], [40, 2.4]],
        "control": [[0, 4.0], [20, 3.5], [40, 3.4]],
    }
    found = compare(curves, share=0.25)
    assert found["source_best"]["dev_loss"] == 4.0
    assert found["source_best"]["steps"] == {
        "grown": 0,
        "moments": 0,
        "scratch": 40,
        "control": 0,
        "grown_with_source": 10.0,
    }
    assert found["source_best"]["ratio_grown"] is None  # it starts there
    assert found["source_best"]["ratio_grown_with_source"] == 4.0
    reached = {"grown": 20, "moments": 20, "scratch": 60, "control": None, "grown_with_source": 30.0}
    assert found["scratch_best"]["steps"] == reached
    assert found["scratch_best"]["ratio_grown"] == 3.0
    assert found["scratch_best"]["ratio_grown_with_source"] == 2.0
    assert found["best"] == {"source": 4.0, "scratch": 3.0, "grown": 2.0, "moments": 2.4, "control": 3.4}


def test_a_bench_of_tiny_runs_and_its_resumption(data: Path, tmp_path: Path):  # noqa: F811
    tiny = "encoder_width: 768, layers: 1, num_experts: 8, dropout: 0.1"
    for name, sizes in (("small", (12, 1, 8, 1)), ("large", (24, 2, 16, 2))):
        width, heads, task_width, task_heads = sizes
        model = f"{{width: {width}, heads: {heads}, task_width: {task_width}, task_heads: {task_heads}, {tiny}}}"
        training = "{epochs: 1, global_batch_size: 8, micro_batch_size: 8, precision: fp32, log_every: 1}"
        (tmp_path / f"{name}.yaml").write_text(
            f"model: {model}\ntraining: {training}\nmemory: {{strategy: plain}}\n", encoding="utf-8"
        )
    out = tmp_path / "bench"
    arguments = ["bench", "transfer", "--data", data, "--out", out, "--small", tmp_path / "small.yaml"]
    arguments += ["--large", tmp_path / "large.yaml", "--source-steps", "4", "--steps", "2", "--evaluate-every", "1"]
    arguments += ["--seed", "0", "--learning-rate", "1e-3", "--json"]
    first = redheart(*arguments)
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    curves = told["seeds"][0]["curves"]
    assert [step for step, _ in curves["grown"]] == [0, 1, 2]
    best = min(loss for _, loss in curves["source"])
    assert curves["grown"][0][1] == pytest.approx(best, abs=1e-4)
    assert curves["moments"][0][1] == pytest.approx(best, abs=1e-4)
    assert curves["moments"][-1][1] != curves["grown"][-1][1]
    assert curves["control"][0][1] == pytest.approx(best, abs=1e-4)
    assert json.loads((out / "transfer.json").read_text())["seeds"] == told["seeds"]
    assert (out / "transfer.png").stat().st_size > 10_000
    again = redheart(*arguments)
    assert "source, seed 0" in first.stderr
    assert "source, seed 0" not in again.stderr
    assert json.loads(again.stdout) == told
