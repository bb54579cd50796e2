"""Metrics against scikit-learn and scipy, and the identity that parts add up to the whole."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, mean_absolute_error, r2_score, root_mean_squared_error

from redheart.evaluation.answers import Answers, left_out, metric, resampled, sums
from redheart.metrics import FIELDS, LEAST_VARIANCE, not_finite, pair_tally, summarise, tally, unexplained

P = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
T = (P + 0.6 * torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) - 0.3).clamp(0, 1)
ALL = torch.ones(50, 3)


def test_they_equal_the_libraries():
    told = summarise(tally(P, T, ALL))
    p, t = P.numpy(), T.numpy()
    assert told["mae"] == pytest.approx(mean_absolute_error(t, p), rel=1e-6)
    assert told["rmse"] == pytest.approx(root_mean_squared_error(t.ravel(), p.ravel()), rel=1e-6)
    assert told["pearson"] == pytest.approx(np.mean([pearsonr(p[:, k], t[:, k])[0] for k in range(3)]), rel=1e-5)
    assert told["macro_f1"] == pytest.approx(f1_score(t > 0.5, p > 0.5, average="macro"), rel=1e-6)
    assert told["accuracy"] == pytest.approx(((p > 0.5) == (t > 0.5)).mean(), rel=1e-6)


def test_what_is_unexplained_is_1_less_the_coefficient_of_determination():
    assert unexplained(tally(P, T, ALL)) == pytest.approx(1 - r2_score(T, P, multioutput="variance_weighted"), rel=1e-6)
    few = ALL.clone()
    few[3:, 0] = 0
    few[:, 2] = 0
    kept = [T[:3, 0], T[:, 1]]
    errors = (P[:3, 0] - T[:3, 0]).square().sum() + (P[:, 1] - T[:, 1]).square().sum()
    expected = errors / sum(len(t) * max(float(t.var(correction=0)), LEAST_VARIANCE) for t in kept)
    assert unexplained(tally(P, T, few)) == pytest.approx(float(expected), rel=1e-6)
    one = ALL[:1] * 0 + 1  # a single label differs from nothing
    assert unexplained(tally(P[:1], T[:1], one)) == pytest.approx(
        float((P[:1] - T[:1]).square().mean() / LEAST_VARIANCE), rel=1e-6
    )
    assert np.isnan(unexplained(tally(P, T, ALL * 0)))
    wrong = P.clone()
    wrong[4, 1] = np.inf
    assert np.isnan(unexplained(tally(wrong, T, ALL)))


def test_parts_add_up_to_the_whole():
    parts = sum(tally(P[a:b], T[a:b], ALL[a:b]) for a, b in ((0, 7), (7, 8), (8, 50)))
    assert torch.allclose(parts, tally(P, T, ALL), rtol=1e-12)


def test_what_has_no_label_does_not_count():
    w = ALL.clone()
    w[10:] = 0
    w[:, 1] = 0
    wrong = T.clone()
    wrong[w == 0] = 9.0
    assert summarise(tally(P, wrong, w)) == summarise(tally(P, T, w))
    assert summarise(tally(P, T, w))["count"] == 20
    assert summarise(tally(P, T, torch.zeros(50, 3))) == {}


def test_a_constant_prediction_has_no_correlation_to_speak_of():
    assert "pearson" not in summarise(tally(torch.full_like(P, 0.4), T, ALL))
    many = torch.rand(100_000, 3, generator=torch.Generator().manual_seed(1))
    for value in torch.rand(20, generator=torch.Generator().manual_seed(2)).tolist():
        assert "pearson" not in summarise(tally(torch.full_like(many, value), many, torch.ones_like(many)))


def test_a_column_whose_prediction_is_constant_counts_as_0_and_one_whose_labels_are_alike_not_at_all():
    """The same of sums and of rows: one figure of a report is no other than the next."""
    p, t = P.clone(), T.clone()
    p[:, 0], t[:, 2] = 0.4, 0.1
    expected = pearsonr(p[:, 1], t[:, 1])[0] / 2
    assert summarise(tally(p, t, ALL))["pearson"] == pytest.approx(expected, rel=1e-5)
    by_rows = sums("score", Answers(p.numpy(), t.numpy(), ALL.numpy()), None)
    assert metric("score", by_rows.sum(0)) == pytest.approx(expected, rel=1e-5)


def test_a_column_with_too_few_labels_enters_no_mean_of_correlations_where_another_has_enough():
    labelled = ALL.clone()
    labelled[19:, 0] = labelled[20:, 1] = labelled[2:, 2] = 0
    given = Answers(P.numpy(), T.numpy(), labelled.numpy())
    expected = pearsonr(P[:20, 1], T[:20, 1])[0]
    assert summarise(tally(P, T, labelled))["pearson"] == pytest.approx(expected, rel=1e-5)
    assert resampled("score", sums("score", given, None))[0][0] == pytest.approx(expected, rel=1e-5)
    assert left_out("vad", given) == ["vad.valence (19)", "vad.dominance (2)"]
    labelled[2:] = 0
    assert summarise(tally(P, T, labelled))["pearson"]  # all have too few, which the verdict says
    assert left_out("vad", given) == left_out("emotion", given) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_counted_and_has_no_metric(bad: float):
    broken = P.clone()
    broken[3, 1] = broken[9, 0] = bad
    sums = tally(broken, T, ALL) + tally(P, T, ALL)
    assert not_finite(sums) == 2
    assert sums.isfinite().all()
    with pytest.raises(ValueError, match="2 predictions or labels are not finite"):
        summarise(sums)
    assert not_finite(tally(broken, T, torch.where(broken.isfinite(), ALL, 0.0))) == 0


def test_rows_are_texts_and_count_is_entries():
    w = torch.zeros(50, 3)
    w[:10, 0] = w[5:20, 2] = 0.3
    told = summarise(tally(P[:7], T[:7], w[:7]) + tally(P[7:], T[7:], w[7:]))
    assert (told["rows"], told["count"]) == (20, 25)
    assert tally(P[:, :1], T[:, :1], w[:, :1])[FIELDS.index("rows")].tolist() == [10]
    assert tally(P, T, w)[FIELDS.index("rows")].tolist() == [20, 0, 0]


def test_macro_f1_is_one_definition_for_sums_and_for_rows():
    """A column that nobody is positive in has no F1: scikit-learn on the other columns."""
    t = T.clone()
    t[:, 1] = 0.1
    expected = f1_score(t[:, ::2] > 0.5, P[:, ::2] > 0.5, average="macro")
    assert summarise(tally(P, t, ALL))["macro_f1"] == pytest.approx(expected)
    given = Answers(P.numpy(), t.numpy(), ALL.numpy() > 0)
    assert metric("multilabel", sums("multilabel", given, np.full(3, 0.5)).sum(0)) == pytest.approx(expected)
    none = summarise(tally(P, torch.zeros_like(T), ALL))
    assert "macro_f1" not in none


def test_the_order_of_two_texts_changes_no_figure_of_a_pair():
    """However a data set lists them: even the better one always first, where who always says "the first" would be right every time."""
    p, t, known = P[:, :1], (T[:, :1] > 0.5).float(), ALL[:, :1].clone()
    known[::3] = 0
    told = summarise(pair_tally(p, t, known))
    for turned in (torch.arange(50) % 2 == 0, t[:, 0] < 0.5):
        turn = turned[:, None]
        other = summarise(pair_tally(torch.where(turn, 1 - p, p), torch.where(turn, 1 - t, t), known))
        assert other == pytest.approx(told, rel=1e-6)
    assert told["accuracy"] == pytest.approx(summarise(tally(p, t, known))["accuracy"])
    assert told["count"] == told["rows"] == known.sum().item()
    first = summarise(pair_tally(torch.ones(50, 1), torch.ones(50, 1), ALL[:, :1]))
    neither = summarise(pair_tally(torch.full((50, 1), 0.5), torch.ones(50, 1), ALL[:, :1]))
    assert (first["accuracy"], neither["accuracy"]) == (1.0, 0.5)
    assert not_finite(pair_tally(torch.full((50, 1), torch.nan), t, ALL[:, :1])) == 50
