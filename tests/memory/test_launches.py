"""The planner's table of what an engine does for every tensor, beside what DeepSpeed does."""

import json
import sys

import pytest

from redheart.memory.launches import tensor_of
from redheart.memory.states import TRAITS
from tests.runs import redheart


@pytest.mark.slow  # starts an engine in a process of its own
@pytest.mark.parametrize(
    "strategy", ["zero1", "zero2", "zero2_offload", "zero2_offload_8bit", "zero3", "zero3_offload_8bit"]
)
def test_the_table_is_what_deepspeed_does(strategy: str):
    done = redheart(strategy, launcher=[sys.executable, "-m", "tests.memory.launches_run"], timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counted, (micro, update) = json.loads(done.stdout.strip().splitlines()[-1]), tensor_of(TRAITS[strategy])
    assert counted["micro"] == pytest.approx(micro, abs=0.6)
    assert counted["update"] == pytest.approx(update, abs=1.5)
    assert counted["waits"] == pytest.approx(0, abs=0.1)  # a few of a step, none of a tensor
