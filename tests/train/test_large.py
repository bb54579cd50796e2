"""The large presets themselves, on the host: real optimizer steps, and the memory that was predicted before the first of them."""

import json

import psutil
import pytest

from tests.runs import redheart


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "tokens", "precision", "rows", "micro", "gib"),
    [
        ("330m", 64, "fp32", 8, 4, 9),
        ("330m", 16, "bf16", 2, 2, 6),
        ("1b3", 16, "bf16", 2, 2, 17),
    ],
)
def test_real_steps_take_the_memory_that_was_predicted(
    preset: str, tokens: int, precision: str, rows: int, micro: int, gib: int
):
    if psutil.virtual_memory().available < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free memory")
    sizes = [
        f"training.precision={precision}",
        f"training.global_batch_size={rows}",
        f"training.micro_batch_size={micro}",
    ]
    settings = [x for s in sizes for x in ("--set", s)]
    done = redheart("plan", "--measure", "--preset", preset, "--tokens", str(tokens), *settings, "--json", timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])  # DeepSpeed, imported before, logs on stdout
    print(json.dumps(told))
    assert told["strategy"] == "zero2_offload_8bit"
    assert told["ratio"]["host_peak_gib"] == pytest.approx(1, abs=0.05)
    assert told["losses"][1] < told["losses"][0]
