"""Moments taken from a checkpoint and given to a fresh engine: it goes on as the run that was resumed."""

from pathlib import Path

import pytest
import torch

from redheart.config import load_config
from redheart.model.redheart import RedHeartConfig
from redheart.optim import CPUAdamW8bit
from redheart.optim.state import STATES
from redheart.schema import RedHeartError
from redheart.train.engine import PlainEngine, weights_in_parts
from redheart.train.engine.moments import CHUNK, Piece, adopt
from redheart.train.engine.zero import TAG
from redheart.train.moments import open_moments
from redheart.train.progress import Progress
from redheart.train.stored import Stored
from tests.train.test_plain import WANTED, engine, steps
from tests.train.test_zero import run


def stored(directory: Path) -> Stored:
    config = load_config("local", WANTED)
    values = config.model.model_dump(exclude={"activation_checkpointing"})
    return Stored(directory, RedHeartConfig(**values), config, Progress(), {}.__getitem__)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_torch_alone_goes_on_bit_by_bit(name: str, tmp_path: Path):
    whole, second = (engine(name) for _ in range(2))
    losses = steps(whole, 3)
    whole.save(tmp_path)
    losses += steps(whole, 3)
    second.model.load_state_dict(torch.load(tmp_path / "plain_state.pt", weights_only=True)["model"])
    with open_moments(stored(tmp_path)) as moments:
        assert moments.step == 3
        second.set_moments(moments.read, moments.step)
    assert steps(second, 3) == losses[3:]


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        ("zero2_offload_8bit", 1),
        pytest.param("zero2", 2, marks=pytest.mark.slow),
        pytest.param("zero2_offload", 2, marks=pytest.mark.slow),
        pytest.param("zero3_offload_8bit", 2, marks=pytest.mark.slow),
    ],
)
def test_zero_goes_on_with_them(strategy: str, ranks: int, tmp_path: Path):
    whole = run(ranks, strategy=strategy, steps=6, save_at=3, save=str(tmp_path / "a"))
    carried = run(ranks, strategy=strategy, steps=3, carry=str(tmp_path / "a"))
    assert carried["losses"] == pytest.approx(whole["losses"][3:], rel=1e-4)
    reset = run(ranks, strategy=strategy, steps=3, carry=str(tmp_path / "a"), moments=False)
    assert reset["losses"][0] == pytest.approx(whole["losses"][3], rel=1e-5)
    assert reset["losses"][2] != pytest.approx(whole["losses"][5], rel=1e-3)  # ten times as far as with them
    if strategy == "zero2_offload_8bit":
        refuses_those_of_bitsandbytes(tmp_path / "a")


def refuses_those_of_bitsandbytes(checkpoint: Path) -> None:
    """As gpu_8bit leaves them, under names of their own; the weights are read all the same."""
    (file,) = (checkpoint / TAG).glob("*_optim_states.pt")
    content = torch.load(file, weights_only=False)
    for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        for number, name in enumerate(STATES):
            state[f"state{number}"] = state.pop(name)
    torch.save(content, file)
    with pytest.raises(RedHeartError, match=r"gpu_8bit.*leave --moments out"), open_moments(stored(checkpoint)):
        pass
    read, shapes = weights_in_parts(checkpoint)
    assert all(read(name).shape == shape for name, shape in shapes.items())


def test_8_bit_moments_are_taken_over_in_chunks():
    """As if all were there at once; pieces may lie across the seam, and what no piece covers has none."""
    n = CHUNK + 1000
    generator = torch.Generator().manual_seed(0)
    values = {name: (torch.randn(n, generator=generator), torch.rand(n, generator=generator)) for name in "ab"}
    pieces = [Piece("a", 10, 5, CHUNK - 20), Piece("b", CHUNK - 10, 0, 500)]
    p = torch.zeros(n)
    optimizer = CPUAdamW8bit([p])
    adopt(optimizer, p, pieces, values.__getitem__, 7)
    m, v = torch.zeros(n), torch.zeros(n)
    for name, start, origin, size in pieces:
        m[start : start + size], v[start : start + size] = (x[origin : origin + size] for x in values[name])
    other = torch.zeros(n)
    whole = CPUAdamW8bit([other])
    whole.set_moments(other, m, v)
    assert all(map(torch.equal, optimizer.moments(p), whole.moments(other)))
    assert optimizer.state[p]["step"] == 7
    first, _ = optimizer.moments(p)
    assert not first[:10].any()
    assert not first[CHUNK + 490 :].any()


@pytest.mark.parametrize("start", [1, 256 * 4])
def test_moments_that_do_not_fit_are_refused(start: int):
    p = torch.zeros(1000)
    with pytest.raises(RedHeartError, match="finite float32 numbers"):
        CPUAdamW8bit([p]).set_moments(p, torch.zeros(1000), torch.zeros(1000), start)


def test_where_there_are_none_it_says_so(tmp_path: Path):
    with pytest.raises(RedHeartError, match="weights alone and no moments"), open_moments(stored(tmp_path)):
        pass
    made = engine()
    made.save(tmp_path)
    with pytest.raises(RedHeartError, match="saved before the first step"), open_moments(stored(tmp_path)):
        pass
    assert isinstance(made, PlainEngine)
    other = torch.optim.SGD([torch.zeros(3)])
    with pytest.raises(RedHeartError, match="SGD cannot take over moments"):
        adopt(other, other.param_groups[0]["params"][0], [], {}.__getitem__, 1)
