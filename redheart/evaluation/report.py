"""What was learned, to look at: one record of sections, from which the terminal's tables, `report.md` and `report.html` are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redheart.causality.synergy import Informing
from redheart.console import table
from redheart.data.stream import SampleStream
from redheart.evaluation.answers import Answers, collect
from redheart.evaluation.baselines import Predict, answered, baselines, judged, look_up
from redheart.evaluation.calibration import uncalibrated
from redheart.evaluation.causes import LEAST, Causes
from redheart.evaluation.causes import picture as draw
from redheart.evaluation.evaluate import METRICS, Evaluation, forward, predict_all
from redheart.evaluation.examples import Example
from redheart.evaluation.intervals import COLUMNS as INTERVAL_COLUMNS
from redheart.evaluation.intervals import Measured, measured
from redheart.evaluation.page import Picture, Section, to_html, to_markdown
from redheart.evaluation.reliability import BINNED, Reliability
from redheart.evaluation.reliability import COLUMNS as RELIABILITY_COLUMNS
from redheart.evaluation.reliability import picture as draw_reliability
from redheart.evaluation.trained import LabelCounts, counted
from redheart.evaluation.verdict import Verdict, judge
from redheart.files import write_text
from redheart.model.redheart import RedHeartModel
from redheart.owned import make_directory
from redheart.schema import JUDGED_ORIGINS
from redheart.tasks import TASKS

COLUMNS = ("answer", "labels by", "texts", "metric", "Red Heart", "linear", "look-up", "constant")
LOSS_COLUMNS = (
    "loss on the fixed dev rows",
    "training labels",
    "before training",
    "checkpoint judged",
    "constant predictor",
)
CAUSE_COLUMNS = ("kind", "what tells", "bits")
LABEL_COLUMNS = ("kind", "what tells", "bits of the labels", "bits of the predictions")
FITTED = {"linear": "linear", "constant": "constant/mse"}  # what the verdict calls them
TUNED_ON = {False: "dev", True: "the other half of dev"}
ARROW = {"mae": "↓", "tuned_f1": "↑", "macro_f1": "↑", "accuracy": "↑", "pearson": "↑"}  # which way is better


@dataclass(frozen=True)
class Line:
    """One metric of one task, beside the baselines; `judged` is False where no person made the labels."""

    task: str
    origin: str
    judged: bool
    count: int  # texts with a label
    metric: str
    model: float
    linear: float | None
    constant: float | None  # the best one for this metric
    look_up: float | None = None  # of SURD: by the level of the predicted regret


def compare(
    result: Evaluation,
    model: RedHeartModel,
    train: SampleStream | None,
    dev: SampleStream,
    held_out: SampleStream,
    scored: tuple[Mapping[str, Answers], Mapping[str, Answers]],
    judged_answers: Mapping[str, Answers],
    judged_on: SampleStream,
) -> tuple[list[Line], list[Measured], Verdict]:
    """The lines of the report, labels of people first, and metrics with intervals. `tuned_f1`: macro-F1 with the thresholds of
    answers.cuts, for every side; the network's own from what it `scored` on dev and on the held-out split (calibration.score_split).
    The verdict is on `judged_answers`: what it says on `judged_on`, calibrated. Without rows to train them on there are no baselines."""
    predict = lambda batch: predict_all(forward(model, batch.to("cpu", torch.float32)))  # noqa: E731
    fitted = baselines(train) if train else {}
    others: dict[str, Predict] = {**fitted}
    if train and "regret" in {row[0] for row in result.metrics} and (table_ := look_up(train, predict)):
        others["look_up"] = table_
    metrics = judged(others, held_out)
    lines = []
    final = [row for row in result.metrics if TASKS[row[0]].final]
    for row in sorted(final, key=lambda r: (r[1] not in JUDGED_ORIGINS, list(TASKS).index(r[0]))):
        for metric in METRICS[TASKS[row[0]].kind]:
            if metric not in result.metrics[row]:
                continue
            values = [metrics.get(k, {}).get(row, {}).get(metric) for k in ("linear", f"constant/{metric}", "look_up")]
            summary = result.metrics[row]
            lines.append(Line(*row, row[1] in JUDGED_ORIGINS, int(summary["rows"]), metric, summary[metric], *values))
    linear, constant = (
        (collect(fitted[side], dev, finite=False), answered(fitted[side], held_out)) if fitted else ({}, {})
        for side in ("linear", "constant/macro_f1")
    )
    on_dev, on_held_out = ({name: uncalibrated(name, given) for name, given in side.items()} for side in scored)
    found = measured((on_dev, on_held_out), constant, linear, tuned_on_itself(held_out))
    for one in found:
        if one.metric == "macro_f1":
            f1 = (side and side.value for side in (one.linear, one.constant))
            lines.insert(0, Line(one.task, "people", True, one.rows, "tuned_f1", one.model.value, *f1))
    said = {b: answered(fitted[side], judged_on) for b, side in FITTED.items() if side in fitted}
    return lines, found, judge(judged_answers, said)


def tuned_on_itself(held_out: SampleStream) -> bool:
    """Whether the rows that are judged are those that thresholds are chosen on."""
    return held_out.split == "dev"


def cells(line: Line) -> list[str]:
    show = lambda v: "–" if v is None else f"{v:.3f}"  # noqa: E731
    metric = f"{line.metric} {ARROW[line.metric]}"
    origin = line.origin if line.judged else f"{line.origin}*"
    return [
        line.task, origin, str(line.count), metric, show(line.model), show(line.linear), show(line.look_up),
        show(line.constant),
    ]  # fmt: skip


FOOTNOTE = (
    "* not labelled by people: agreement with labels that a language model or a formula gave, no measure of truth."
)


@dataclass(frozen=True)
class Report:
    """Everything there is to say about one checkpoint on one split. `dev_losses` rows: task, before, at the checkpoint, constant; None
    where that is a figure of other rows."""

    title: str
    facts: Mapping[str, object]
    split: str
    evaluation: Evaluation
    lines: list[Line]
    measured: list[Measured]
    verdict: Verdict
    dev_losses: list[tuple[str, float | None, float, float | None]]
    causes: Causes | None  # what informs regret; None where there are too few texts
    reliability: list[Reliability]
    calibrated_by: str  # which rows the calibration was fitted on
    wrong: list[Example]  # the largest errors
    confusion: tuple[tuple[str, ...], np.ndarray] | None  # of emotions: entries, and texts [true, said] (confusion)
    untrained: list[str] | None = None  # answers, or answers' entries, that no label trained; None: not known
    label_counts: LabelCounts = field(default_factory=dict)  # what trained the others
    shows_untrained: bool = False  # they are in the figures, and marked; else no figure is of them
    notes: Sequence[str] = ()  # which rows stand in for others, or are missing

    def footnote(self) -> str:
        """What the tables need to be read right."""
        lines = [FOOTNOTE, *self.notes]
        if self.untrained is None:
            lines.append("Which answers were trained is not known: an earlier version made this checkpoint.")
        elif self.untrained:
            lines.append(f"No label trained these answers, and they mean nothing: {', '.join(self.untrained)}.")
        return "\n".join(lines)

    def _marked(self, rows: Iterable[Sequence[str]]) -> list[list[str]]:
        """Rows of a table that begin with an answer, with those marked that no label trained."""
        silent = self.untrained if self.untrained and self.shows_untrained else []
        marks = {name.partition(".")[0]: "partly trained" for name in silent} | dict.fromkeys(silent, "not trained")
        return [[f"{name} ({marks[name]})" if name in marks else name, *rest] for name, *rest in rows]

    def terminal_tables(self) -> list[Any]:
        sections = (self._losses(), self._lines(), self._calibration(), *self._causes())
        return [table(one.title, one.columns, one.rows) for one in sections if one.rows]

    def to_json(self) -> dict[str, Any]:
        result = self.evaluation
        losses = {n: {"before": b, "after": a, "constant": c} for n, b, a, c in self.dev_losses}
        return {
            "split": self.split, "checkpoint": self.facts["checkpoint"], "thresholds_chosen_on": TUNED_ON[self.split == "dev"],
            "untrained": self.untrained, "label_counts": self.label_counts,
            "rows": result.rows, "total_loss": result.total, "losses": result.losses,
            "dev_losses": losses, "lines": [asdict(x) for x in self.lines],
            "verdict": self.verdict.to_json(), "intervals": [one.to_json() for one in self.measured],
            "calibration": {
                "fitted_on": self.calibrated_by, "bins": BINNED, "answers": {one.task: one.to_json() for one in self.reliability},
            },
            "causes_of_regret": None if self.causes is None else self.causes.to_json(),
        }  # fmt: skip

    def sections(self, curves: Picture | None = None) -> list[Section]:
        """The whole record, the verdict first."""
        facts = [(name, str(value)) for name, value in self.facts.items()]
        sections = [
            Section("Verdict", [f"{line[0].upper()}{line[1:]}." for line in self.verdict.lines()]),
            self._measured(),
            replace(self._losses(), picture=curves),
            replace(self._lines(), notes=[*self.footnote().splitlines(), *self._meanings()]),
            self._calibration(),
            self._confusion(),
            self._wrong(),
            *self._causes(),
            Section("This checkpoint", columns=("", ""), rows=facts),
        ]
        return [one for one in sections if one.rows or one.first]

    def write(self, path: Path, curves: Picture | None, more: Sequence[Section]) -> None:
        """`path` (markdown), with its pictures beside it, and the same as one page, its name with .html."""
        make_directory(path.parent, "--report")  # before the pictures
        sections = [*self.sections(curves), *more]
        write_text(path, to_markdown(self.title, sections, path.parent))
        write_text(path.with_suffix(".html"), to_html(self.title, sections))

    def _measured(self) -> Section:
        notes = [
            "In brackets the 95 % interval of a bootstrap over the rows, paired where it is of a difference. macro_f1: with the threshold "
            f"of every entry chosen on {TUNED_ON[self.split == 'dev']}; pearson: of a constant it is 0. Labels of people alone."
        ]
        rows = self._marked(one.cells() for one in self.measured)
        return Section(
            f"{self.split.capitalize()} split: how well, and how sure that is", (), INTERVAL_COLUMNS, rows, notes
        )

    def _losses(self) -> Section:
        number = lambda name: counted(self.label_counts, TASKS[name].label) or "not counted"  # noqa: E731
        figure = lambda v: "–" if v is None else f"{v:.4f}"  # noqa: E731
        rows = [[name, number(name), *map(figure, values)] for name, *values in self.dev_losses]
        return Section("What was learned", (), LOSS_COLUMNS, self._marked(rows))

    def _lines(self) -> Section:
        rows = self._marked(map(cells, self.lines))
        return Section(f"{self.split.capitalize()} split, {self.evaluation.rows} samples", (), COLUMNS, rows)

    def _meanings(self) -> list[str]:
        return [
            "linear: ridge or logistic regression on the mean-pooled features of the same encoder, fitted on the same labels. "
            "constant: what is best for the metric if one says the same of every text: the training median, the majority, always yes; of "
            "two texts, neither. "
            f"tuned_f1: macro-F1 with the threshold of every entry chosen on {TUNED_ON[self.split == 'dev']}. look-up: the mean label "
            "of training texts by the level of the predicted regret."
        ]

    def _calibration(self) -> Section:
        notes = [
            f"As the network gives them and calibrated ({self.calibrated_by}). ECE: expected calibration error, {BINNED}; of ratings "
            "and strengths in the label's units, as their Brier score is the mean squared error."
        ]
        rows = self._marked(one.cells() for one in self.reliability)
        drawn = draw_reliability(self.reliability) if rows else None
        return Section(f"Calibration ({self.calibrated_by})", (), RELIABILITY_COLUMNS, rows, notes, drawn)

    def _confusion(self) -> Section:
        if self.confusion is None:
            return Section("")
        names, counts = self.confusion
        rows = [
            (f"{name} ({total})", *(f"{n / total:.0%}" for n in of))
            for name, of in zip(names, counts.tolist(), strict=True)
            if (total := sum(of))
        ]
        notes = [
            "Of the texts that people say show the emotion on the left, how many have the one above as the network's strongest."
        ]
        return Section("Which emotion is taken for which", (), ("labelled", *names), rows, notes)

    def _wrong(self) -> Section:
        rows = [(e.text, e.answer, f"{e.label:.2f}", f"{e.said:.2f}") for e in self.wrong]
        return Section("Where it is most wrong", (), ("text", "answer", "label", "said"), rows)

    def _causes(self) -> list[Section]:
        title = "What informs the predicted regret"
        if self.causes is None:
            said = (
                f"Nothing can be said: it takes {LEAST} texts, and trained answers on regret and on emotion or bentham."
            )
            return [Section(title, [said])]
        told = self.causes.predicted
        rows = [(kind, agents, _bits(told, kind, agents, bits)) for kind, agents, bits in told.rows()]
        drawn = draw(told) if rows else None
        open_ = f"{told.leak:.0%} stays open"
        sections = [
            Section(f"{title} (SURD, {open_})", [_left_open(told, "predicted")], CAUSE_COLUMNS, rows, (), drawn)
        ]
        if (of := self.causes.labelled) is None or (beside := self.causes.beside) is None:
            return sections
        *names, last = ("regret", *self.causes.agents)
        return [
            *sections,
            Section(
                f"What informs the labelled regret ({of.leak:.0%} stays open; {self.causes.texts:,} texts on which people labelled "
                f"{', '.join(names)} and {last})",
                [_left_open(of, "labelled"), _left_open(beside, "predicted")],
                LABEL_COLUMNS,
                [(k, a, _bits(of, k, a, bits), _bits(beside, k, a, other)) for k, a, bits, other in self.causes.rows()],
            ),
        ]


def _left_open(told: Informing, which: str) -> str:
    """What is not told comes first."""
    if not told.mutual_information:
        return f"Of the {which} regret the others say nothing beyond chance."
    low, high = told.intervals["", ""]
    return (
        f"{told.leak:.0%} of the {which} regret stays open; the others tell {told.mutual_information:.3f} "
        f"[{low:.3f}, {high:.3f}] bits of it."
    )


def _bits(told: Informing, kind: str, agents: str, bits: float) -> str:
    if not bits:
        return "–"  # not above chance
    low, high = told.intervals[kind, agents]
    return f"{bits:.3f} [{low:.3f}, {high:.3f}]"
