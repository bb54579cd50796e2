"""Going on with a run: whose settings hold, and what may differ from what its checkpoint was trained with.

`--resume` without a preset takes the settings that the checkpoint keeps, with this call's `--set`; a preset that is named is
compared with them. Every key that differs is looked up in ON_RESUME: it changes, and that is told and recorded, or the
start is refused before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from redheart.config import MOVED, RunConfig, leaves, load_config
from redheart.console import console
from redheart.ranks import launched_world_size
from redheart.schema import RedHeartError
from redheart.train import checkpoint
from redheart.train.progress import Progress

DEFAULT_PRESET = "local"
SETTINGS = "config.yaml"
BY_PREPARE = "read by prepare alone"
OWN_DATA = "data"  # within a run directory: what was prepared of the user's own table (train/own.py)


class OnResume(NamedTuple):
    """What `--resume` does with a key that differs from the checkpoint's: `free` and `stated` ones change from the next step
    on (and `why` says what that means), `refused` ones end the start (and `why` is the reason)."""

    kind: Literal["free", "stated", "refused"]
    why: str


_ON_RESUME: tuple[tuple[Literal["free", "stated", "refused"], str, str], ...] = (
    ("free", "a name", "preset"),
    ("free", "the same numbers, computed otherwise", "model.activation_checkpointing memory.swap training.compile"),
    ("free", "the same steps, cut otherwise", "training.micro_batch_size"),
    ("free", "what is seen and kept of the run", """training.log_every training.evaluate_every training.synergy_every
     training.checkpoint_every training.log_samples checkpoint.minutes checkpoint.keep_last checkpoint.keep_best
     checkpoint.keep_every checkpoint.background checkpoint.on_error"""),
    ("free", "when it gives up", "training.patience training.max_bad_steps training.collective_timeout_s guard.max_rewinds"),
    ("stated", "it holds for the steps to come", "guard.on_spike guard.window guard.threshold guard.skip_steps"),
    ("free", "what the plan may take", "memory.gpu_memory_gib memory.host_memory_gib"),
    ("free", "where what computes stands", "data.encoder.device"),
    ("free", "how data is fetched", "data.remote.attempts data.remote.timeout_s data.remote.cache_gib"),
    ("free", BY_PREPARE, """data.encoder.batch_size data.encoder.languages data.labeler.name
     data.labeler.quantization data.labeler.weight data.labeler.max_texts data.labeler.batch_size data.labeler.unpack
     data.labeler.min_mass data.labeler.min_spread data.labeler.min_agreement data.augment.kind data.augment.max_texts
     data.augment.min_similarity data.augment.max_shift data.augment.min_gain data.rows_per_shard data.dedup
     data.dedup_threshold data.columns data.features_from data.file data.mixture"""),
    ("stated", "the learning rates of the steps to come are those of a run with this value from its start",
     "optimizer.learning_rate optimizer.final_learning_rate optimizer.warmup_fraction training.epochs training.max_steps"),
    ("stated", "the checkpoint's weights are read whole, and kept so from here on", "optimizer.master"),
    ("stated", "it holds for the steps to come; those done had the other one",
     "optimizer.max_grad_norm model.dropout loss.balance loss.router_z"),
    ("refused", "the weights of the checkpoint belong to another network", """model.encoder_width model.width model.heads
     model.layers model.task_width model.task_heads model.num_experts model.ablate"""),
    ("refused", "the checkpoint was trained on other features",
     "data.encoder.name data.encoder.layers data.encoder.max_tokens data.encoder.beside"),
    ("refused", "step s reads the positions from s × batch on, in an order drawn from the seed: samples would come twice or never",
     "training.seed training.global_batch_size"),
    ("refused", "the optimizer's state goes on with the value it was made with",
     "optimizer.name optimizer.betas optimizer.eps optimizer.weight_decay"),
    ("refused", "the states of the checkpoint are in another form", "memory.strategy training.precision"),
    ("refused", "the losses before and after could not be compared, nor divided by the same scales", """loss.weights
     loss.shares.heads loss.shares.analyzers loss.shares.aux loss.focal_gamma loss.huber_delta loss.extreme_penalty
     loss.regret_edges loss.constant_floor"""),
    ("refused", "`best` would compare unlike numbers", "training.best_metric training.evaluate_rows"),
)  # fmt: skip
ON_RESUME = {key: OnResume(kind, why) for kind, why, keys in _ON_RESUME for key in keys.split()}  # every leaf key


class Call(NamedTuple):
    """What a call of `redheart train` means. `data`: a prepared directory or its URL; None: the table of `config.data.file`."""

    config: RunConfig
    run: Path
    data: str | None


def settings(
    preset: str | None, overrides: Sequence[str], out: Path | None, resume: str | None, data: str | None = None
) -> Call:
    """`out` absent: runs/PRESET, or the run that a resumed checkpoint lies in; `data` absent: what that checkpoint was trained on."""
    if resume is None:
        config = load_config(preset or DEFAULT_PRESET, overrides)
        _check_named(overrides, config, ON_RESUME if data is not None else ())
        return Call(config, out or Path("runs") / config.preset, data)
    named = load_config(preset, overrides) if preset is not None else None
    run = out or Path("runs") / (named.preset if named else DEFAULT_PRESET)
    source = checkpoint.locate(resume, run)
    if out is None and resume not in ("last", "best"):
        run = _run_of(source)
        if source.parent.name != "checkpoints":
            raise RedHeartError(
                f"--resume {resume} lies in no run directory: name the directory to go on in with --out"
            )
    kept = checkpoint.verified(source, [SETTINGS, checkpoint.TRAINER])
    config, saved = named or load_config(str(kept / SETTINGS), overrides), load_config(str(kept / SETTINGS))
    if saved.data.file and (saved.data.file, saved.data.columns) != (config.data.file, config.data.columns):
        raise RedHeartError(
            f"--resume goes on with what {kept} was trained on, {saved.data.file} with columns {saved.data.columns}: leave --data, "
            "--text and --label out, or start another run with another --out"
        )
    _check_named(overrides, config, changes(saved, config))
    return Call(config, run, data or _data_of(kept, run))


def _check_named(overrides: Sequence[str], config: RunConfig, of_data: Collection[str]) -> None:
    """Raises RedHeartError for a `--set` that would change nothing. `of_data`: the keys that cannot be named for data that are there."""
    named = {MOVED.get(key, key) for key in (text.partition("=")[0] for text in overrides)}
    if "training.epochs" in named and "training.max_steps" not in named and config.training.max_steps:
        raise RedHeartError(
            f"--set training.epochs changes nothing beside training.max_steps = {config.training.max_steps}: add --set "
            "training.max_steps=null, or give a larger training.max_steps instead"
        )
    for key in of_data:
        if ON_RESUME[key].why == BY_PREPARE and any(f"{name}.".startswith(f"{key}.") for name in named):
            raise RedHeartError(
                f"--set {key} changes nothing: prepare alone reads it, and the data are prepared already: leave it out, or prepare the "
                "data again with it"
            )


def _data_of(kept: Path, run: Path) -> str:
    """What a checkpoint was trained on; of data prepared within its run, those of `run`, wherever it was moved to."""
    said = checkpoint.read_progress(kept).data
    inside = run / OWN_DATA
    if "://" not in said and not Path(said).is_dir() and Path(said).name == OWN_DATA and inside.is_dir():
        return str(inside)
    return said


def accept(
    source: Path, state: Progress, config: RunConfig, run: Path, index: Mapping[str, Any], total_steps: int
) -> None:
    """Raises RedHeartError unless `config` and the data of `index` can go on from the verified checkpoint `source`.

    What changes is printed and added to `state.changes`.
    """
    if run.resolve() != _run_of(source).resolve() and checkpoint.last(run) is not None:
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


def check_judged(state: Progress, index: Mapping[str, Any], data: str | Path | None) -> None:
    """Raises RedHeartError where `data` (None: what a network was trained on) can say nothing of it: features of another encoder, or
    data prepared anew since, whose held-out rows may be those it learned."""
    if index["encoder"] != state.encoder:
        raise RedHeartError(
            f"{data or state.data} was encoded by {index['encoder']}, but the network was trained on {state.encoder}"
        )
    if data is None and state.order and state.order != order_of_rows(index):
        raise RedHeartError(
            f"{state.data} holds other rows than this was trained on (it was prepared anew): --data {shlex.quote(state.data)} takes "
            "them all the same, --data OTHER names what it was"
        )


def command(run: Path) -> str:
    """What to type to go on with `run`: its last checkpoint keeps every setting, and says which data it is trained on."""
    line = shlex.join(["redheart", "train", "--out", str(run), "--resume"])
    if (ranks := launched_world_size()) > 1:
        line += f"\n(under the launcher that started these {ranks} processes: accelerate launch … -m, or deepspeed … --module)"
    return line


def _run_of(source: Path) -> Path:
    return source.resolve().parent.parent


def _told(key: str, old: Any, new: Any) -> str:
    return f"{key}: {json.dumps(old, ensure_ascii=False)} → {json.dumps(new, ensure_ascii=False)}"
