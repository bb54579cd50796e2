"""Evaluates a checkpoint on a held-out split beside the baselines, and writes the report into its run directory."""

from __future__ import annotations

from pathlib import Path

from redheart.data.stream import SampleStream
from redheart.evaluation.evaluate import Evaluation, evaluate
from redheart.evaluation.report import Line, compare, write_report
from redheart.losses.combine import factors
from redheart.model.redheart import parameter_counts
from redheart.schema import RedHeartError
from redheart.tasks import task_weights
from redheart.train.export import load_model, resolve, trained_on


def validate(
    checkpoint: Path, data: Path | None, split: str, report: Path | None
) -> tuple[Evaluation, list[Line], Path | None]:
    """(evaluation, lines beside the baselines, where report.md was written)."""
    directory = resolve(checkpoint)
    model, config, scales = load_model(directory)
    data = data or Path(trained_on(directory))
    train, held_out = SampleStream(data, "train"), SampleStream(data, split)
    if not held_out.num_rows:
        raise RedHeartError(f"{data} has no rows in split {split!r}: prepare more samples, or choose another --split")
    if held_out.encoder != model.config.encoder:
        raise RedHeartError(
            f"{data} was encoded by {held_out.encoder}, but {directory} was trained on {model.config.encoder}"
        )
    result = evaluate(
        model, held_out, config.loss, factors(task_weights(config.loss), scales, config.loss.constant_floor)
    )
    lines = compare(result, train, held_out)
    run = directory.parent.parent
    if report is None and (run / "config.yaml").is_file():
        report = run / "report.md"
    if report is not None:
        facts = {
            "preset": config.preset,
            "parameters": f"{sum(parameter_counts(model).values()):,}",
            "checkpoint": directory.name,
            "split": f"{split}, {held_out.num_rows} samples (training: {train.num_rows})",
            "encoder": f"{held_out.encoder['name']}, hidden layers {held_out.encoder['layers']}",
        }
        write_report(report, f"Red Heart: what {config.preset} learned", result, lines, facts)
    return result, lines, report
