"""Moments of the optimizer on the disk: those of a checkpoint, parameter by parameter, and those that a grown export carries.

A grown export with moments holds, beside its weights, moments-….safetensors with `NAME.exp_avg` and `NAME.exp_avg_sq` in fp32,
and moments.json: the file of each parameter, and how many steps they have seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from redheart.files import below, read_json, write_json
from redheart.model.growth import Split, grow_moment, growth_plans
from redheart.model.loading import read_tensor
from redheart.model.redheart import RedHeartModel
from redheart.optim.adam8bit import expand_states
from redheart.optim.state import STATES
from redheart.schema import RedHeartError
from redheart.train.engine import PLAIN_STATE, Engine, parameter_groups, read_state
from redheart.train.engine.moments import Read
from redheart.train.engine.universal import read_whole, universal_checkpoint
from redheart.train.engine.zero import TAG
from redheart.train.engine.zero_files import RESIDENT, ZeroFiles, is_readable_in_parts
from redheart.train.stored import Stored

INDEX = "moments.json"
AGAIN = "grow the network again"
FIRST, SECOND = "exp_avg", "exp_avg_sq"


class Moments(NamedTuple):
    """`read(name)`: first and second moment of a parameter, fp32, in its shape. `step`: how many updates they have seen."""

    step: int
    read: Read


@contextlib.contextmanager
def open_moments(stored: Stored) -> Iterator[Moments]:
    """Those of a checkpoint, or of a grown export that carries some. Raises RedHeartError where there are none."""
    directory = stored.directory
    if (directory / INDEX).is_file():
        yield _carried(directory)
    elif (directory / PLAIN_STATE).is_file():
        yield _of_plain(stored)
    elif is_readable_in_parts(directory / TAG):
        files = ZeroFiles(directory / TAG)
        if files.step is None:
            raise _none_yet(stored)
        if not files.knows_moments:
            raise RedHeartError(
                f"{directory} holds 8-bit moments of bitsandbytes (memory.strategy=gpu_8bit), which cannot be read: leave --moments out"
            )
        yield Moments(files.step, files.moments)
    elif (directory / TAG).is_dir():
        with universal_checkpoint(directory / TAG) as converted:
            yield _of_universal(converted / "zero", stored)
    else:
        raise RedHeartError(
            f"{directory} holds weights alone and no moments: name a run or one of its checkpoints, or leave --moments out"
        )


def write_grown(
    moments: Moments,
    stored: Stored,
    empty: RedHeartModel,
    files: Mapping[str, list[str]],
    out: Path,
    split: Split,
) -> None:
    """The moments of a grown network, file by file. `empty`: of the grown size; `files`: its weights' files and what is in them."""
    shapes, plans = {name: p.shape for name, p in empty.named_parameters()}, growth_plans(stored.sizes, empty)
    places = {}
    for file, names in files.items():
        content = {}
        for name in filter(shapes.__contains__, names):
            for power, (kind, moment) in enumerate(zip((FIRST, SECOND), moments.read(name), strict=True), 1):
                content[f"{name}.{kind}"] = grow_moment(moment, shapes[name], plans[name], power, split).contiguous()
            places[name] = file.replace("model", "moments")
        if content:
            save_file(content, out / file.replace("model", "moments"), metadata={"format": "pt"})
    write_json(out / INDEX, {"step": moments.step, "files": places})


def carry(engine: Engine, stored: Stored) -> int | None:
    """Gives the engine the moments that a grown export carries; how many steps they have seen, None without any."""
    if not (stored.directory / INDEX).is_file():
        return None
    moments = _carried(stored.directory)
    engine.set_moments(moments.read, moments.step)
    return moments.step


def _carried(directory: Path) -> Moments:
    index = read_json(directory / INDEX, AGAIN)
    if (
        not isinstance(index, dict)
        or not isinstance(index.get("files"), dict)
        or not isinstance(index.get("step"), int)
    ):
        raise RedHeartError(
            f"{directory / INDEX} does not say which file holds which moments, and of which step: {AGAIN}"
        )

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        file = below(directory / INDEX, index["files"].get(name), AGAIN)
        return read_tensor(file, f"{name}.{FIRST}", AGAIN), read_tensor(file, f"{name}.{SECOND}", AGAIN)

    return Moments(index["step"], read)


def _of_plain(stored: Stored) -> Moments:
    def states() -> dict[int, Any]:
        return read_state(stored.directory, mmap=True)["optimizer"]["state"]

    mapped, resident = states(), 0
    if not mapped:
        raise _none_yet(stored)
    with torch.device("meta"):
        model = RedHeartModel(stored.sizes)
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in parameter_groups(model, 0.0) for p in group["params"]]  # as torch numbers them
    numbers, shapes = {name: i for i, name in enumerate(order)}, dict(model.named_parameters())
    step = max(int(state["step"]) for state in mapped.values())

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal mapped, resident
        if resident > RESIDENT:
            mapped, resident = states(), 0
        state, shape = mapped.get(numbers[name]), shapes[name].shape
        resident += 8 * shape.numel()
        if state is None:  # a parameter that has had no gradient yet
            return torch.zeros(shape), torch.zeros(shape)
        m, v = expand_states(state) if STATES[0] in state else (state[FIRST], state[SECOND])
        return m.view(shape), v.view(shape)

    return Moments(step, read)


def _of_universal(zero: Path, stored: Stored) -> Moments:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in RedHeartModel(stored.sizes).named_parameters()}

    def load(name: str, kind: str) -> torch.Tensor:
        return read_whole(zero / name / f"{kind}.pt")

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return load(name, FIRST).view(shapes[name]), load(name, SECOND).view(shapes[name])

    first = next(iter(shapes))
    if not (zero / first / f"{FIRST}.pt").is_file():
        raise _none_yet(stored)
    # ZeRO-3's parameters are converted without their step; DeepSpeed, too, then takes that of the first state
    optimizer = torch.load(zero / "optimizer_state.pt", map_location="cpu", mmap=True)
    return Moments(int(optimizer["optimizer_state_dict"]["state"][0]["step"]), read)


def _none_yet(stored: Stored) -> RedHeartError:
    return RedHeartError(
        f"{stored.directory} was saved before the first step and holds no moments: leave --moments out"
    )
