"""From a checkpoint to a model that `RedHeartModel.from_pretrained` loads: safetensors, config.json, a model card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from redheart.config import RunConfig, parse_config, read_config
from redheart.console import console, quiet_libraries
from redheart.device import tell_deepspeed
from redheart.evaluation.calibration import Calibration, check_belongs
from redheart.evaluation.calibration import read as read_calibration
from redheart.evaluation.calibration import write as write_calibration
from redheart.evaluation.evaluate import predict_all
from redheart.evaluation.trained import counted, trained_entries, trained_names
from redheart.files import committed_directory, read_json, write_text
from redheart.model.build import model_config
from redheart.model.loading import refuse_not_finite, refuse_other_tensors, shapes_of, verify_export
from redheart.model.redheart import RedHeartModel, parameter_counts
from redheart.model.select import ExecutionMode
from redheart.owned import check_new
from redheart.schema import RedHeartError
from redheart.train import checkpoint
from redheart.train.checkpoint import read_progress
from redheart.train.engine import consolidated_weights
from redheart.train.progress import Progress, parse_progress

AGAIN = "export the checkpoint again"
SETTINGS = "redheart.json"  # beside config.json: the run's configuration and where it stood


class Trained(NamedTuple):
    model: RedHeartModel
    config: RunConfig
    progress: Progress
    calibration: Calibration | None = None  # None where it has none, or was not read


def resolve(path: Path) -> Path:
    """An export, a checkpoint, or a run directory (its best checkpoint) -> the directory that holds the weights."""
    if path.is_file():
        raise RedHeartError(f"checkpoint {path} is a file: name the export, checkpoint or run directory that holds it")
    if not path.is_dir():
        raise RedHeartError(f"checkpoint {path} does not exist")
    if (path / "config.json").is_file():
        return path
    directory = checkpoint.best(path)
    if directory is None and (directory := checkpoint.last(path)) is not None:
        console.print(
            f"{path} has nothing on dev that says which checkpoint is the best: reading the last, {directory.name}",
            markup=False,
        )
    return checkpoint.verified(directory or path)


def load_model(path: Path) -> Trained:
    """The model, in evaluation mode on the CPU in fp32, where its run stood, and its calibration, from `resolve(path)`."""
    directory = resolve(path)
    loaded = load_weights(directory)
    calibration = read_calibration(directory)
    if calibration is not None:
        check_belongs(calibration, loaded.model, directory)
    return loaded._replace(calibration=calibration)


RedHeartModel.read_run = staticmethod(lambda path: load_model(path).model)  # what the room of the model may not know


def load_weights(directory: Path) -> Trained:
    """The same without its calibration, from an export or a checkpoint."""
    quiet_libraries()
    if (directory / "config.json").is_file():
        verify_export(directory)
        config, progress = read_settings(directory)
        read_json(directory / "config.json", AGAIN)  # Transformers names no file that nests too deep
        try:
            model = RedHeartModel.from_pretrained(directory)
        except (
            OSError,
            ValueError,
            AttributeError,
        ) as error:  # no weights, or a dtype that torch lacks, in words of Transformers
            raise RedHeartError(f"{directory} is no whole export ({' '.join(str(error).split())}): {AGAIN}") from None
        model.set_mode(ExecutionMode.EVALUATION)
        return Trained(model, config, progress)
    progress = read_progress(directory)
    config = read_config(directory / "config.yaml", "choose another checkpoint")
    model = RedHeartModel(model_config(config, progress.encoder))
    weights = consolidated_weights(directory)
    refuse_other_tensors(directory, shapes_of(model.state_dict()), shapes_of(weights))
    model.load_state_dict(weights)
    model.set_mode(ExecutionMode.EVALUATION)
    return Trained(model, config, progress)


def read_settings(directory: Path) -> tuple[RunConfig, Progress]:
    """What an export says of its run, from redheart.json."""
    path = directory / SETTINGS
    kept = read_json(path, AGAIN)
    if not isinstance(kept, dict) or kept.keys() != {"config", "progress"}:
        raise RedHeartError(f"{path} must hold config and progress: {AGAIN}")
    try:
        config = parse_config(kept["config"])
    except RedHeartError as error:
        raise RedHeartError(f"{path}: {error}: {AGAIN}") from None
    return config, parse_progress(kept["progress"], path)


def export(path: Path, out: Path) -> dict[str, Any]:
    """Writes the export in one step; returns its parameter counts."""
    check_new(out)
    model, config, progress, calibration = load_model(path)
    check_speaks(model, path)
    tell_deepspeed()  # Transformers imports it where it saves
    with committed_directory(out) as temporary:
        model.save_pretrained(temporary)
        if calibration is not None:
            write_calibration(calibration, temporary)
        write_card(temporary, model, config, progress)
    return parameter_counts(model)


def check_speaks(model: RedHeartModel, path: Path) -> None:
    """Raises RedHeartError where weights, or answers on features drawn at random, are not finite."""
    for name, tensor in model.state_dict().items():
        refuse_not_finite(path, name, tensor)
    drawn = torch.randn(2, 4, model.config.encoder_width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        answers = predict_all(model(drawn))
    for name, answer in answers.items():
        refuse_not_finite(path, f"answer {name}", answer)


def write_card(directory: Path, model: RedHeartModel, config: RunConfig, progress: Progress) -> None:
    """What an export holds beside weights and config.json: its run's settings, and the model card."""
    kept = {"config": config.model_dump(mode="json"), "progress": asdict(progress)}
    write_text(directory / SETTINGS, json.dumps(kept, indent=2) + "\n")
    write_text(directory / "README.md", _card(model, config, progress))


def _card(model: RedHeartModel, config: RunConfig, progress: Progress) -> str:
    counts = parameter_counts(model)
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in counts.items())
    lines = [
        f"- {name}: {facts['licence']}" + (" (not for commercial use)" if facts["non_commercial"] else "")
        for name, facts in progress.sources.items()
    ]
    encoder = model.config.encoder or {}
    answers = "- not known: an earlier version trained it"
    if progress.labels:
        names = {
            n: counted(progress.label_counts, n) for n in trained_names(trained_entries(progress.labels, config.loss))
        }
        answers = "\n".join(f"- {name}" + (f": {count} labels" if count else "") for name, count in names.items())
    return f"""---
library_name: redheart
tags: [emotion, ethics, regret, multi-task]
---
# Red Heart ({config.preset})

Reads token features of the frozen encoder `{encoder.get("name")}` (hidden layers {encoder.get("layers")}). Labels trained these answers,
and no others mean anything:

{answers}

| module | parameters |
|---|---|
{rows}
| **total** | **{sum(counts.values()):,}** |

Training data and licences:

{chr(10).join(lines)}

```python
from redheart import RedHeartPipeline
RedHeartPipeline.from_pretrained("PATH")("I promised to call and forgot.")
```
"""
