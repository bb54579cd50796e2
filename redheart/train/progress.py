"""Where a run stands: what a checkpoint says of it, and what a resumed run goes on with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from redheart.console import console
from redheart.model.loading import LAYOUT, refuse_layout
from redheart.schema import RedHeartError

# losses by the answers they are of; an earlier version kept one list for all, which is left behind
Recent = Annotated[dict[str, list[float]], BeforeValidator(lambda x: {} if isinstance(x, list) else x)]
# what a rewind leaves as it is: of this launch, or found out since
HELD = (
    "world_size",
    "micro_batch_size",
    "out_of_memory",
    "changes",
    "branch",
    "branched_at",
    "spikes",
    "rewinds",
    "left_out",
)


@dataclass
class Progress:
    """Where a run stands; everything else is a function of the configuration and of this."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # when it is read back

    layout: int = LAYOUT  # of the network's tensors: model/loading.py
    step: int = 0  # optimizer steps done
    world_size: int = 1
    scales: dict[str, float] = field(default_factory=dict)  # constant-predictor losses
    data: str = ""  # the data directory it was trained on
    encoder: dict[str, Any] = field(default_factory=dict)  # fingerprint of the features it was trained on
    sources: dict[str, Any] = field(default_factory=dict)  # where the training data came from, with licences
    labels: dict[str, list[float]] = field(default_factory=dict)  # their weights: evaluation/trained.py; {}: not known
    label_counts: dict[str, list[int]] = field(default_factory=dict)
    initial_dev_loss: float | None = None
    initial_dev_losses: dict[str, float] = field(default_factory=dict)  # per task, before the first step
    dev_losses: dict[str, float] = field(default_factory=dict)  # per task, at the last evaluation
    best_value: float | None = None
    best_step: int | None = None
    looks_since_best: int = 0  # evaluations without a better value
    last_loss: float | None = None
    last_dev_loss: float | None = None
    skipped_steps: int = 0
    value: float | None = None  # what `best_value` is the lowest of, at value_step; null where it was not finite
    value_step: int | None = None
    recent_losses: Recent = field(default_factory=dict)  # train/spikes.py
    spikes: int = 0
    rewinds: int = 0
    left_out: list[int] = field(default_factory=list)  # steps, in the data's order, that a rewind left out
    micro_batch_size: int = 0  # what a rank runs at once now; less than the configured one after out_of_memory
    out_of_memory: list[dict[str, Any]] = field(default_factory=list)  # when the micro-batch had to shrink
    order: str = ""  # which rows the data has and in which order: train/resume.py
    changes: list[dict[str, Any]] = field(default_factory=list)  # of the configuration, at the step of a resume
    branch: int = 0  # how often the run went back to an earlier checkpoint
    branched_at: int = 0  # from which step on the checkpoints of lower branches are abandoned
    init: str = ""  # whose weights the run started from: --init
    branch_of: str = ""  # the checkpoint of another run that it went on from: --resume CHECKPOINT --out NEW

    def evaluated(self, total: float, losses: Mapping[str, float]) -> None:
        """Keeps what is finite of an evaluation's dev losses; what is not is told."""
        self.last_dev_loss = total if math.isfinite(total) else None
        self.dev_losses = {name: v for name, v in losses.items() if math.isfinite(v)}
        if wrong := sorted(losses.keys() - self.dev_losses.keys()):
            console.print(f"step {self.step}: dev losses that are not finite: {', '.join(wrong)}")

    def improves(self, value: float) -> bool:
        """Whether `value` (lower is better) is the best so far; it is kept if so. What is not finite never is."""
        self.value, self.value_step = value if math.isfinite(value) else None, self.step
        if not math.isfinite(value) or (self.best_value is not None and value >= self.best_value):
            self.looks_since_best += 1
            return False
        self.best_value, self.best_step, self.looks_since_best = value, self.step, 0
        return True

    def ended(self, total_steps: int, patience: int | None) -> bool:
        """Whether the run is at its last step, or its last `patience` evaluations brought nothing better (Prechelt 1998)."""
        return self.step >= total_steps or (patience is not None and self.looks_since_best >= patience)

    def reads(self, step: int) -> int:
        """Which step's samples, in the order of the data, `step` trains on: those that were left out are passed over."""
        for passed in sorted(self.left_out):
            step += passed <= step
        return step

    def go_back(self, earlier: Progress, left_out: list[int]) -> None:
        """Becomes what a checkpoint says, on a branch of its own, but for what was found out since and for how the run is launched."""
        for name, value in asdict(earlier).items():
            if name not in HELD:
                setattr(self, name, value)
        self.left_out, self.rewinds = [*self.left_out, *left_out], self.rewinds + 1
        self.branch, self.branched_at = self.branch + 1, self.step  # checkpoints after it saw what is left out now

    def note(self) -> str:
        """The last losses, for the progress bar."""
        parts = [f"loss {self.last_loss:.4f}"] if self.last_loss is not None else []
        parts += [f"dev {self.last_dev_loss:.4f}"] if self.last_dev_loss is not None else []
        return "  ".join(parts)


_PROGRESS = TypeAdapter(Progress)


def parse_progress(values: Any, path: Path) -> Progress:
    """Progress from plain values; a key that is missing, unknown or of another type is an error that names it and `path`, and so
    is a network of another layout."""
    if isinstance(values, dict) and isinstance(layout := values.get("layout", 1), int):
        refuse_layout(layout, path)
    try:
        return _PROGRESS.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RedHeartError(
            f"{path}: {where}: {first['msg']}; it was written by another version: choose another one"
        ) from None
