"""From a checkpoint to a model that `RedHeartModel.from_pretrained` loads: safetensors, config.json, a model card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from redheart.config import RunConfig, parse_config
from redheart.console import quiet_libraries
from redheart.files import committed_directory, read_json, read_pointer, write_text
from redheart.model.redheart import RedHeartConfig, RedHeartModel, parameter_counts
from redheart.model.select import ExecutionMode
from redheart.owned import check_can_make
from redheart.schema import RedHeartError
from redheart.train.checkpoint import Progress, read_progress, verified
from redheart.train.engine import consolidated_weights

SETTINGS = "redheart.json"  # beside config.json: the run's configuration and where it stood


class Trained(NamedTuple):
    model: RedHeartModel
    config: RunConfig
    progress: Progress


def resolve(path: Path) -> Path:
    """An export, a checkpoint, or a run directory (its best checkpoint) -> the directory that holds the weights."""
    if path.is_file():
        raise RedHeartError(f"checkpoint {path} is a file: name the export, checkpoint or run directory that holds it")
    if not path.is_dir():
        raise RedHeartError(f"checkpoint {path} does not exist")
    if (path / "config.json").is_file():
        return path
    best = read_pointer(path / "checkpoints" / "best") or read_pointer(path / "checkpoints" / "last")
    return verified(best or path)


def load_model(path: Path) -> Trained:
    """The model, in evaluation mode on the CPU in fp32, and where its run stood, from `resolve(path)`."""
    quiet_libraries()
    directory = resolve(path)
    if (directory / "config.json").is_file():
        kept = read_json(directory / SETTINGS, "export the checkpoint again")
        model = RedHeartModel.from_pretrained(directory)
        model.set_mode(ExecutionMode.EVALUATION)
        return Trained(model, parse_config(kept["config"]), Progress(**kept["progress"]))
    progress = read_progress(directory)
    config = parse_config(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")))
    sizes = config.model.model_dump()
    sizes.pop("activation_checkpointing")
    model = RedHeartModel(RedHeartConfig(**sizes, encoder=progress.encoder))
    model.load_state_dict(consolidated_weights(directory))
    model.set_mode(ExecutionMode.EVALUATION)
    return Trained(model, config, progress)


def export(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Writes the export in one step; returns its parameter counts."""
    if out.exists():
        raise RedHeartError(f"{out} exists already: name another --out")
    check_can_make(out, "--out")
    model, config, progress = load_model(checkpoint)
    with committed_directory(out) as temporary:
        model.save_pretrained(temporary)
        write_card(temporary, model, config, progress)
    return parameter_counts(model)


def write_card(directory: Path, model: RedHeartModel, config: RunConfig, progress: Progress) -> None:
    """What an export holds beside weights and config.json: its run's settings, and the model card."""
    kept = {"config": config.model_dump(mode="json"), "progress": asdict(progress)}
    write_text(directory / SETTINGS, json.dumps(kept, indent=2) + "\n")
    write_text(directory / "README.md", _card(model, config, progress.sources))


def _card(model: RedHeartModel, config: RunConfig, sources: dict[str, Any]) -> str:
    counts = parameter_counts(model)
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in counts.items())
    lines = [
        f"- {name}: {facts['licence']}" + (" (not for commercial use)" if facts["non_commercial"] else "")
        for name, facts in sources.items()
    ]
    encoder = model.config.encoder or {}
    return f"""---
library_name: redheart
tags: [emotion, ethics, regret, multi-task]
---
# Red Heart ({config.preset})

Reads token features of the frozen encoder `{encoder.get("name")}` (hidden layers {encoder.get("layers")}) and predicts emotion,
Korean cultural affect (jeong 정, han 한, chemyeon 체면), Bentham's hedonic values, acceptability, regret and SURD shares.

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
