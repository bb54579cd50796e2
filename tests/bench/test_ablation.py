"""Networks of several seeds are compared with networks of the same seeds, or not at all."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from redheart.bench.ablation import _check_complete
from redheart.schema import RedHeartError


def others(*of: tuple[str, int]):
    trained = [
        (name, SimpleNamespace(config=SimpleNamespace(training=SimpleNamespace(seed=seed)))) for name, seed in of
    ]
    return {Path(str(number)): one for number, one in enumerate(trained)}


def test_a_comparison_that_lacks_a_seed_is_refused_by_name():
    _check_complete(others(("aux.dsp", 1), ("aux.dsp", 0)), [0, 1])
    _check_complete(others(("aux.dsp", 5)), [0])  # of one network any will do
    for lacking in (("aux.dsp", 0),), (("aux.dsp", 0), ("aux.dsp", 1), ("aux.kalman", 1)):
        with pytest.raises(
            RedHeartError, match=rf"{lacking[-1][0]}: .*\[{lacking[-1][1]}\].*\[0, 1\]: name one of each"
        ):
            _check_complete(others(*lacking), [0, 1])
