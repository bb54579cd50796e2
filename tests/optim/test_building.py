"""A build that was killed does not stop the next one."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from redheart.optim import building
from redheart.optim.building import built_alone
from redheart.train.engine.machinery import SHARED_MEMORY, load_kernel

HOLD = "from redheart.optim.building import built_alone; import time; built_alone('x', lambda: (print('in', flush=True), time.sleep(60)))"


def test_a_dead_builders_mark_is_removed(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "x").mkdir()
    mark = tmp_path / "x" / "lock"
    mark.touch()
    assert built_alone("x", lambda: mark.exists()) is False
    builder = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=os.environ
    )
    assert builder.stdout is not None
    assert builder.stdout.readline() == "in\n"
    mark.touch()
    monkeypatch.setattr(building, "PATIENCE_S", 0.1)
    monkeypatch.setattr(building.console, "print", lambda told: (said.append(told), builder.kill()))
    said: list[str] = []
    started = time.monotonic()
    assert built_alone("x", lambda: mark.exists()) is False
    assert time.monotonic() - started < 30
    assert said == ["waiting for another process, which compiles x …"]
    builder.wait()
    with mark.open("w"):  # of a builder that knows nothing of our lock
        assert built_alone("x", lambda: mark.exists()) is True


def test_deepspeed_asks_for_the_processor_once(monkeypatch):
    import cpuinfo.cpuinfo

    from redheart.train.engine import machinery

    asked = []

    def slow_answer():
        asked.append(1)
        return {"arch": "X86_64", "flags": ["avx2"]}

    monkeypatch.setattr(cpuinfo.cpuinfo, "get_cpu_info", slow_answer)
    machinery._cpu_info.cache_clear()
    try:
        _, deepspeed = machinery.import_machinery()
        for _ in range(3):
            builder = deepspeed.ops.op_builder.CPUAdamBuilder()
            assert (builder.cpu_arch(), builder.simd_width()) == ("-march=native", "-D__AVX256__")
    finally:
        machinery._cpu_info.cache_clear()
    assert asked == [1]


def test_a_killed_builder_of_deepspeeds_kernel_stops_no_run(tmp_path: Path, monkeypatch):
    """DeepSpeed waits for the mark; here it is gone when DeepSpeed looks."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    mark = tmp_path / "deepspeed_shm_comm" / "lock"
    mark.parent.mkdir()
    mark.touch()
    builder = SimpleNamespace(NAME="deepspeed_shm_comm", load=lambda verbose: mark.exists())
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: builder)
    assert load_kernel(SHARED_MEMORY) is False
