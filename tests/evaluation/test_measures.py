"""What is measured of each answer, against scikit-learn and scipy, and the intervals over seeds."""

import numpy as np
import pytest
from scipy.stats import pearsonr, ttest_1samp
from sklearn.metrics import accuracy_score, f1_score

from redheart.evaluation.ablation import effects
from redheart.evaluation.answers import Answers, cuts, thresholds
from redheart.evaluation.measures import measure, over_seeds, paired
from redheart.schema import EMOTIONS, ETHICS, LABEL_COLUMNS, LABELS, NUM_LABEL_COLUMNS


def made(label: str, seed: int, rows: int = 400, graded: bool = False, gaps: float = 0.0) -> Answers:
    """Predictions in [0, 1] that follow the labels, half noise."""
    rng = np.random.default_rng(seed)
    shape = rows, LABELS[label].size
    target = rng.random(shape) if graded else (rng.random(shape) > 0.6).astype(float)
    known = rng.random(shape) >= gaps
    halves = rng.integers(0, 2, rows)
    return Answers(0.5 * target + 0.5 * rng.random(shape), np.where(known, target, 0.0), known, halves)


def entries(**wanted: list[int] | None) -> np.ndarray:
    """The columns of these labels, or of these entries of them."""
    chosen = np.zeros(NUM_LABEL_COLUMNS, bool)
    for label, numbers in wanted.items():
        columns = np.arange(NUM_LABEL_COLUMNS)[LABEL_COLUMNS[label]]
        chosen[columns if numbers is None else columns[numbers]] = True
    return chosen


def test_emotions_are_judged_by_macro_f1_with_thresholds_from_dev():
    dev, test = made("emotion", 0), made("emotion", 1)
    found = measure({"emotion": dev}, {"emotion": test}, entries(emotion=None), same_rows=False)
    expected = f1_score(test.target > 0.5, test.prediction > thresholds(dev), average="macro")
    assert found == {"emotion": ("macro_f1", pytest.approx(expected))}
    within = measure({"emotion": dev}, {"emotion": dev}, entries(emotion=None), same_rows=True)
    expected = f1_score(dev.target > 0.5, dev.prediction > cuts(dev, dev, True), average="macro")
    assert within["emotion"][1] == pytest.approx(expected)


def test_entries_that_nobody_taught_or_labelled_do_not_count():
    dev, test = made("emotion", 0), made("emotion", 1)
    some = [EMOTIONS.index("joy"), EMOTIONS.index("fear")]
    found = measure({"emotion": dev}, {"emotion": test}, entries(emotion=some), same_rows=False)
    said = (test.prediction > thresholds(dev))[:, some]
    assert found["emotion"][1] == pytest.approx(f1_score(test.target[:, some] > 0.5, said, average="macro"))
    assert measure({}, {}, entries(), same_rows=False) == {}
    alike = Answers(test.prediction, np.ones_like(test.target), test.known, test.halves)
    assert measure({"emotion": dev}, {"emotion": alike}, entries(emotion=None), same_rows=False) == {}
    assert measure({"emotion": dev}, {}, entries(emotion=None), same_rows=False) == {}  # a module is left out


def test_ratings_are_judged_by_their_correlation_each_and_in_the_mean():
    dev, test = made("vad", 0, graded=True), made("vad", 1, graded=True, gaps=0.3)
    found = measure({"vad": dev}, {"vad": test}, entries(vad=None), same_rows=False)
    each = [pearsonr(test.prediction[k, i], test.target[k, i])[0] for i, k in enumerate(test.known.T)]
    assert list(found) == ["vad", "vad.valence", "vad.arousal", "vad.dominance"]
    assert [value for _, value in found.values()] == pytest.approx([np.mean(each), *each])
    assert {metric for metric, _ in found.values()} == {"pearson"}


def test_yes_or_no_is_judged_by_accuracy_and_f1():
    dev, test = made("ethics", 0, gaps=0.4), made("ethics", 1, gaps=0.4)
    found = measure({"ethics": dev}, {"ethics": test}, entries(ethics=[1, 3]), same_rows=False)
    both = test.known[:, [1, 3]]
    pick = lambda x: x[:, [1, 3]][both]  # noqa: E731
    assert found["ethics"] == ("accuracy", pytest.approx(np.mean(pick(test.target) == (pick(test.prediction) > 0.5))))
    for k in (1, 3):
        known = test.known[:, k]
        target, prediction = test.target[known, k], test.prediction[known, k]
        assert found[f"ethics.{ETHICS[k]}"] == ("accuracy", pytest.approx(accuracy_score(target, prediction > 0.5)))
        f1 = f1_score(target, prediction > thresholds(dev)[k])
        assert found[f"ethics.{ETHICS[k]} (F1)"] == ("f1", pytest.approx(f1))
    assert len(found) == 5


def test_pairs_have_no_f1():
    dev, test = made("preference", 0), made("preference", 1)
    found = measure({"preference": dev}, {"preference": test}, entries(preference=None), same_rows=False)
    assert found == {"preference": ("accuracy", pytest.approx(accuracy_score(test.target, test.prediction > 0.5)))}


def test_pairs_that_name_the_better_text_first_are_measured_too():
    test = made("preference", 1)
    first = {"preference": Answers(test.prediction, np.ones_like(test.target), test.known, test.halves)}
    found = measure(first, first, entries(preference=None), same_rows=False)
    assert found == {"preference": ("accuracy", pytest.approx((test.prediction > 0.5).mean()))}
    removed = {
        "preference": Answers(np.full_like(test.target, 0.5), np.ones_like(test.target), test.known, test.halves)
    }
    (effect,) = effects("parts", "removed", (first, first), (removed, removed))
    assert (effect.whole, effect.without) == (found["preference"][1], 0.5)


def test_intervals_are_students():
    values = [0.61, 0.63, 0.615]
    interval = ttest_1samp(values, 0.0).confidence_interval(0.95)
    expected = {"mean": np.mean(values), "sd": np.std(values, ddof=1), "low": interval.low, "high": interval.high}
    assert over_seeds(values) == pytest.approx(expected)
    assert over_seeds([0.5]) == {"mean": 0.5, "sd": None, "low": None, "high": None}


def test_differences_are_of_the_same_seed():
    ours, theirs = [{"emotion": 0.6, "vad": 0.5}, {"emotion": 0.8, "vad": 0.1}], [{"emotion": 0.5}, {"emotion": 0.9}]
    assert dict(paired(ours, theirs)) == {"emotion": pytest.approx([0.1, -0.1])}
