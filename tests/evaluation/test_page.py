"""The report as a page: what stands in it is text, it fits a phone, and the figures under it are right."""

import html
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from redheart.evaluation.answers import Answers
from redheart.evaluation.curves import DEV, LOSS, learning_curves
from redheart.evaluation.examples import confusion, worst
from redheart.evaluation.intervals import measured
from redheart.evaluation.page import Picture, Section, to_html, to_markdown
from tests.browser import browser, colours, look, scrolls_sideways

HOSTILE = "</td><script>document.title='taken'</script> | *b* [x](javascript:y) `c` {{ 7*7 }} &amp; 정"
CURVES = {LOSS: {1: 3.0, 2: 2.0}, DEV: {0: 3.0, 2: 2.5}, "1_quality/regret/train_loss": {1: 1.0, 2: 0.5}}


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    long = "word" * 200
    rows = [(HOSTILE, "emotion.joy", "0.90", "0.10"), (long, *["0.123456789 [0.1, 0.2]"] * 3)]
    columns = ("text", "answer", "label", HOSTILE)
    return [
        Section("Verdict", [HOSTILE]),
        Section(HOSTILE, (), columns, rows, [HOSTILE], learning_curves(CURVES, 2), [f"redheart {long}"]),
    ]


def test_users_texts_are_text(sections: list[Section], tmp_path: Path):
    page = to_html(HOSTILE, sections)
    assert "<script" not in page
    assert page.count(html.escape(HOSTILE).replace("&#x27;", "&#39;")) == 7  # title twice, and wherever else it was put
    markdown = to_markdown(HOSTILE, sections, tmp_path)
    assert "<script" not in markdown
    assert r"\| \*b\* \[x\](javascript:y) \`c\` {{ 7\*7 }} &amp;amp; 정" in markdown
    assert "\n# a\\\\x1b" in "\n" + to_markdown("a\x1b[31mb", sections, tmp_path)  # which a terminal would obey
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert [line.replace(r"\|", "").count("|") for line in table] == [5] * 4


def test_every_panel_of_a_picture_is_a_drawing_of_its_own(tmp_path: Path):
    picture = learning_curves(CURVES, 2)
    assert picture is not None
    drawings = picture.svgs()
    assert ["all answers, weighted" in d for d in drawings] == [True, False]
    assert all("kept: step 2" in d and d.startswith("<svg ") and d.rstrip().endswith("</svg>") for d in drawings)
    picture.png(tmp_path)
    assert colours(tmp_path / picture.file) > 50
    assert learning_curves({}) is None


def test_a_run_that_ends_before_its_first_line_in_the_log_has_the_curves_of_its_dev_losses():
    found = {DEV: {0: 3.0, 2: 2.5}, "1_quality/regret/dev_loss": {0: 1.0, 2: 0.9}}
    picture = learning_curves(found, 2)
    assert picture is not None
    drawings = picture.svgs()
    assert ["all answers, weighted" in d for d in drawings] == [True, False]
    assert not any("training batch" in d for d in drawings)
    only_dev = learning_curves(CURVES | {"1_quality/emotion/dev_loss": {0: 1.0}}, 2)  # nothing trained it
    assert only_dev is not None
    assert len(only_dev.svgs()) == 2


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_and_nothing_runs_off_its_side(sections: list[Section], tmp_path: Path, width: int):
    (tmp_path / "report.html").write_text(to_html("A run", sections))
    with browser() as chromium, look(chromium, f"file://{tmp_path}/report.html", width, offline=True) as page:
        assert page.title() == "A run"
        assert not scrolls_sideways(page)
        assert page.locator("svg").count() == 2
        box = page.locator("svg").first.bounding_box()
        assert 0.6 * min(width, 450) < box["width"] <= width
        page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert colours(tmp_path / "page.png") > 50


def test_a_page_that_runs_off_its_side_or_complains_would_be_seen(tmp_path: Path):
    (tmp_path / "bad.html").write_text("<p style='width: 900px'>x</p><img src='missing.png'>")
    refused = pytest.raises(AssertionError, match=r"missing\.png")
    with browser() as chromium, refused, look(chromium, f"file://{tmp_path}/bad.html", 390) as page:
        assert scrolls_sideways(page)


def given(prediction: np.ndarray, target: np.ndarray) -> Answers:
    rows = np.arange(len(target))
    return Answers(prediction, target, np.ones_like(target), rows % 2, rows)


def test_intervals_of_a_bootstrap_over_rows():
    rng = np.random.default_rng(0)
    target = (rng.random((400, 1)) < 0.5).astype(float)
    right = rng.random((400, 1)) < 0.8
    ours = given(np.where(right, target, 1 - target), target)
    other = given(np.full_like(target, 0.5), target)
    split = lambda answers: ({"preference": answers}, {"preference": answers})  # noqa: E731
    (found,) = measured(split(ours), split(other), split(ours), False)
    alike = {"regret": given(np.arange(4.0)[:, None], np.ones((4, 1)))}
    assert measured((alike, alike), (alike, alike), (alike, alike), False) == []
    first = replace(
        ours, prediction=right.astype(float), target=np.ones((400, 1))
    )  # the better text always named first
    assert measured(split(first), split(other), split(first), False) == [found]
    share = right.mean()
    assert (found.metric, found.rows, found.model.value) == ("accuracy", 400, pytest.approx(share))
    half = 1.96 * (share * (1 - share) / 400) ** 0.5  # of a share, by the normal approximation
    assert (found.model.low, found.model.high) == pytest.approx((share - half, share + half), abs=0.01)
    assert found.constant == (0.5, 0.5, 0.5)  # who says neither is right half of the time
    assert found.above_constant == pytest.approx(np.array(found.model) - 0.5)
    assert found.above_linear == (0, 0, 0)  # paired: the same rows of both


class _Texts:
    def rows(self, numbers: np.ndarray) -> list[dict]:
        return [{"text": f"text {n}", "contrast_text": None} for n in numbers]


def test_the_largest_errors_and_what_is_taken_for_what():
    target, said = np.zeros((4, 7)), np.full((4, 7), 0.1)
    target[:, 2] = (1, 1, 0, 0)
    said[1, 2], said[0, 4], said[3, 6] = 0.3, 0.6, 0.95
    answers = {"emotion": given(said, target)}
    assert worst(answers, _Texts(), 3) == [
        ("text 3", "emotion.neutral", 0.0, 0.95),
        ("text 0", "emotion.anger", 1.0, 0.1),
        ("text 1", "emotion.anger", 1.0, 0.3),
    ]
    names, counts = confusion("emotion", answers["emotion"], [True] * 7)
    assert (names[2], counts[2].tolist(), counts.sum()) == ("anger", [0, 0, 1, 0, 1, 0, 0], 2)


def test_what_nothing_trained_is_taken_for_nothing():
    """Not even where it would be the strongest of every text."""
    target, said = np.zeros((4, 7)), np.full((4, 7), 0.1)
    target[:2, 0], target[2:, 1], said[:, 6] = 1, 1, 0.9
    said[:, 0], said[3, 1] = 0.5, 0.6
    answers, two = given(said, target), [n < 2 for n in range(7)]
    names, counts = confusion("emotion", answers, two)
    assert (names, counts.tolist()) == (("joy", "sadness"), [[2, 0], [1, 1]])
    assert confusion("emotion", answers, [n < 1 for n in range(7)]) is None


def test_a_picture_of_nothing_but_axes_is_drawn(tmp_path: Path):
    assert Picture("x.png", "x", [lambda axes: axes.plot([0, 1])]).svgs()[0].count("<svg") == 1
