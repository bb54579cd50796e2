"""Going on with a run: whose settings hold, and what may differ from what its checkpoint was trained with.

`--resume` without a preset takes the settings that the checkpoint keeps, with this call's `--set`; a preset that is named is
compared with them. Every key that differs is looked up in config.ON_RESUME: it changes, and that is told and recorded, or the
start is refused before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redheart.config import ON_RESUME, RunConfig, leaves, load_config
from redheart.console import console
from redheart.ranks import launched_world_size
from redheart.schema import RedHeartError
from redheart.train import checkpoint
from redheart.train.checkpoint import Progress

DEFAULT_PRESET = "local"
SETTINGS = "config.yaml"


def settings(
    preset: str | None, overrides: Sequence[str], out: Path | None, resume: str | None
) -> tuple[RunConfig, Path]:
    """(configuration, run directory) that a call means; `out` absent: runs/PRESET, or the run that a resumed checkpoint lies in."""
    if resume is None or preset is not None:
        config = load_config(preset or DEFAULT_PRESET, overrides)
        run = out or Path("runs") / config.preset
    else:
        run = out or Path("runs") / DEFAULT_PRESET
    if resume is None:
        return config, run
    source = checkpoint.locate(resume, run)
    if out is None and resume not in ("last", "best"):
        run = _run_of(source)
        if source.parent.name != "checkpoints":
            raise RedHeartError(
                f"--resume {resume} lies in no run directory: name the directory to go on in with --out"
            )
    if preset is None:
        config = load_config(str(checkpoint.verified(source, [SETTINGS]) / SETTINGS), overrides)
    return config, run


def accept(
    source: Path, state: Progress, config: RunConfig, run: Path, index: Mapping[str, Any], total_steps: int
) -> None:
    """Raises RedHeartError unless `config` and the data of `index` can go on from the verified checkpoint `source`.

    What changes is printed and added to `state.changes`.
    """
    if run.resolve() != _run_of(source).resolve() and (run / SETTINGS).exists():
        raise RedHeartError(
            f"{run} holds another run than {source}: leave --out out to go on there, or name a new --out for a branch of it"
        )
    instead = f"; a run of its own can start from these weights: --init {shlex.quote(str(source))} and another --out"
    if state.encoder != index["encoder"]:
        raise RedHeartError(
            f"{source} was trained on features of another encoder ({state.encoder}) than the data holds ({index['encoder']})"
            + instead
        )
    if state.order and state.order != order_of_rows(index):
        raise RedHeartError(
            f"the data holds other rows than what {source} was trained on ({state.data}): samples would be shown again or left "
            f"out{instead}"
        )
    saved = load_config(str(source / SETTINGS))
    changed = changes(saved, config)
    refused = [key for key in changed if ON_RESUME[key].kind == "refused"]
    if refused:
        told = "; ".join(f"{_told(key, *changed[key])} ({ON_RESUME[key].why})" for key in refused)
        raise RedHeartError(
            f"--resume cannot change {told}. Leave --preset and --set of them out to go on with the run's own settings{instead}"
        )
    if total_steps < state.step:
        raise RedHeartError(
            f"{source} is at step {state.step} and training.max_steps or training.epochs end the run at {total_steps}: raise them"
        )
    for key, (old, new) in changed.items():
        rule = ON_RESUME[key]
        meaning = f" ({rule.why})" if rule.kind == "stated" else ""
        console.print(f"from step {state.step} on {_told(key, old, new)}{meaning}", markup=False)
        state.changes.append({"step": state.step, "key": key, "from": old, "to": new})


def changes(saved: RunConfig, wanted: RunConfig) -> dict[str, tuple[Any, Any]]:
    """key -> (saved, wanted), as JSON values, of the leaf keys that differ; `optimizer.name` is the optimizer that runs."""
    old, new = ({**leaves(c), "optimizer.name": c.optimizer_name} for c in (saved, wanted))
    plain = {key: tuple(json.loads(json.dumps(side[key])) for side in (old, new)) for key in new}
    return {key: (was, now) for key, (was, now) in plain.items() if was != now}


def order_of_rows(index: Mapping[str, Any]) -> str:
    """A digest of the rows that steps and evaluations see, and of what their order is computed from (data/order.py)."""
    shards = {
        split: [(s["sha256"], s["rows"], s.get("repeat", 1)) for s in index["splits"][split]["shards"]]
        for split in ("train", "dev")
    }
    text = json.dumps([shards, index.get("chunk"), index.get("window_shards")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def command(data: str | Path, run: Path) -> str:
    """What to type to go on with `run`: its last checkpoint keeps every setting."""
    line = shlex.join(["redheart", "train", "--data", str(data), "--out", str(run), "--resume"])
    if (ranks := launched_world_size()) > 1:
        line += f"\n(under the launcher that started these {ranks} processes: accelerate launch … -m, or deepspeed … --module)"
    return line


def _run_of(source: Path) -> Path:
    return source.resolve().parent.parent


def _told(key: str, old: Any, new: Any) -> str:
    return f"{key}: {json.dumps(old, ensure_ascii=False)} → {json.dumps(new, ensure_ascii=False)}"
