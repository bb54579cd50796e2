"""`redheart bench NAME`: its options are the parameters of its function, and telling them starts nothing."""

import importlib
import inspect
import subprocess
import sys

import pytest

from redheart.bench.commands import BENCHES, signature_of


def described(signature: inspect.Signature) -> list[tuple]:
    """Parameters with their types, and what stands in their options, which compare by identity."""
    whole = [(n, p.kind, p.default, p.annotation) for n, p in signature.parameters.items()]
    return [(*rest, annotation.__origin__, [vars(m) for m in annotation.__metadata__]) for *rest, annotation in whole]


@pytest.mark.parametrize("name", BENCHES)
def test_what_the_source_says_of_a_bench_is_what_its_function_takes(name: str):
    function = getattr(importlib.import_module(f"redheart.bench.{name}"), f"bench_{name}")
    signature, doc = signature_of(name)
    assert described(signature) == described(inspect.signature(function, eval_str=True))
    assert doc == inspect.getdoc(function)
    assert doc


def test_the_help_of_a_bench_names_its_options_without_torch():
    code = (
        "import sys\nfrom redheart.cli import main\nsys.argv = ['redheart', 'bench', 'control', '--help']\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--equal-size" in done.stdout
    assert done.stderr.splitlines()[-1] == "False"
