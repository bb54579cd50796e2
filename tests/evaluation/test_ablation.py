"""The ablation's arithmetic against scikit-learn and scipy, and its verdicts on known effects."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import pearsonr, ttest_1samp
from sklearn.metrics import accuracy_score, f1_score

from redheart.evaluation.ablation import Effect, effects, over_seeds
from redheart.evaluation.answers import Answers, cuts, metric, sums, thresholds, tuned_macro_f1
from redheart.evaluation.intervals import measured

RNG = np.random.default_rng(0)


def made(quality: float, rows: int = 600, size: int = 7) -> Answers:
    """Predictions that follow binary labels with weight `quality`, the rest noise."""
    target = (np.random.default_rng(1).random((rows, size)) > 0.6).astype(float)
    prediction = quality * target + (1 - quality) * np.random.default_rng(2).random((rows, size))
    return Answers(prediction, target, np.ones((rows, size), bool))


def test_metrics_are_those_of_the_libraries():
    given = made(0.5)
    cut = np.full(7, 0.5)
    ours = metric("multilabel", sums("multilabel", given, cut).sum(0))
    assert ours == pytest.approx(f1_score(given.target > 0.5, given.prediction > 0.5, average="macro"))
    one = made(0.4, size=1)
    assert metric("binary", sums("binary", one, None).sum(0)) == pytest.approx(
        accuracy_score(one.target > 0.5, one.prediction > 0.5)
    )
    r = np.mean([pearsonr(given.prediction[:, k], given.target[:, k])[0] for k in range(7)])
    assert metric("score", sums("score", given, None).sum(0)) == pytest.approx(r, rel=1e-9)


def test_unlabelled_entries_do_not_count():
    given = made(0.5)
    known = RNG.random(given.known.shape) > 0.3
    noisy = Answers(np.where(known, given.prediction, 9.0), np.where(known, given.target, 1.0), known)
    r = np.mean([pearsonr(given.prediction[known[:, k], k], given.target[known[:, k], k])[0] for k in range(7)])
    assert metric("score", sums("score", noisy, None).sum(0)) == pytest.approx(r, rel=1e-9)
    never = known.copy()
    never[:, 0] = False
    fewer = Answers(noisy.prediction, noisy.target, never)
    assert metric("score", sums("score", fewer, None).sum(0)) == pytest.approx(
        np.mean([pearsonr(given.prediction[known[:, k], k], given.target[known[:, k], k])[0] for k in range(1, 7)]),
        rel=1e-9,
    )


def test_thresholds_are_the_best_on_dev():
    given = made(0.6)
    best = thresholds(given)
    for k in range(7):
        f1 = lambda t, k=k: f1_score(given.target[:, k] > 0.5, given.prediction[:, k] > t)  # noqa: E731
        assert f1(best[k]) >= max(f1(t) for t in (0.1, 0.3, 0.5, 0.7, 0.9))


def test_tuned_f1_uses_devs_thresholds():
    dev, held_out = made(0.6), made(0.6, rows=300)
    cut = thresholds(dev)
    expected = f1_score(held_out.target > 0.5, held_out.prediction > cut, average="macro")
    assert tuned_macro_f1(dev, held_out) == pytest.approx(expected)


def test_verdicts():
    good, bad = made(0.7), made(0.3)
    whole, without = ({"emotion": good}, {"emotion": good}), ({"emotion": bad}, {"emotion": bad})
    (line,) = effects("heads.emotion", "removed", whole, without)
    assert line.verdict == "helps"
    assert line.low < line.difference < line.high
    assert line.difference == pytest.approx(line.whole - line.without)
    (line,) = effects("heads.emotion", "removed", without, whole)
    assert line.verdict == "hurts"
    (line,) = effects("heads.emotion", "removed", whole, whole)
    assert (line.difference, line.low, line.high, line.verdict) == (0, 0, 0, "–")
    (line,) = effects("heads.emotion", "removed", whole, ({}, {}))  # an answer that is gone is worth nothing
    assert line.without == 0
    assert line.verdict == "helps"


def test_the_interval_is_the_bootstraps():
    given, other = made(0.5, rows=400, size=1), made(0.4, rows=400, size=1)
    (line,) = effects("x", "removed", ({"preference": given},) * 2, ({"preference": other},) * 2, resamples=4000)
    right = ((given.prediction > 0.5) == (given.target > 0.5)).astype(float)[:, 0]
    wrong = ((other.prediction > 0.5) == (other.target > 0.5)).astype(float)[:, 0]
    spread = (right - wrong).std() / np.sqrt(400)
    assert line.high - line.low == pytest.approx(2 * 1.96 * spread, rel=0.08)


def test_on_dev_no_row_has_a_say_in_its_own_threshold():
    """Noise with a rare label: thresholds fitted to the very rows look better than they are; those of the other half do not."""
    rng = np.random.default_rng(3)
    halves = rng.integers(0, 2, 400)
    noise = Answers(rng.random((400, 7)), (rng.random((400, 7)) < 0.1).astype(float), np.ones((400, 7), bool), halves)
    crossed = cuts(noise, noise, same_rows=True)
    for half in (0, 1):
        assert (crossed[halves == half] == thresholds(noise.rows(halves != half))).all()
    changed = Answers(noise.prediction, noise.target.copy(), noise.known, halves)
    changed.target[halves == 0] = 1 - changed.target[halves == 0]
    assert (cuts(changed, changed, True)[halves == 0] == crossed[halves == 0]).all()
    assert tuned_macro_f1(noise, noise, same_rows=True) < tuned_macro_f1(noise, noise)


def test_emotions_that_nobody_has_are_left_out():
    given = made(0.5)
    none = Answers(given.prediction, np.zeros_like(given.target), given.known)
    assert effects("x", "removed", ({"emotion": none},) * 2, ({"emotion": none},) * 2) == []


@pytest.mark.parametrize("rows", [251, 3000, 20_000])
def test_an_answer_that_does_not_vary_has_no_correlation(rows: int):
    """Whatever its value and however many rows: neither as it is, nor in a bootstrap, nor beside one that does."""
    rng = np.random.default_rng(rows)
    target = rng.random((rows, 4))
    follows = Answers(0.3 * target + 0.7 * rng.random((rows, 4)), target, np.ones((rows, 4)))
    for value in (*rng.random(10), 1e-7, 123.4):
        constant = replace(follows, prediction=np.full((rows, 4), value))
        assert metric("score", sums("score", constant, None).sum(0)) == 0
    (line,) = effects("x", "removed", ({}, {"ethics": follows}), ({}, {"ethics": constant}), resamples=50)
    assert (line.without, line.verdict) == (0, "helps")
    assert line.low <= line.difference <= line.high
    nearly = replace(follows, prediction=0.5 + 1e-4 * follows.prediction)
    assert metric("score", sums("score", nearly, None).sum(0)) == pytest.approx(line.whole, rel=1e-6)


def test_what_cannot_be_judged_is_left_out():
    """Labels all alike, in every entry that has some; an answer with thresholds that dev has no labels for."""
    given = made(0.5)
    assert effects("x", "removed", ({}, {"emotion": given}), ({}, {"emotion": given})) == []
    known, target = np.zeros((300, 4)), np.zeros((300, 4))
    known[:150, 0] = known[150:, 1] = target[:150, 0] = 1
    alike = Answers(np.random.default_rng(0).random((300, 4)), target, known)
    side = ({}, {"ethics": alike})
    assert effects("x", "removed", side, side) == []
    assert measured(side, side, side, same_rows=False) == []


def test_over_seeds_the_interval_is_students():
    """Three seeds of known differences: scipy's t-test of one sample says the same. A line that one seed lacks is left out."""
    lines = [
        [Effect("m", "removed", "vad", "pearson", 100, whole, whole - d, d, d - 0.01, d + 0.01), *extra]
        for whole, d, extra in (
            (0.5, 0.02, [Effect("m", "removed", "regret", "pearson", 9, 0.1, 0.0, 0.1, 0.05, 0.2)]),
            (0.4, 0.03, []),
            (0.6, 0.025, []),
        )
    ]
    (line,) = over_seeds(lines)
    expected = ttest_1samp([0.02, 0.03, 0.025], 0).confidence_interval(0.95)
    assert (line.low, line.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (line.whole, line.difference, line.verdict) == (pytest.approx(0.5), pytest.approx(0.025), "helps")
    turned = [
        [replace(one, difference=one.difference * sign)] for (one, *_), sign in zip(lines, (1, -1, 1), strict=True)
    ]
    assert over_seeds(turned)[0].verdict == "–"  # each seed alone is sure, and they disagree
