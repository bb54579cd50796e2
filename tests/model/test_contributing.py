"""A new task is one record and one line of the schema, a new part one file and one record: the package is copied, changed in just
these places, and taken through training, evaluation, ablation, growth and export."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

HEAD = '''"""How much hope a text expresses: the emotion feature [B, K] -> a reading of its own."""

from typing import NamedTuple

import torch
from torch import nn

from redheart.model.axes import Width
from redheart.model.layers import MLP, Masks, Norm


class HopeReading(NamedTuple):
    hope_logits: torch.Tensor  # [B, 1]
    state: torch.Tensor  # [B, K]


class HopeHead(nn.Module):
    def __init__(self, width: Width, dropout: float):
        super().__init__()
        self.norm = Norm(width)
        self.hope = MLP(width, 2 * width, 1, dropout=dropout)

    def forward(self, feature: torch.Tensor, masks: Masks) -> HopeReading:
        state = self.norm(feature)
        return HopeReading(self.hope(state, masks), state)
'''
LABEL = '    "hope": Label(("hope",), 0.0, 1.0, scalar=True),\n'
TASK = '            Answer("hope", PROBABILITIES),\n'
PART = """    Part(
        "heads.hope",
        lambda s: HopeHead(s.task_width, s.dropout),
        ("task.emotion",),
        of_task,
        (Answer("hope", PROBABILITIES, "hope_logits", prior=Prior("hope.linears.1.bias")),),
    ),
"""
CHAIN = """
import contextlib, io, json, sys
from pathlib import Path
from redheart import cli

def run(*arguments):
    sys.argv = ["redheart", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)

module, ablate = sys.argv[1:3]
small = ["--set", "memory.strategy=plain", "--set", "training.global_batch_size=8", "--set", "training.evaluate_rows=8"]
sizes = ["width=24", "heads=2", "layers=1", "task_width=16", "task_heads=2"]
small += [x for size in sizes for x in ("--set", f"model.{size}")]
run("prepare", "--source", "mine=texts.json", "--out", "data", "--set", "data.labeler.max_texts=0")
run("train", "--preset", "local", "--data", "data", "--out", "run", "--set", "training.max_steps=10", *small)
run("evaluate", "--checkpoint", "run", "--data", "data")
run("train", "--preset", "local", "--data", "data", "--out", "ablated", "--set", "training.max_steps=2", *small,
    "--set", f"model.ablate=[{ablate}]")
wide = Path("wide.yaml")
import yaml
values = yaml.safe_load(Path("run/config.yaml").read_text())
values["model"] |= {"width": 48, "heads": 4, "task_width": 32, "task_heads": 4, "layers": 2}
wide.write_text(yaml.safe_dump(values))
run("grow", "--checkpoint", "run", "--to", "wide.yaml", "--out", "grown")
run("export", "--checkpoint", "run", "--out", "exported")
run("params", "--preset", "run/config.yaml")
import torch
from redheart.model.redheart import RedHeartModel
from redheart.tasks import TASKS
model = RedHeartModel.from_pretrained("exported").eval()
outputs = model(torch.randn(2, 3, 768))
assert outputs.hope_logits.shape == (2, 1)
assert set(outputs.readings["hope"]) == {module}, outputs.readings["hope"]
assert {"hope", f"{module}/hope"} <= set(TASKS)
assert RedHeartModel.from_pretrained("grown").config.width == 48
report = Path("run/report.md").read_text()
assert "hope" in report, report
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "redheart", tmp_path / "redheart", ignore=shutil.ignore_patterns("__pycache__"))
    texts = [
        {"text": f"I hope that day {i} will be better.", "hope": i % 3 / 2, "label": "joy" if i % 2 else "sadness"}
        for i in range(40)
    ]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    return tmp_path


def insert(path: Path, before: str, lines: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, before
    path.write_text(text.replace(before, lines + before))


def go_through(package: Path, module: str, ablate: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    chain = [sys.executable, "-c", CHAIN, module, ablate]
    ended = subprocess.run(chain, cwd=package, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]


@pytest.mark.slow
def test_a_new_task_is_one_record_and_one_line(package: Path):
    insert(package / "redheart/schema.py", '    "counterfactual": Label(', LABEL)
    insert(package / "redheart/model/parts.py", '            Answer("culture", PROBABILITIES, "culture_logits"', TASK)
    go_through(package, "heads.emotion", "aux.dsp")


@pytest.mark.slow
def test_a_new_part_is_one_file_and_one_record(package: Path):
    insert(package / "redheart/schema.py", '    "counterfactual": Label(', LABEL)
    (package / "redheart/model/heads/hope.py").write_text(HEAD)
    parts = package / "redheart/model/parts.py"
    insert(parts, '    Part(\n        "analyzers.emotion",', PART)
    insert(parts, "from redheart.schema import TASKS4\n", "from redheart.model.heads.hope import HopeHead\n")
    go_through(package, "heads.hope", "heads.hope")
