"""The transfer bench: its arithmetic on known curves, and one whole bench of tiny runs that is taken up again."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from redheart.bench.padding import corner, shrink_and_pad
from redheart.bench.transfer import _Bench, bench_transfer, compare, steps_to
from redheart.config import load_config
from redheart.data.fingerprint import with_encoder
from redheart.data.stream import SampleStream
from redheart.files import read_sealed_json, write_sealed_json
from redheart.model.growth import grow_moment, growth_plans
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.schema import RedHeartError
from tests.model.test_growth import BOTH
from tests.model.test_model import SMALL
from tests.runs import redheart
from tests.train.conftest import data  # noqa: F401 (fixture)


def test_steps_are_counted_to_the_first_that_is_good_enough():
    curve = [[0, 9.0], [10, 3.0], [20, 4.0], [30, 2.0]]
    assert [steps_to(curve, loss) for loss in (9.0, 3.0, 2.9, 1.9)] == [0, 10, 30, None]


def test_compute_counts_all_of_the_source():
    curves = {
        "source": [[0, 9.0], [40, 4.0], [80, 4.5]],
        "scratch": [[0, 9.0], [20, 6.0], [40, 4.0], [80, 3.0]],
        "grown": [[0, 4.0], [20, 3.0], [40, 2.0]],
        "moments": [[0, 4.0], [20, 3.1], [60, 2.4]],
        "asymmetric": [[0, 2.9], [20, 2.5]],
        "padded": [[0, 8.0], [60, 3.5]],
        "control": [[0, 4.0], [40, 2.9]],
    }
    found = compare(curves, share=0.25, source_steps=80)  # the source: 20 steps of the large network
    assert found["scratch_best"] == 3.0
    assert found["compute"] == {
        "grown": 40.0,
        "moments": 80.0,
        "asymmetric": 20.0,
        "padded": None,
        "scratch": 80,
        "control": 30.0,
    }
    assert found["saved"] == {"grown": 0.5, "moments": 0.0, "asymmetric": 0.75, "padded": None, "control": 0.625}
    assert found["best"]["moments"] == 2.4


def test_shrink_and_pad_puts_the_small_network_into_a_corner():
    """Without shrinking and padding, what the corner holds is the old tensor; every old entry has one place, within its segment."""
    source = RedHeartConfig(**SMALL)
    with torch.device("meta"):
        small, large = RedHeartModel(source), RedHeartModel(RedHeartConfig(**BOTH))
    plans, seen = growth_plans(source, large), set()
    for name, tensor in large.state_dict().items():
        old = small.state_dict()[name]
        index = torch.arange(old.numel()).view(old.shape)
        held = torch.full(tensor.shape, -1)
        held[corner(old.shape, tensor.shape, plans[name])] = index
        assert torch.equal(held[held >= 0].sort().values, index.flatten()), name
        grown = grow_moment(index.double(), tensor.shape, plans[name], 0)  # to the power of 0: repeated and not scaled
        assert torch.equal(held[held >= 0].double(), grown[held >= 0]), name  # where growth has the first copy of it
        seen |= {axis.kind for axis in plans[name].axes}
    assert {"fixed", "copy", "read", "match", "depth", "adds"} == seen


def test_a_bench_of_tiny_runs_and_its_resumption(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    # few modules: the growth of all of them is tested beside the network
    few = "[analyzers.emotion, analyzers.regret, analyzers.surd, heads.surd, aux.dsp, aux.kalman]"
    tiny = f"encoder_width: 768, layers: 1, num_experts: 8, dropout: 0.1, ablate: {few}"
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
    arguments += ["--seed", "0", "--learning-rate", "1e-3", "--source-keeps-rate", "--json"]
    first = redheart(*arguments)
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    curves = told["seeds"][0]["curves"]
    assert [step for step, _ in curves["grown"]] == [0, 1, 2]
    assert 2 < told["scratch_steps"] == curves["scratch"][-1][0] < 6
    assert curves["control"][-1][0] == told["control_steps"] == round(2 / told["cost_of_a_small_step"]) > 2
    best = min(loss for _, loss in curves["source"])
    for same in ("grown", "moments", "asymmetric", "control"):
        assert curves[same][0][1] == pytest.approx(best, abs=1e-4)
    assert abs(curves["padded"][0][1] - best) > 1e-3  # another function
    assert len({curves[arm][-1][1] for arm in ("grown", "moments", "asymmetric", "padded")}) == 4
    assert json.loads((out / "transfer.json").read_text())["seeds"] == told["seeds"]
    assert (out / "transfer.png").stat().st_size > 10_000
    lowest = {
        arm: load_config(str(out / f"{arm}-seed0-lr0.001" / "config.yaml")).optimizer.final_learning_rate
        for arm in ("source", "grown", "scratch", "control")
    }
    assert lowest.pop("source") == 1e-3 > max(lowest.values())
    again = redheart(*arguments)
    assert "source, seed 0" in first.stderr
    assert "source, seed 0" not in again.stderr
    assert json.loads(again.stdout) == told

    asked = {"small": tmp_path / "small.yaml", "large": tmp_path / "large.yaml", "source_steps": 4, "steps": 2}
    asked |= {"source_keeps_rate": True, "evaluate_every": 1, "seed": [0], "learning_rate": [1e-3]}
    asked |= {name: str(asked[name]) for name in ("small", "large")}
    other = shutil.copytree(data, tmp_path / "other")
    index = read_sealed_json(other / "index.json", "")
    index["splits"]["train"]["shards"][0]["repeat"] = 2
    write_sealed_json(other / "index.json", index)

    monkeypatch.setattr(_Bench, "_flops", lambda *_: 1)  # counting takes seconds; the arms below do not depend on it

    def refused(run: str, data: Path = data, made: str = "with other", **changed: Any) -> None:
        with pytest.raises(RedHeartError, match=rf"/{re.escape(run)} was made {made} .* name another --out"):
            bench_transfer(str(data), out, **asked | changed)

    refused("source-seed0-lr0.001", other)
    refused("source-seed0-lr0.001", source_steps=5)
    refused("source-seed0-lr0.001", source_keeps_rate=False)
    refused("source-seed0-lr0.001", set_=["optimizer.weight_decay=0.5"])
    refused("grown-seed0-lr0.001", steps=3)
    refused("grown-seed0-lr0.001", learning_rate=[1e-3, 3e-2])  # the source of the higher rate is the better one
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    target = with_encoder(load_config(asked["large"]), SampleStream(data, "train").encoder)
    shrink_and_pad(out / "source-seed0-lr0.001", target, tmp_path / "padded", 0)
    assert os.environ["DS_ACCELERATOR"] == "cpu"  # else DeepSpeed says on stdout, before the JSON, that it chose so
    shutil.rmtree(out / "grown-seed0-lr0.001")
    refused("grown-seed0", learning_rate=[1e-3, 3e-2])
    (out / "source-seed0-lr0.001.made.json").unlink()  # as an earlier version left it
    refused("source-seed0-lr0.001", made="by an earlier version,")
