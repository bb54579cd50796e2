"""What was learned, to look at: a table beside the baselines, `report.md`, and the learning curve as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from redheart.causality.synergy import Informing
from redheart.console import table
from redheart.data.stream import SampleStream
from redheart.evaluation.answers import Answers, collect, tuned_macro_f1
from redheart.evaluation.baselines import Predict, baselines, judged, look_up
from redheart.evaluation.calibration import uncalibrated
from redheart.evaluation.causes import draw
from redheart.evaluation.curves import learning_curve
from redheart.evaluation.evaluate import Evaluation, Row, forward, predict_all
from redheart.evaluation.reliability import BINNED, DIAGRAM, Reliability
from redheart.evaluation.reliability import COLUMNS as RELIABILITY_COLUMNS
from redheart.evaluation.reliability import draw as draw_reliability
from redheart.evaluation.verdict import Verdict, judge
from redheart.files import write_text
from redheart.model.redheart import RedHeartModel
from redheart.schema import JUDGED_ORIGINS
from redheart.tasks import TASKS

COLUMNS = ("answer", "labels by", "texts", "metric", "Red Heart", "linear", "look-up", "constant")
LOSS_COLUMNS = ("loss on the fixed dev rows", "before training", "checkpoint judged", "constant predictor")
CAUSE_COLUMNS = ("kind", "what tells", "bits")
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
    train: SampleStream,
    dev: SampleStream,
    held_out: SampleStream,
    scored: tuple[Mapping[str, Answers], Mapping[str, Answers]],
    judged_answers: Mapping[str, Answers],
) -> tuple[list[Line], Verdict]:
    """The lines of the report: labels of people first. `tuned_f1`: macro-F1 with the thresholds of answers.cuts, for every side;
    the network's own from what it `scored` on dev and on the held-out split (calibration.score_split). The verdict is on
    `judged_answers`: what it says there, calibrated."""
    predict = lambda batch: predict_all(forward(model, batch.to("cpu", torch.float32)))  # noqa: E731
    others: dict[str, Predict] = {**baselines(train)}
    if "regret" in {row[0] for row in result.metrics} and (table_ := look_up(train, predict)):
        others["look_up"] = table_
    metrics = judged(others, held_out)
    lines = []
    final = [row for row in result.metrics if TASKS[row[0]].final]
    for row in sorted(final, key=lambda r: (r[1] not in JUDGED_ORIGINS, list(TASKS).index(r[0]))):
        for metric in _metrics_of(row, result):
            values = [metrics.get(k, {}).get(row, {}).get(metric) for k in ("linear", f"constant/{metric}", "look_up")]
            summary = result.metrics[row]
            lines.append(Line(*row, row[1] in JUDGED_ORIGINS, int(summary["rows"]), metric, summary[metric], *values))
    network = [{name: uncalibrated(name, given) for name, given in side.items()} for side in scored]
    linear, constant = (
        [collect(side, split) for split in (dev, held_out)] for side in (others["linear"], others["constant/macro_f1"])
    )
    for name, answers in network[1].items():
        has_label = ((answers.target > 0.5) & answers.known).any()
        if TASKS[name].kind != "multilabel" or name not in network[0] or not has_label:
            continue
        ours, regression, all_ = (
            tuned_macro_f1(side[0][name], side[1][name], tuned_on_itself(held_out))
            for side in (network, linear, constant)
        )
        lines.insert(0, Line(name, "people", True, len(answers.target), "tuned_f1", ours, regression, all_))
    return lines, judge(judged_answers, {"linear": linear[1], "constant": collect(others["constant/mse"], held_out)})


def tuned_on_itself(held_out: SampleStream) -> bool:
    """Whether the rows that are judged are those that thresholds are chosen on."""
    return held_out.split == "dev"


def _metrics_of(row: Row, result: Evaluation) -> list[str]:
    kind = TASKS[row[0]].kind
    names = {"multilabel": ("macro_f1", "mae"), "binary": ("accuracy",), "score": ("mae", "pearson")}[kind]
    return [m for m in names if m in result.metrics[row]]


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
    """Everything there is to say about one checkpoint on one split. `dev_losses` rows: task, before, at the checkpoint, constant."""

    title: str
    facts: Mapping[str, object]
    split: str
    evaluation: Evaluation
    lines: list[Line]
    dev_losses: list[tuple[str, float, float, float]]
    causes: Informing | None  # what informs the predicted regret; None where there are too few texts
    reliability: list[Reliability]
    calibrated_by: str  # which rows the calibration was fitted on
    verdict: Verdict
    untrained: list[str] | None = None  # answers, or answers' entries, that no label trained; None: not known

    def without_untrained(self) -> Report:
        """The same without the lines, losses and causes of answers that no label trained; they stay named."""
        gone = set(self.untrained or ())
        losses = {name: v for name, v in self.evaluation.losses.items() if TASKS[name].label not in gone}
        return replace(
            self,
            evaluation=replace(self.evaluation, losses=losses),
            lines=[line for line in self.lines if line.task not in gone],
            dev_losses=[row for row in self.dev_losses if row[0] not in gone],
            reliability=[one for one in self.reliability if one.task not in gone],
            causes=None if gone & {"regret", "emotion", "bentham"} else self.causes,
        )

    def footnote(self) -> str:
        """What the tables need to be read right."""
        if self.untrained is None:
            return FOOTNOTE + "\nWhich answers were trained is not known: an earlier version made this checkpoint."
        if not self.untrained:
            return FOOTNOTE
        return f"{FOOTNOTE}\nNo label trained these answers, and they mean nothing: {', '.join(self.untrained)}."

    def terminal_tables(self) -> list[Any]:
        title = f"{self.split} split, {self.evaluation.rows} samples"
        tables = [
            table("what was learned", LOSS_COLUMNS, self._loss_cells()),
            table(title, COLUMNS, self._line_cells()),
        ]
        if self.reliability:
            rows = [one.cells() for one in self.reliability]
            tables.append(table(f"calibration ({self.calibrated_by})", RELIABILITY_COLUMNS, rows))
        if self.causes is not None:
            tables.append(table(self._causes_title(), CAUSE_COLUMNS, self._cause_cells()))
        return tables

    def to_json(self) -> dict[str, Any]:
        result = self.evaluation
        losses = {n: {"before": b, "after": a, "constant": c} for n, b, a, c in self.dev_losses}
        return {
            "split": self.split, "checkpoint": self.facts["checkpoint"], "thresholds_chosen_on": TUNED_ON[self.split == "dev"],
            "untrained": self.untrained, "rows": result.rows, "total_loss": result.total, "losses": result.losses,
            "verdict": self.verdict.to_json(), "dev_losses": losses, "lines": [asdict(x) for x in self.lines],
            "calibration": {
                "fitted_on": self.calibrated_by, "bins": BINNED, "answers": {one.task: one.to_json() for one in self.reliability},
            },
            "causes_of_regret": None if self.causes is None else {
                "shares": self.causes.shares(), "bits": self.causes.mutual_information, "leak": self.causes.leak,
                "terms": [{"kind": k, "agents": a, "bits": v} for k, a, v in self.causes.rows()],
            },
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """`path` (markdown), with its pictures beside it; the learning curve where the run has TensorBoard events."""
        curve = learning_curve(path.parent)
        text = [f"# {self.title}", "", *(f"- {line}" for line in self.verdict.lines()), ""]
        text += [*(f"- {k}: {v}" for k, v in self.facts.items()), ""]
        text += [*_markdown(LOSS_COLUMNS, self._loss_cells()), "", f"## {self.split} split", ""]
        text += [*_markdown(COLUMNS, self._line_cells()), "", self.footnote(), ""]
        text += [
            "linear: ridge or logistic regression on the mean-pooled features of the same encoder, fitted on the same labels.",
            "constant: what is best for the metric if one says the same of every text: the training median, the majority, always yes; of "
            "two texts, neither. "
            f"tuned_f1: macro-F1 with the threshold of every entry chosen on {TUNED_ON[self.split == 'dev']}. look-up: the mean label "
            "of training texts by the level of the predicted regret.",
        ]
        if self.reliability:
            text += ["", "## How far answers can be taken at their word", ""]
            text += [*_markdown(RELIABILITY_COLUMNS, [one.cells() for one in self.reliability]), ""]
            text += [
                f"As the network gives them and calibrated ({self.calibrated_by}). ECE: expected calibration error, {BINNED}; of ratings "
                "and strengths in the label's units, as their Brier score is the mean squared error.",
                "",
                f"![mean label over mean prediction]({DIAGRAM})",
            ]
            draw_reliability(self.reliability, path.parent / DIAGRAM)
        if self.causes is not None:
            text += ["", f"## {self._causes_title()}", "", *_markdown(CAUSE_COLUMNS, self._cause_cells()), ""]
            draw(self.causes, path.parent / "causes_of_regret.png")
            text += ["![what informs regret](causes_of_regret.png)"]
        if curve:
            text += ["", f"![losses over the steps]({curve.name})"]
        write_text(path, "\n".join(text) + "\n")

    def _causes_title(self) -> str:
        assert self.causes is not None
        return f"what informs the predicted regret (SURD, {self.causes.mutual_information:.3f} bits, {self.causes.leak:.0%} stays open)"

    def _cause_cells(self) -> list[list[str]]:
        assert self.causes is not None
        return [[kind, agents, f"{bits:.4f}"] for kind, agents, bits in self.causes.rows()]

    def _line_cells(self) -> list[list[str]]:
        marked = {name: f"{name} (not trained)" for name in self.untrained or ()}
        return [[marked.get(task, task), *rest] for task, *rest in map(cells, self.lines)]

    def _loss_cells(self) -> list[list[str]]:
        return [[name, *(f"{v:.4f}" for v in values)] for name, *values in self.dev_losses]


def _markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(columns)
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *("| " + " | ".join(r) + " |" for r in rows)]
