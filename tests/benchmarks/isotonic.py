"""Two numbers an entry (Platt) or a step function (isotonic regression): which calibrates the probabilities of runs better?

    python tests/benchmarks/isotonic.py --out FILE.json RUN [RUN …]

Both are fitted on the dev rows of a run's data, entry by entry, and judged on its test rows: log loss and expected calibration error (15
bins of equal mass), means over the entries with 50 dev labels and five positive ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import log_loss

from redheart.console import console
from redheart.data.stream import SampleStream
from redheart.evaluation.calibration import MIN_ROWS, fit, score_split
from redheart.files import write_json
from redheart.tasks import TASKS
from redheart.train.export import load_model, resolve

FEWEST, BINS = 5, 15
Judged = dict[str, dict[str, float]]  # by way (network, platt, isotonic): {log_loss, ece}


def error(said: np.ndarray, true: np.ndarray) -> float:
    """Expected calibration error over bins of equal mass."""
    parts = np.array_split(np.argsort(said), BINS)
    return float(sum(abs(said[rows].mean() - true[rows].mean()) * len(rows) for rows in parts) / len(said))


def judged(run: Path) -> dict[str, Judged]:
    """By answer."""
    whole = load_model(resolve(run))
    dev, test = (score_split(whole.model, SampleStream(whole.progress.data, split)) for split in ("dev", "test"))
    found: dict[str, Judged] = {}
    for name, lines in fit(dev).items():
        entries: dict[str, list[tuple[float, float]]] = {"network": [], "platt": [], "isotonic": []}
        for entry, line in enumerate(lines):
            (score, target), (given, truth) = (
                (side.prediction[known, entry], side.target[known, entry] > 0.5)
                for side, known in ((side, side.known[:, entry]) for side in (dev[name], test[name]))
            )
            if TASKS[name].judged.calibrated != "logit" or len(target) < MIN_ROWS or target.sum() < FEWEST:
                continue
            steps = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(score, target)
            said = {
                "network": 1 / (1 + np.exp(-given)),
                "platt": 1 / (1 + np.exp(-line.scale * given - line.offset)),
                "isotonic": steps.predict(given),
            }
            for way, p in said.items():
                entries[way].append(
                    (log_loss(truth, np.clip(p, 1e-4, 1 - 1e-4), labels=[False, True]), error(p, truth))
                )
        if entries["platt"]:
            means = {way: np.mean(pairs, 0) for way, pairs in entries.items()}
            found[name] = {
                way: {"log_loss": round(float(a), 4), "ece": round(float(b), 4)} for way, (a, b) in means.items()
            }
            console.print(f"{run.name} {name} ({len(entries['platt'])} entries): {found[name]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("runs", nargs="+", type=Path)
    a = parser.parse_args()
    write_json(a.out, {run.name: judged(run) for run in a.runs})


if __name__ == "__main__":
    main()
