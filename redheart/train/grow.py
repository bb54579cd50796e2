"""`redheart grow`: weights on the disk -> an export of a larger network with the same function, tensor by tensor.

At no time is more than one shard of the result in memory, and of what is read the tensor at hand. Verification then runs the old
network and the new one, one after the other and module by module, on real samples, and compares every answer, latent and reading.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from redheart.config import RunConfig
from redheart.console import console
from redheart.data.stream import SampleStream
from redheart.evaluation.evaluate import evaluate, forward
from redheart.files import committed_directory, write_json
from redheart.losses.combine import factors
from redheart.memory.budget import resident_peak
from redheart.memory.plan import GIB
from redheart.model.growth import UNCHANGED, Split, grown_tensors, reachable, relative_differences, tensors_of
from redheart.model.loading import refuse_not_finite
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.model.select import ExecutionMode
from redheart.owned import check_new
from redheart.schema import RedHeartError
from redheart.tasks import task_weights
from redheart.train.export import write_card
from redheart.train.moments import open_moments, write_grown
from redheart.train.progress import Progress
from redheart.train.stored import INDEX, SINGLE, Stored, open_stored, streamed

SHARD_SIZE = 512 * 2**20  # bytes of one safetensors file
VERIFY_ROWS = 48
MAX_RELATIVE_DIFFERENCE = 1e-5  # over each output's scale, fp32
MAX_LOSS_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class GrowReport:
    """`max_abs_difference`: the largest |after - before| of any output, each divided by the output's largest absolute value."""

    params_before: int
    params_after: int
    kept: dict[str, object]  # what the target's settings do not name and the network has: `model.KEY` by its value
    max_abs_difference: float | None  # None without verification, as the losses
    loss_before: float | None
    loss_after: float | None
    host_peak_gib: float

    def summary(self, out: Path) -> str:
        said = f"grew {self.params_before:,} to {self.params_after:,} parameters, host peak {self.host_peak_gib:.2f} GiB: {out}"
        if self.max_abs_difference is None:
            return said
        return (
            f"{said}\nlargest difference {self.max_abs_difference:.1e} of an output's scale; "
            f"dev loss {self.loss_before:.6f} before, {self.loss_after:.6f} after"
        )

    def training(self, out: Path, preset: str, overrides: Sequence[str]) -> str:
        """The command that trains it."""
        inherited = [f"{key}={json.dumps(value)}" for key, value in self.kept.items()]
        settings = [word for setting in (*overrides, *inherited) for word in ("--set", setting)]
        return shlex.join(["redheart", "train", "--preset", preset, *settings, "--init", str(out), "--data", "DIR"])


def grow(
    checkpoint: Path,
    target: RunConfig,
    out: Path,
    data: str | None = None,
    noise_snr_db: float = 10.0,
    seed: int = 0,
    verify: bool = False,
    moments: bool = False,
    split: Split = "symmetric",
) -> GrowReport:
    """Writes the grown network to `out`, an export from which `train --init` goes on. With `verify` only if nothing changed.

    `moments`: the export carries the optimizer's moments too, and training goes on with them instead of with none.
    `split`: as of model/growth.py's `grow`; asymmetric, only the old channels have moments.

    `data` defaults to what the checkpoint was trained on. Raises RedHeartError where growth cannot reach the target.
    """
    check_new(out)
    source = open_stored(checkpoint)
    kept = _kept(source.sizes, target)
    target = target.model_copy(update={"model": target.model.model_copy(update=kept)})
    sizes = reachable(source.sizes, target)
    stream = _samples(source, data) if verify else None
    before = _look(source, stream) if stream else None
    config, progress = handed_on(source, target)
    difference = loss_before = loss_after = None
    with committed_directory(out) as temporary:
        console.print(f"growing {source.config.preset} to {config.preset} …")
        with torch.device("meta"):
            empty = RedHeartModel(sizes)
        files = _write_weights(source, empty, temporary, noise_snr_db, seed, split)
        if moments:
            with open_moments(source) as found:
                write_grown(found, source, empty, files, temporary, split)
        empty.config.architectures, empty.config.dtype = [type(empty).__name__], torch.float32
        empty.config.save_pretrained(temporary)
        write_card(temporary, empty, config, progress)
        if stream is not None and before is not None:
            after = _look(open_stored(temporary), stream)
            loss_before, loss_after = before[1], after[1]
            differences = relative_differences(before[0], after[0])
            worst = max(differences, key=lambda name: differences[name])
            difference = differences[worst]
            # written as `not … <=` so that a NaN does not pass
            if not difference <= MAX_RELATIVE_DIFFERENCE or not abs(loss_after - loss_before) <= MAX_LOSS_DIFFERENCE:
                raise RedHeartError(
                    f"the grown network is not the same function: {worst} differs by {difference:.1e} of its scale (at "
                    f"most {MAX_RELATIVE_DIFFERENCE:.0e}), dev loss {loss_before:.6f} before and {loss_after:.6f} after; "
                    "nothing was written. An answer of a network that was hardly trained can be as small as its rounding: "
                    "train it further, or grow without --verify"
                )
    named = {f"model.{key}": value for key, value in kept.items()}
    return GrowReport(
        _count(source.sizes), _count(sizes), named, difference, loss_before, loss_after, resident_peak() / GIB
    )


def _kept(source: RedHeartConfig, target: RunConfig) -> dict[str, Any]:
    """What growth cannot change, where the target's settings name it not and the network has it otherwise."""
    theirs = {**{key: getattr(source, key) for key in UNCHANGED}, "ablate": tuple(source.ablate)}
    named = target.model.model_fields_set
    return {key: value for key, value in theirs.items() if key not in named and value != getattr(target.model, key)}


def handed_on(source: Stored, target: RunConfig) -> tuple[RunConfig, Progress]:
    """Of a network made from `source`: what its weights were trained on, and by which losses they are judged, stays."""
    config = target.model_copy(update={"data": source.config.data, "loss": source.config.loss})
    progress = Progress(
        scales=source.progress.scales, data=source.progress.data, encoder=source.progress.encoder, sources=source.progress.sources,
        labels=source.progress.labels, label_counts=source.progress.label_counts,
    )  # fmt: skip
    return config, progress


def _count(sizes: RedHeartConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in RedHeartModel(sizes).parameters())


def _write_weights(
    source: Stored, empty: RedHeartModel, directory: Path, noise_snr_db: float, seed: int, split: Split
) -> dict[str, list[str]]:
    """Safetensors files in Transformers' layout, each written as soon as its last tensor is grown; what is in which."""
    pattern = SINGLE.replace(".safetensors", "{suffix}.safetensors")
    plan = split_torch_state_dict_into_shards(empty.state_dict(), filename_pattern=pattern, max_shard_size=SHARD_SIZE)
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in grown_tensors(source.read, source.sizes, empty, noise_snr_db, seed, split):
        refuse_not_finite("the network to grow", name, tensor)
        file = plan.tensor_to_filename[name]
        waiting.setdefault(file, {})[name] = tensor
        if len(waiting[file]) == len(plan.filename_to_tensors[file]):
            save_file(waiting.pop(file), directory / file, metadata={"format": "pt"})
    assert not waiting
    if plan.is_sharded:
        write_json(directory / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    return plan.filename_to_tensors


def _samples(source: Stored, data: str | None) -> SampleStream:
    stream = SampleStream(data or source.progress.data, "dev", source.config.data.remote)
    if not stream.num_rows:
        raise RedHeartError("--verify needs dev rows, and the data has none: name other data with --data")
    if stream.encoder != source.sizes.encoder:
        raise RedHeartError(
            f"--verify: the data was encoded by {stream.encoder}, and the network reads features of {source.sizes.encoder}"
        )
    return stream


def _look(stored: Stored, stream: SampleStream) -> tuple[dict[str, torch.Tensor], float]:
    """(every output on some dev rows, spread evenly, one row after the other; the weighted dev loss over them)."""
    model = streamed(stored)
    model.set_mode(ExecutionMode.EVALUATION)
    weights = factors(task_weights(stored.config.loss), stored.progress.scales, stored.config.loss.constant_floor)
    loss = evaluate(model, stream, stored.config.loss, weights, max_rows=VERIFY_ROWS, batch_size=8).total
    outputs: dict[str, list[torch.Tensor]] = {}
    for batch in stream.in_order(8, max_rows=VERIFY_ROWS):
        for name, value in tensors_of(forward(model, batch.to("cpu", torch.float32))).items():
            rows = value.flatten(0, -2) if value.dim() > 2 else value  # texts differ in length
            outputs.setdefault(name, []).append(rows)
    return {name: torch.cat(values) for name, values in outputs.items()}, loss
