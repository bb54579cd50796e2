"""What the fault matrix disturbs: small works on the disk, each a function of paths, run in a child of server.py.

The network is tiny, the encoder and the LLM are stand-ins, everything else is what the commands do. A work leaves everything below
its folder `home`, and gives what an undisturbed one gives: digests of parameters, or of files.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import redheart.train.validate  # noqa: F401  what the commands import
from redheart.config import DataConfig, LabelerConfig, RunConfig, load_config
from redheart.data import augment as augmenting
from redheart.data import encode, llm_labels
from redheart.data.prepare import prepare as preparing
from redheart.evaluation.calibration import CALIBRATION
from redheart.files import verify_manifest
from redheart.ranks import launched_rank
from redheart.train import grow as growing
from redheart.train import start
from redheart.train.checkpoint import committed, last, read_progress
from redheart.train.engine import PlainEngine, consolidated_weights
from redheart.train.engine.zero import DeepSpeedEngine
from redheart.train.export import export as exporting
from redheart.train.trainer import Trainer
from tests.faults.kinds import SETTINGS, Encoder, Llm, tree
from tests.runs import losses
from tests.train import oom_run

STEPS = 2
RUN = [
    *SETTINGS, "training.log_every=1", "training.evaluate_every=2", "checkpoint.keep_last=1",
]  # fmt: skip
WIDER = ["model.width=48", "model.heads=4", "model.task_width=32", "model.task_heads=4"]
PREPARED = DataConfig(labeler=LabelerConfig(max_texts=2), rows_per_shard=8)


def get_ready() -> None:
    """Stand-ins for what is large or slow, for good: the process is the server's own."""
    torch.set_num_threads(1)
    encode.TextEncoder = augmenting.TextEncoder = Encoder  # type: ignore[misc, assignment]
    llm_labels.LlmScorer = Llm  # type: ignore[misc, assignment]
    start.check_memory = lambda *_: None  # type: ignore[assignment]  # measures for a while
    growing.SHARD_SIZE = 1_000_000
    with tempfile.TemporaryDirectory() as folder:  # what is imported late is there for every child
        home = str(Path(folder) / "world")
        make_world(home)
        for work in (resume_training, export):
            work(home)
    gc.collect()
    gc.freeze()


def settings(steps: int, *more: str) -> RunConfig:
    return load_config("local", [*RUN, f"training.max_steps={steps}", *more])


def parameters(run: Path) -> str:
    """A digest of the last checkpoint's weights."""
    checkpoint = last(run)
    assert checkpoint is not None
    digest = hashlib.sha256()
    for name, tensor in sorted(consolidated_weights(checkpoint).items()):
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def names(folder: Path) -> list[str]:
    """What lies below a folder; of a TensorBoard's files only that they are there."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    return sorted(name for name in found if "tensorboard/" not in name)


# each work: (home) -> what it gives; `again` is what a user types after it died


def start_training(home: str) -> Any:
    """A fresh run: the first save, later ones, pruning, the calibration at the end."""
    return _trained(Path(home), None)


def resume_training(home: str) -> Any:
    """A run that goes on: clears up, trains, saves and prunes."""
    return _trained(Path(home), "last")


def _trained(home: Path, resume: str | None, overwrite: bool = False) -> Any:
    torch.manual_seed(0)
    run = home / "run"
    start.train(settings(STEPS), home / "data", run, resume=resume, overwrite=overwrite)
    return parameters(run), names(home)


def train_again(home: str) -> Any:
    """What a supervisor does: on from the last checkpoint, afresh where there is none."""
    run = Path(home) / "run"
    for directory in committed(run):
        verify_manifest(directory)
    return _trained(Path(home), "last" if last(run) else None, overwrite=last(run) is None and run.exists())


def export(home: str) -> Any:
    exporting(Path(home) / "run", Path(home) / "export")
    return tree(Path(home) / "export"), names(Path(home))


def grow(home: str, moments: bool = False) -> Any:
    """Without moments: reading those of a plain checkpoint takes half a minute."""
    growing.grow(Path(home) / "run", settings(STEPS, *WIDER), Path(home) / "grown", moments=moments)
    return tree(Path(home) / "grown"), names(Path(home))


def _again(work: Callable[[str], Any], out: str) -> Callable[[str], Any]:
    """The same once more; where all was done but the end of the process, its result is whole."""

    def again(home: str) -> Any:
        if (Path(home) / out).exists():
            verify_manifest(Path(home) / out)
            shutil.rmtree(Path(home) / out)
        return work(home)

    return again


export_again, grow_again = _again(export, "export"), _again(grow, "grown")


def prepare(home: str) -> Any:
    out = Path(home) / "prepared"
    preparing(["everyday"], out, PREPARED, num_samples=24)
    index = json.loads((out / "index.json").read_text())
    for counted in ("report", "sha256"):  # how often the LLM was asked, for instance
        del index[counted]
    return {**tree(out), "index.json": json.dumps(index)}, names(Path(home))


prepare_again = prepare


def calibrate(home: str) -> Any:
    from redheart.train.calibrate import calibrate as calibrating

    calibrating(Path(home) / "run")
    best = next((Path(home) / "run").rglob(CALIBRATION))
    return best.read_text(), names(Path(home))


calibrate_again = calibrate


def command(arguments: list[str]) -> Any:
    """`redheart …`."""
    from redheart.cli import main

    sys.argv = ["redheart", *arguments]
    main()


def make_world(home: str) -> Any:
    """Data, a run in the midst, its undisturbed end."""
    from tests.faults.kinds import write_data

    base = Path(home)
    (base / "data").mkdir(parents=True)
    write_data(base / "data")
    torch.manual_seed(0)
    start.train(settings(1), base / "data", base / "run")
    return json.dumps(names(base))


def train_hurt(home: str, hurt: list[list[Any]], more: list[str], begin: list[str]) -> Any:
    """`redheart train`, begun by --resume, --overwrite or afresh, on any number of ranks; `hurt`: [what, rank, step, …] of HURTS."""
    for what, rank, *how in hurt:
        if launched_rank() == rank:
            HURTS[what](*how)
    run = Path(home) / "run"
    words = ["train", "--data", str(Path(home) / "data"), "--out", str(run), *begin]
    try:
        command([*words, *(f"--set={s}" for s in (*RUN, *more))])
    except SystemExit as end:
        if end.code:
            raise
    if launched_rank() > 0:
        return None
    return parameters(run), samples(run), losses(run), asdict(read_progress(last(run)))


def before_step(at: int, act: Callable[[], None]) -> None:
    whole = Trainer._step

    def step(self: Trainer, *arguments: Any) -> Any:
        if self.state.step == at:
            act()
        return whole(self, *arguments)

    Trainer._step = step  # type: ignore[method-assign]


def signalled(number: int, at: int) -> None:
    before_step(at, lambda: os.kill(os.getpid(), number))


def slow(times: float) -> None:
    """Each step takes so many times as long here."""
    whole = Trainer._step

    def step(self: Trainer, *arguments: Any) -> Any:
        began = time.monotonic()
        found = whole(self, *arguments)
        time.sleep(min(2.0, (times - 1) * (time.monotonic() - began)))  # the first one is long by itself
        return found

    Trainer._step = step  # type: ignore[method-assign]


def planted(field: str, *steps: int) -> None:
    """What the data holds at these steps: features that are not finite, or labels far out of their range."""
    whole = Trainer._batches

    def batches(self: Trainer, step: int) -> Any:
        found = whole(self, step)
        for batch in found if step in steps else ():
            if field == "features":
                batch.features[0, 0] = math.inf
            else:
                batch.labels[field][:] = 30.0
                batch.weights[field][:] = 1.0
        return found

    Trainer._batches = batches  # type: ignore[method-assign]


def short_of_memory(where: str, at: int) -> None:
    """In the optimizer's step, or while a checkpoint is written."""

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("injected: tried to allocate 2.00 GiB")

    def install() -> None:
        for engine in (PlainEngine, DeepSpeedEngine):
            setattr(engine, where, run_out)

    before_step(at, install)


HURTS: dict[str, Callable[..., None]] = {
    "kill": partial(signalled, signal.SIGKILL),
    "stop": partial(signalled, signal.SIGSTOP),
    "end": partial(signalled, signal.SIGTERM),
    "slow": slow,
    "planted": planted,
    "memory": short_of_memory,
    "rows": lambda where, step, rows: oom_run.install(where, launched_rank(), step, rows),
}


def samples(run: Path) -> dict[int, list[str]]:
    """The samples of each step, over all ranks, in order."""
    found: dict[int, list[str]] = {}
    for file in sorted(run.glob("samples-rank*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            found.setdefault(line["step"], []).extend(line["ids"])
    return found
