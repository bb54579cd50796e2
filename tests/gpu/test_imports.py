"""What a GPU machine may lack: neither `datasets` nor pyarrow is needed for the tests' jobs and the bench."""

import subprocess
import sys

from tests.gpu.conftest import variables
from tests.runs import ROOT

CODE = """
import sys
for name in ("datasets", "pyarrow", "gguf", "matplotlib"):
    sys.modules[name] = None
import tests.gpu.work, tests.gpu.conftest, redheart.bench.gpu, redheart.bench.gpu_worker, redheart.bench.commands, redheart.cli
from redheart.train.engine.machinery import import_machinery
import_machinery()
print("imported")
"""


def test_the_jobs_need_neither_datasets_nor_pyarrow():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=variables("gpu"), text=True, capture_output=True)
    assert done.stdout.strip().endswith("imported"), done.stderr[-2000:]
