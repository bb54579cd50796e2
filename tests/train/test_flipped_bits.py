"""One flipped bit in any kind of file that is written and read back is refused by name, or changes nothing.

Few bits of each kind by default, 40 under `slow`; other damage, and more of it, in tests/faults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redheart.config import DataConfig, EncoderConfig, LabelerConfig
from redheart.data.prepare import prepare
from redheart.evaluation import calibration
from redheart.train.checkpoint import find, last
from tests.data.shard_data import MAX_TOKENS
from tests.faults.kinds import Kind, assert_nothing_silent, every_kind, flip_bits, stand_ins, tree  # noqa: F401


# before any test that stubs the encoder: `whole_run` may be made here, by the real one
@pytest.mark.slow
def test_forty_flipped_bits_of_a_zero_checkpoint(whole_run: Path, tmp_path: Path):
    checkpoint = last(whole_run)
    assert checkpoint is not None
    files = [str(p.relative_to(checkpoint)) for p in sorted(checkpoint.rglob("*")) if p.is_file()]
    doors = {
        name: calibration.read if name == calibration.CALIBRATION else lambda r: tree(find(str(r), r)) for name in files
    }
    kinds = {f"ZeRO {name}": Kind(checkpoint, name, door) for name, door in doors.items()}
    assert_nothing_silent(flip_bits(kinds, 40, tmp_path))


def test_a_few_flipped_bits_of_every_kind(kinds: dict[str, Kind], tmp_path: Path):
    assert len(kinds) >= 24
    assert_nothing_silent(flip_bits(kinds, 2, tmp_path))


@pytest.mark.slow
def test_forty_flipped_bits_of_every_kind(kinds: dict[str, Kind], tmp_path: Path):
    assert_nothing_silent(flip_bits(kinds, 40, tmp_path))


@pytest.mark.slow
def test_forty_flipped_bits_of_a_preparations_plan(stubs: pytest.MonkeyPatch, tmp_path: Path):
    class KilledError(Exception):
        pass

    def killed(*_: Any) -> None:
        raise KilledError

    settings = DataConfig(labeler=LabelerConfig(max_texts=0), encoder=EncoderConfig(max_tokens=MAX_TOKENS))

    def prepared(root: Path) -> dict[str, str]:
        prepare(["everyday"], root, settings, num_samples=12)
        return tree(root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("redheart.data.prepare.encode_parts", killed)
        with pytest.raises(KilledError):
            prepared(tmp_path / "left")
    kind = Kind(tmp_path / "left", "work/plan.json", prepared)
    assert_nothing_silent(flip_bits({"preparation plan": kind}, 40, tmp_path))
