"""Evaluates a checkpoint on a held-out split beside the baselines, and writes the report into its run directory."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from redheart.console import console
from redheart.data.card import cut_texts
from redheart.data.stream import SampleStream
from redheart.device import device_of
from redheart.evaluation.answers import Answers, left_out
from redheart.evaluation.calibration import Calibration, Line, dev_digest, fit, score_split
from redheart.evaluation.causes import causes_of_regret
from redheart.evaluation.curves import learning_curves, scalars
from redheart.evaluation.evaluate import evaluate
from redheart.evaluation.examples import confusion, worst
from redheart.evaluation.reliability import calibrated, reliability
from redheart.evaluation.report import Report, compare, tuned_on_itself
from redheart.evaluation.rows import Rows, beside
from redheart.evaluation.trained import trained_entries, untrained_names
from redheart.losses.combine import factors
from redheart.memory.swap import place
from redheart.metrics import MIN_TEXTS
from redheart.model.redheart import parameter_counts
from redheart.owned import check_can_make_file
from redheart.schema import EMOTIONS, RedHeartError
from redheart.tasks import TASKS, task_weights
from redheart.train.claim import is_run, own_report
from redheart.train.export import load_model, resolve
from redheart.train.progress import Progress
from redheart.train.resume import check_judged
from redheart.train.told import data_and_commands, how_it_ran


def validate(
    checkpoint: Path,
    data: str | Path | None,
    split: str,
    out: Path | None,
    device: str = "cpu",
    swap: Collection[str] | None = None,
    untrained: bool = False,
) -> tuple[Report, Path | None]:
    """(the report, where it was written, with a page beside it). `data` defaults to what the checkpoint was trained on, `out` to its run
    directory, `swap` (modules kept off `device` but for their turn) to its memory.swap. Answers that no label trained are left out, or,
    with `untrained`, marked."""
    device_of(device)  # this and the next before anything is loaded
    if out is not None:
        check_can_make_file(out, "--report", "report.md")
        if out.suffix == ".html":
            raise RedHeartError(f"--report {out}: name the .md, and the .html comes beside it")
    directory = resolve(checkpoint)
    model, config, progress, calibration = load_model(directory)
    own, data = data is None, data or progress.data
    trained = trained_entries(progress.labels, config.loss) if progress.labels else None
    silent = None if trained is None else untrained_names(trained)
    of = None if untrained else trained
    held_out = Rows(data, split, config.data.remote, of)
    if not held_out.num_rows:
        raise RedHeartError(f"{data} has no rows in split {split!r}: prepare more samples, or choose another --split")
    check_judged(progress, held_out.index, None if own else data)
    train, dev, own_dev, notes = beside(held_out, data, progress.data, config.data.remote, of)
    weights = factors(task_weights(config.loss), progress.scales, config.loss.constant_floor)
    swapped = place(model, device, config.memory.swap if swap is None else swap)
    result = evaluate(model, held_out, config.loss, weights, device)
    result.check_finite()
    facts = {
        "preset": config.preset,
        "parameters": f"{sum(parameter_counts(model).values()):,}",
        "checkpoint": f"{directory.name} ({progress.step} optimizer steps on {progress.world_size} processes)",
        "samples": f"{train.num_rows if train else 'none'} in training, {held_out.num_rows} in {split}",
        "encoder": f"{held_out.encoder['name']}, hidden layers {held_out.encoder['layers']}",
    }
    if cut := cut_texts(held_out.index):
        facts["texts cut"] = "; ".join(cut)
    rows = config.training.evaluate_rows
    # of these very weights: the last look at dev before a checkpoint was written may be steps older
    now = evaluate(model, dev, config.loss, weights, device, max_rows=rows)
    losses = [_dev_loss(progress, n, v, dev, own_dev) for n, v in now.losses.items() if TASKS[n].final]
    if not any(TASKS[name].final for name in result.losses):
        notes.append(f"Nothing is judged: in split {split}, {data} has labels of no answer that was trained.")
    itself = tuned_on_itself(held_out)
    on_dev = score_split(model, dev, device)
    scored = on_dev, on_dev if itself else score_split(model, held_out, device)
    maps, fitted_on = _maps(calibration, dev, on_dev, itself)
    if few := [entry for name, given in scored[1].items() for entry in left_out(name, given)]:
        notes.append(f"Left out of the mean pearson, with fewer than {MIN_TEXTS} labelled texts: {', '.join(few)}.")
    judged, said = held_out, scored[1]
    if untrained and silent:  # shown, but nothing to be judged by
        judged = Rows(data, split, config.data.remote, trained)
        said = score_split(model, judged, device)
    learned = calibrated(said, maps, itself)
    lines, sure, verdict = compare(result, model, train, dev, held_out, scored, learned, judged)
    causes = causes_of_regret(model, held_out, () if untrained else silent or ())
    reliable = reliability(scored[1], maps, itself)
    title = f"Red Heart: what {config.preset} learned"
    taught = trained["emotion"] if trained else (True,) * len(EMOTIONS)
    confused = confusion("emotion", learned["emotion"], taught) if "emotion" in learned else None
    wrong = worst(learned, held_out)
    report = Report(
        title=title,
        facts=facts,
        split=split,
        evaluation=result,
        lines=lines,
        measured=sure,
        verdict=verdict,
        dev_losses=losses,
        causes=causes,
        reliability=reliable,
        calibrated_by=fitted_on,
        wrong=wrong,
        confusion=confused,
        untrained=silent,
        label_counts=progress.label_counts,
        shows_untrained=untrained,
        notes=notes,
    )
    if swapped.names:
        console.print(str(swapped.report()))
    run = directory.parent.parent if directory.parent.name == "checkpoints" else None
    run = run if run and is_run(run) else None
    if out is None and run:
        own_report(run)
        out = run / "report.md"
    if out is None:
        return report, None
    curves = learning_curves(scalars(run), progress.step) if run else None
    told = [*how_it_ran(run), *data_and_commands(run, directory, data, split, held_out.index, progress)]
    report.write(out, curves, told)
    return report, out


def _dev_loss(
    progress: Progress, name: str, now: float, dev: Rows, own: bool
) -> tuple[str, float | None, float, float | None]:
    """A row of Report.dev_losses. What training kept is of all labels on the run's own dev rows."""
    before = None if dev.has_others(name) else progress.initial_dev_losses.get(name)
    return (name, before, now, progress.scales[name]) if own else (name, None, now, None)


def _maps(
    calibration: Calibration | None, dev: SampleStream, on_dev: dict[str, Answers], itself: bool
) -> tuple[dict[str, tuple[Line, ...]], str]:
    """(what calibrates the answers on the held-out split, in words on which rows it was fitted)."""
    if itself:
        return {}, "each half of dev by what the other half says"
    if calibration is None and not dev.num_rows:
        return {}, "the checkpoint has none, and no dev rows are there to fit one on: as the network says"
    if calibration is None:
        return fit(on_dev), "the checkpoint has none: fitted on dev for this report"
    same = calibration.dev == dev_digest(dev)
    return calibration.answers, f"the checkpoint's own, fitted on {'dev' if same else 'other data than this'}"
