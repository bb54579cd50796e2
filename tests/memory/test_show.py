"""A plan in 80 columns: whole names, and a command that a person can paste."""

import io
import shlex
from dataclasses import replace
from typing import get_args

import pytest

from redheart.config import load_config
from redheart.console import LiteralConsole
from redheart.memory import show
from redheart.memory.plan import GIB, Candidate, Card, Plan
from redheart.sections import Strategy

TERMS = (
    "weights",
    "buckets",
    "master",
    "states",
    "gradients",
    "activations",
    "inputs",
    "workspace",
    "allocator",
    "context",
)


def plan_of(chosen: str, nodes: int = 1, gpus: int = 1) -> Plan:
    times = {"compute": 0.1, "launches": 0.2, "optimizer": 0.1}
    one = Candidate(
        "plain", 64, 1, True, None, dict.fromkeys(TERMS, GIB // 4), {"base": GIB}, 3 * GIB, GIB, times, 213.4
    )  # type: ignore[arg-type]
    candidates = [replace(one, strategy=s, fits=s == chosen) for s in get_args(Strategy)]
    return Plan("330m", 64, 8 * GIB, 16 * GIB, nodes, gpus, 44_600_000_000, Card(), candidates)


def test_no_line_but_the_command_is_wider_than_80_and_every_name_is_whole(monkeypatch: pytest.MonkeyPatch):
    written = io.StringIO()
    console = LiteralConsole()
    console.file, console.width = written, 80
    monkeypatch.setattr(show, "console", console)
    show.show_plan(plan_of("zero3_offload_8bit"), "8 GiB", "330m", ["training.epochs=2"])  # type: ignore[arg-type]
    told, command = written.getvalue().split("train so with:\n")
    assert max(map(len, told.splitlines())) <= 80
    assert all(f" {name} " in told for name in (*get_args(Strategy), "launches"))
    assert all(f"■ {term} 0.25" in told for term in TERMS)
    assert "→ zero3_offload_8bit" in told
    assert "…" not in told
    assert shlex.split(command)[:2] == ["redheart", "train"]


@pytest.mark.parametrize(
    ("nodes", "gpus", "start"), [(1, 1, "redheart train"), (1, 4, "accelerate launch"), (2, 2, "bash launch")]
)
def test_the_command_says_what_was_planned(nodes: int, gpus: int, start: str):
    words = shlex.split(show.command(plan_of("zero2", nodes, gpus), "330m", ["training.epochs=2"]))
    assert " ".join(words).startswith(start)
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    config = load_config("330m", settings)
    assert (config.memory.strategy, config.training.micro_batch_size, config.training.epochs) == ("zero2", 64, 2)
    assert config.model.activation_checkpointing
    assert ("launch/accelerate/zero2.yaml" in words) == (nodes * gpus > 1)
    assert ("4" in words) == (gpus == 4)


def test_the_command_promises_what_was_planned_with():
    large = replace(plan_of("zero2"), gpu_memory=24 * GIB)
    assert "memory.gpu_memory_gib=24" in show.command(large, "330m", [])
    assert "memory_gib" not in show.command(plan_of("zero2"), "330m", [])  # that of the preset
