"""Where the public corpora are: REDHEART_DATA, else ../shared/data beside the checkout. Tests that need one skip without it."""

import os
from pathlib import Path

import pytest


def corpus(name: str) -> Path:
    root = Path(os.environ.get("REDHEART_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / name).is_dir():
        pytest.skip(f"corpus {name} is not here; set REDHEART_DATA to the folder that holds it")
    return root / name
