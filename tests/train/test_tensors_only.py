"""What is read of a DeepSpeed checkpoint beside its tensors, on every Python: an enumeration is pickled by its value or through getattr."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from redheart.schema import RedHeartError
from redheart.train.engine.machinery import tensors_only
from redheart.train.engine.plain import PLAIN_STATE, read_state


class Asks:
    """Pickled as a call of getattr."""

    def __init__(self, *asked: Any):
        self.asked = asked

    def __reduce__(self) -> Any:
        return getattr, self.asked


@pytest.mark.parametrize("stage", [ZeroStageEnum.gradients, Asks(ZeroStageEnum, "gradients")])
def test_a_stage_is_read_however_it_was_pickled(stage: Any, tmp_path: Path):
    torch.save({"zero_stage": stage, "weights": torch.ones(3)}, tmp_path / "state.pt")
    with tensors_only():
        found = torch.load(tmp_path / "state.pt", weights_only=False)
    assert found["zero_stage"] is ZeroStageEnum.gradients
    assert torch.equal(found["weights"], torch.ones(3))


@pytest.mark.parametrize(
    "asked",
    [(LossScaler, "__init__"), (ZeroStageEnum, "__init__"), (ZeroStageEnum, "mro"), (torch.nn.Linear, "forward")],
    ids=str,
)
def test_nothing_else_is_asked_of_anything(asked: Any, tmp_path: Path):
    torch.save({"zero_stage": Asks(*asked)}, tmp_path / "state.pt")
    with pytest.raises(RedHeartError, match="holds more than tensors"), tensors_only():
        torch.load(tmp_path / "state.pt", weights_only=False)


# a pickle that ends early, that pops nothing, asks for what it has not put aside, lacks two bytes, names no text; noise; an archive's half
TORN = [
    b"",
    b"\x80\x02",
    b"\x80\x02.",
    b"\x80\x02h\x1d",
    b"\x80\x02M\x8a",
    b"\x80\x02c\xc4\xfb8",
    b"\x00\xff noise",
    b"PK\x03\x04 and no more",
]


@pytest.mark.parametrize("content", TORN, ids=repr)
@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_no_archive_is_one_error(content: bytes, mmap: bool, tmp_path: Path):
    (tmp_path / PLAIN_STATE).write_bytes(content)
    with pytest.raises(RedHeartError):
        read_state(tmp_path, mmap=mmap)
    with pytest.raises(RedHeartError), tensors_only():
        torch.load(tmp_path / PLAIN_STATE, mmap=mmap)


def test_an_error_of_somebody_else_stays_what_it_is():
    with pytest.raises(KeyError), tensors_only():
        raise KeyError("step")
