"""Calibration against scikit-learn, hand computations and known distortions; what stays as it is, and what its file refuses."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import f1_score

from redheart.evaluation.answers import Answers, thresholds, tuned_macro_f1
from redheart.evaluation.calibration import (
    CALIBRATED,
    CALIBRATION,
    MIN_ROWS,
    MIN_SCALE,
    Calibration,
    Line,
    apply,
    crossed,
    fit,
    fit_answer,
    least_squares,
    platt,
    read,
    with_lines,
    write,
)
from redheart.evaluation.reliability import BINS, binned, calibration_error, figures, picture, reliability
from redheart.files import write_sealed_json
from redheart.schema import LABELS, RedHeartError
from redheart.tasks import TASKS


def sigmoid(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.asarray(x, float)).sigmoid().numpy()


def drawn(rows: int, size: int = 1, seed: int = 0, rate: float = -1.0) -> tuple[np.ndarray, np.ndarray]:
    """True logits and labels drawn from them, [rows, size] each."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(rate, 2.0, (rows, size))
    return logits, (rng.random((rows, size)) < sigmoid(logits)).astype(float)


def given(score: np.ndarray, target: np.ndarray, weight: np.ndarray | None = None) -> Answers:
    halves = np.random.default_rng(9).integers(0, 2, len(score))
    return Answers(score.astype(np.float32), target, np.ones_like(target) if weight is None else weight, halves)


def test_a_platt_fit_is_a_logistic_regression_on_one_logit():
    """With Platt's targets exactly that of scikit-learn on both classes of every row; with many rows that of the plain labels."""
    logits, labels = (x[:, 0] for x in drawn(400))
    logits = 0.3 * logits + 0.7
    weights = np.random.default_rng(1).choice([0.3, 1.0], len(labels))
    positive, total = (weights * labels).sum(), weights.sum()
    target = np.where(labels > 0, (positive + 1) / (positive + 2), 1 / (total - positive + 2))
    twice, both = np.tile(logits, 2)[:, None], np.repeat([1, 0], len(labels))
    oracle = LogisticRegression(C=1e12, tol=1e-12, max_iter=10_000)
    oracle.fit(twice, both, sample_weight=np.concatenate([weights * target, weights * (1 - target)]))
    assert platt(logits, labels, weights) == pytest.approx((oracle.coef_[0, 0], oracle.intercept_[0]), rel=1e-5)

    logits, labels = (x[:, 0] for x in drawn(20_000))
    plain = LogisticRegression(C=1e12, tol=1e-10).fit(logits[:, None], labels)
    found = platt(logits, labels, np.ones_like(labels))
    assert found == pytest.approx((plain.coef_[0, 0], plain.intercept_[0]), abs=1e-3)


def test_the_fit_is_where_the_gradient_is_zero_for_soft_labels_of_any_size():
    logits, _ = drawn(300)
    for stretch in (1e-3, 1.0, 1e4):
        score, target = logits[:, 0] * stretch, np.random.default_rng(2).random(300) * sigmoid(logits[:, 0])
        scale, offset = platt(score, target, np.ones(300))
        n = target.sum()
        smooth = 1 / (300 - n + 2) + ((n + 1) / (n + 2) - 1 / (300 - n + 2)) * target
        error = sigmoid(scale * score + offset) - smooth
        assert abs(error.mean()) < 1e-7
        assert scale < MIN_SCALE * 1.01 or abs((error * score).mean()) < 1e-7 * stretch


def test_separated_rows_and_few_positives_give_a_finite_fit():
    score = np.r_[np.full(57, -2.0), np.full(3, 2.0)]
    target = (score > 0).astype(float)
    scale, offset = platt(score, target, np.ones(60))
    # Platt's targets, met exactly
    assert sigmoid(np.array([scale * 2 + offset, -scale * 2 + offset])) == pytest.approx([4 / 5, 1 / 59], rel=1e-6)


def test_a_distortion_is_undone_and_the_error_falls_below_a_hundredth():
    logits, labels = drawn(20_000, 7)
    scored = given(0.3 * logits + 0.8, labels)
    lines = fit_answer("emotion", scored)
    for line in lines:
        assert line.scale == pytest.approx(1 / 0.3, rel=0.06)
        assert line.offset == pytest.approx(-0.8 / 0.3, abs=0.15)
    (told,) = reliability({"emotion": scored}, {"emotion": lines}, same_rows=False)
    assert told.before.ece > 0.15
    assert told.after.ece < 0.01
    assert told.after.brier < told.before.brier
    fresh_logits, fresh = drawn(20_000, 7, seed=5)
    (told,) = reliability({"emotion": given(0.3 * fresh_logits + 0.8, fresh)}, {"emotion": lines}, same_rows=False)
    assert told.after.ece < 0.01
    assert told.after.brier == pytest.approx((sigmoid(fresh_logits) * (1 - sigmoid(fresh_logits))).mean(), rel=0.02)


def test_the_expected_calibration_error_is_that_of_a_hand_computation():
    said, true = np.array([0.1, 0.1, 0.2, 0.6, 0.9]), np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    # five values for 15 bins: equal ones share theirs
    by_hand = (2 * abs(0.1 - 0.5) + 0.2 + 0.4 + 0.1) / 5
    assert calibration_error(said, true) == pytest.approx(by_hand)
    rng = np.random.default_rng(0)
    said, true = rng.random(300), rng.integers(0, 2, 300).astype(float)
    order = np.argsort(said)
    by_hand = np.mean([abs(said[part].mean() - true[part].mean()) for part in np.split(order, BINS)])
    assert calibration_error(said, true) == pytest.approx(by_hand)
    assert binned(said, true)[:, 2].tolist() == [300 / BINS] * BINS
    assert calibration_error(np.full(100, 0.5), np.r_[np.zeros(40), np.ones(60)]) == pytest.approx(0.1)


def test_unlabelled_entries_count_nowhere():
    logits, labels = drawn(500, 7)
    weight = (np.random.default_rng(3).random(labels.shape) > 0.3).astype(float)
    clean = given(logits, labels, weight)
    noisy = given(np.where(weight > 0, logits, 30.0), np.where(weight > 0, labels, 1.0), weight)
    assert fit_answer("emotion", clean) == fit_answer("emotion", noisy)
    assert figures(clean).to_json() == figures(noisy).to_json()


def test_a_pair_mirrors():
    logits, labels = (x[:, :1] for x in drawn(800, rate=0.6))
    swapped = np.random.default_rng(4).random(logits.shape) > 0.5
    (line,) = fit_answer("preference", given(0.4 * logits, labels))
    (mirrored,) = fit_answer(
        "preference", given(np.where(swapped, -0.4, 0.4) * logits, np.where(swapped, 1 - labels, labels))
    )
    assert line.offset == mirrored.offset == 0
    assert line.scale == pytest.approx(mirrored.scale, rel=1e-5)
    one = torch.tensor([[0.7], [-0.7]])
    assert apply("preference", (line,), one).sum().item() == pytest.approx(1.0)


def test_pairs_that_always_name_the_better_text_first_are_calibrated_as_those_in_either_order():
    logits, labels = (x[:, :1] for x in drawn(800, rate=0.6))
    (line,) = fit_answer("preference", given(0.4 * logits, labels))
    (first,) = fit_answer("preference", given(np.where(labels > 0, 0.4, -0.4) * logits, np.ones_like(labels)))
    assert (first.as_is, first.scale) == ("", pytest.approx(line.scale, rel=1e-5))
    same, nothing = (given(np.full_like(logits, x), np.ones_like(labels)) for x in (1.0, 0.0))
    assert fit_answer("preference", same)[0].as_is == ""
    assert fit_answer("preference", nothing)[0].as_is == "all answers on dev are alike"


def test_ratings_get_the_line_of_least_squares_and_stay_in_their_range():
    rng = np.random.default_rng(0)
    target = rng.uniform(-1, 1, (400, 3))
    score = (0.4 * target + rng.normal(0, 0.1, target.shape) + 0.3).astype(np.float32)
    weights = rng.choice([0.3, 1.0], target.shape)
    lines = fit_answer("vad", given(score, target, weights))
    for k, line in enumerate(lines):
        oracle = LinearRegression().fit(score[:, k : k + 1], target[:, k], sample_weight=weights[:, k])
        assert (line.scale, line.offset) == pytest.approx((oracle.coef_[0], oracle.intercept_), rel=1e-5)
        assert line.threshold is None
    mapped = apply("vad", lines, torch.tensor([[-1.0] * 3, [0.3] * 3, [1.0] * 3]))
    assert mapped[0].tolist() == [-1.0] * 3
    assert mapped[2].tolist() == [1.0] * 3
    assert mapped[1].abs().max() < 0.1


def test_the_standard_error_of_a_slope_is_that_of_repeated_draws():
    rng = np.random.default_rng(0)
    fits = []
    for _ in range(300):
        x = rng.normal(size=100)
        fits.append(least_squares(x, 0.5 * x + rng.normal(size=100), np.ones(100)))
    slopes, _, errors = np.array(fits).T
    assert errors.mean() == pytest.approx(slopes.std(), rel=0.1)


def test_what_dev_cannot_tell_stays_as_it_is_and_is_named():
    rng = np.random.default_rng(0)
    score, target = rng.random((200, 7)), rng.random((200, 7))
    weight = np.ones_like(target)
    target[:, 0] = 0.5
    score[:, 1] = 0.25
    weight[MIN_ROWS - 1 :, 2] = 0
    target[:, 3] = 1 - score[:, 3]
    target[:, 4] = score[:, 4] ** 2
    made = Calibration(
        weights="w", step=1, dev="d", dev_rows=200, answers=fit({"bentham": given(score, target, weight)})
    )
    said = {line.as_is for line in made.answers["bentham"][:4]}
    assert said == {
        "all labels on dev are alike",
        "all answers on dev are alike",
        f"{MIN_ROWS - 1} labelled dev rows, fewer than {MIN_ROWS}",
        "dev cannot tell that it follows its labels",
    }
    left = made.left_as_is()
    assert {"bentham.intensity", "bentham.duration", "emotion"} <= left.keys()
    assert "bentham.fecundity" not in left
    assert left["emotion"] == "no label of people on dev"
    one = torch.from_numpy(score[:1].astype(np.float32))
    kept = made.apply("bentham", one)
    assert torch.equal(kept[:, :4], one[:, :4].double())
    assert not torch.equal(kept[:, 4], one[:, 4].double())
    assert torch.equal(made.apply("regret", one[:, :1]), one[:, :1].double())


@pytest.mark.parametrize("name", CALIBRATED)
def test_no_map_changes_an_order(name):
    """Not even of an answer that runs against its labels: its scale is the smallest."""
    rng, size = np.random.default_rng(0), LABELS[TASKS[name].label].size
    score = rng.normal(size=(300, size))
    target = (rng.random((300, size)) < sigmoid(-score)).astype(float)
    lines = fit_answer(name, given(score, target))
    ordered = torch.linspace(-3, 3, 50)[:, None].expand(-1, size)
    assert (apply(name, lines, ordered).diff(dim=0) >= 0).all()
    logit = TASKS[name].judged.calibrated == "logit"
    assert all(line.scale == MIN_SCALE if logit else line.as_is for line in lines)
    if logit and name != "preference":  # then the shares of the labels are what is left to say
        assert apply(name, lines, torch.from_numpy(score)).mean(0).numpy() == pytest.approx(target.mean(0), abs=0.01)


def test_thresholds_are_those_of_the_highest_f1_and_of_calibrated_answers_choose_the_same_texts():
    logits, labels = drawn(150, 7, rate=-2.0)
    scored = given(0.3 * logits + np.random.default_rng(6).normal(0, 0.3, logits.shape), labels)
    plain = with_lines("emotion", (Line(rows=150),) * 7, scored)
    cut = thresholds(plain)
    for k in range(7):
        every = [f1_score(labels[:, k], plain.prediction[:, k] > t) for t in plain.prediction[:, k]]
        assert f1_score(labels[:, k], plain.prediction[:, k] > cut[k]) == max(every)
    lines = fit_answer("emotion", scored)
    after = with_lines("emotion", lines, scored)
    assert ((after.prediction > [line.threshold for line in lines]) == (plain.prediction > cut)).all()
    assert tuned_macro_f1(plain, plain) == tuned_macro_f1(after, after)


def test_an_entry_without_a_positive_dev_label_has_no_threshold():
    logits, labels = drawn(200, 7)
    labels[:, 2] *= 0.4
    lines = fit_answer("emotion", given(logits, labels))
    assert [line.threshold is None for line in lines] == [False, False, True, False, False, False, False]
    assert not lines[2].as_is


def test_rows_have_no_say_in_their_own_calibration():
    """Noise of few rows: fitted to these very rows it looks better than by the other half."""
    rng = np.random.default_rng(0)
    score, labels = rng.normal(size=(120, 7)), (rng.random((120, 7)) > 0.7).astype(float)
    scored = given(score, labels)
    own, other = with_lines("emotion", fit_answer("emotion", scored), scored), crossed("emotion", scored)
    for half in (0, 1):
        rows = scored.halves == half
        lines = fit_answer("emotion", scored.rows(~rows))
        assert (other.prediction[rows] == with_lines("emotion", lines, scored.rows(rows)).prediction).all()
    assert figures(other).brier > figures(own).brier
    alone = Answers(scored.prediction, labels, scored.weight, np.zeros(120, int))  # nobody else to ask
    assert crossed("emotion", alone).prediction == pytest.approx(sigmoid(score), rel=1e-6)


def test_the_diagram_is_drawn(tmp_path):
    logits, labels = drawn(200, 7)
    told = reliability({n: given(logits[:, :s], labels[:, :s]) for n, s in (("emotion", 7), ("regret", 1))}, {}, True)
    picture(told).png(tmp_path)
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert list(told[0].entries) == list(LABELS["emotion"].names)


def test_the_file_comes_back_and_a_damaged_one_is_refused_by_name(tmp_path):
    assert read(tmp_path) is None
    logits, labels = drawn(100, 7)
    made = Calibration(weights="w", step=3, dev="d", dev_rows=100, answers=fit({"emotion": given(logits, labels)}))
    path = write(made, tmp_path)
    assert path.name == CALIBRATION
    assert read(tmp_path) == made
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 97):  # the last is a line break
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert read(tmp_path) == made  # a blank for another
        except RedHeartError as error:
            assert str(path) in str(error)  # noqa: PT017
    plain = json.loads(made.model_dump_json())
    for change, words in (
        ({"version": 2}, "version"),
        ({"answers": {"joy": []}}, "answers.joy"),
        ({"answers": {"emotion": [{"rows": 3, "scale": 0}]}}, "scale"),
        ({"surprise": 1}, "surprise"),
    ):
        write_sealed_json(path, plain | change)
        with pytest.raises(RedHeartError, match=words):
            read(tmp_path)
