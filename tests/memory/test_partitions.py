"""What `plan --nodes 8 --gpus-per-node 8` says a rank holds is what DeepSpeed gives rank 0 of a simulated world of 64."""

import json
import sys

import pytest

from redheart.config import load_config
from redheart.memory.plan import parameters_of
from redheart.memory.states import partition_sizes, states
from tests.runs import redheart


@pytest.mark.parametrize("preset", ["1b3"])
def test_64_ranks_hold_what_deepspeed_gives_them(preset: str):
    done = redheart(preset, "64", launcher=[sys.executable, "-m", "tests.memory.fake_world"], timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    parameters = parameters_of(load_config(preset))
    assert {f"zero{stage}": sum(partition_sizes(parameters, 8 * 8, stage)) for stage in (2, 3)} == theirs
    assert states("zero2_offload_8bit", parameters, 64).partition == theirs["zero2"]
    three = states("zero3_offload_8bit", parameters, 64)
    assert three.gpu["weights"] == 2 * theirs["zero3"]  # bf16
    assert three.host["master"] == 3 * theirs["zero3"]  # bfloat16 and a byte
    assert parameters.total / 64 <= theirs["zero2"] <= theirs["zero3"] < 1.001 * parameters.total / 64
