"""The verdict: paired differences as scipy has them, better and worse mirrored, and no claim where rows are few."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from redheart.evaluation.answers import Answers
from redheart.evaluation.verdict import BASELINES, MIN_TEXTS, Difference, difference, judge, squared_errors


def answers(noise: float, rows: int = 300, size: int = 3, seed: int = 0) -> Answers:
    """Predictions that miss their labels by `noise`; some entries have no label."""
    rng = np.random.default_rng(7)
    target, weight = rng.random((rows, size)), (rng.random((rows, size)) < 0.7).astype(float)
    weight[:, 0] = 1
    return Answers(target + noise * np.random.default_rng(seed).normal(size=(rows, size)), target, weight)


def test_the_interval_is_that_of_the_paired_t_test():
    ours, theirs = answers(0.1, seed=1), answers(0.15, seed=2)
    found = difference(ours, theirs)
    told = ttest_rel(squared_errors(ours), squared_errors(theirs))
    low, high = told.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    row = ours.known[5]
    assert squared_errors(ours)[5] == pytest.approx(((ours.prediction - ours.target)[5, row] ** 2).mean())


def test_better_worse_and_open():
    good, bad, twin = answers(0.05, seed=1), answers(0.4, seed=2), answers(0.05, seed=3)
    said = judge(
        {"regret": good, "vad": good}, {"constant": {"regret": bad, "vad": bad}, "linear": {"regret": twin, "vad": bad}}
    )
    assert said.lines() == [
        "better than the best constant on regret, vad",
        "ahead of a linear model on vad",
        "too few rows to tell on regret (300) against the linear",
    ]
    mirrored = judge({"vad": bad}, {"constant": {"vad": good}, "linear": {"vad": good}})
    assert mirrored.lines() == ["worse than the best constant on vad", "behind a linear model on vad"]
    both = judge({"vad": good, "regret": bad}, {b: {"vad": bad, "regret": good} for b in BASELINES})
    assert both.lines()[0] == "better than the best constant on vad; worse than the best constant on regret"
    assert said.to_json()["answers"]["vad"]["linear"]["mean"] == -mirrored.against["linear"]["vad"].mean


def test_few_texts_say_nothing_however_clear_they_look():
    clear = Difference(-1.0, -1.1, -0.9)
    assert clear.finding(MIN_TEXTS) == "better"
    assert clear.finding(MIN_TEXTS - 1) == "open"
    few = judge({"vad": answers(0.05, rows=9)}, {b: {"vad": answers(0.4, rows=9, seed=1)} for b in BASELINES})
    assert few.lines() == ["too few rows to tell on vad (9) against the constant; vad (9) against the linear"]
    one = difference(answers(0.1, rows=1), answers(0.3, rows=1, seed=1))
    assert one.finding(1000) == "open"


def test_nothing_is_told_where_all_labels_are_alike_but_of_pairs():
    ours, theirs = (Answers(np.full((30, 1), p) + 0.01 * np.eye(30, 1), *np.ones((2, 30, 1))) for p in (0.9, 0.5))
    names = ("acceptability", "preference")
    said = judge(dict.fromkeys(names, ours), {b: dict.fromkeys(names, theirs) for b in BASELINES})
    assert said.lines() == ["better than the best constant on preference", "ahead of a linear model on preference"]
    assert set(said.to_json()["answers"]) == {"preference"}


def test_equal_networks_are_called_better_about_as_rarely_as_the_interval_says():
    wrong = sum(
        difference(answers(0.2, 60, 1, 2 * i), answers(0.2, 60, 1, 2 * i + 1)).finding(60) != "open" for i in range(200)
    )
    assert wrong <= 20  # 10 of 200 on average; 21 or more come once in a thousand times
