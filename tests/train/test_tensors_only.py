"""What is read of a DeepSpeed checkpoint beside its tensors, on every Python: an enumeration is pickled by its value or through getattr."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from redheart.schema import RedHeartError
from redheart.train.engine.machinery import tensors_only


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
