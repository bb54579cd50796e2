"""The LLM's answers: the packed pass equals prompts written out; what becomes a label; a kill costs nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import somersd
from sklearn.metrics import roc_auc_score

from redheart.bench.label import parse, prompt
from redheart.config import DataConfig, LabelerConfig
from redheart.data import labelling
from redheart.data.label_quality import calibrated, concordance, judge, to_human_scale
from redheart.data.labelling import fill_labels, lines_so_far
from redheart.data.llm_labels import LlmScorer
from redheart.data.questions import FORM, NUM_WORDS
from redheart.data.sources.records import parse_record
from redheart.schema import RedHeartError

TEXTS = [
    "I miss her so much.",
    "The shop opens at nine on weekdays, and closes at five except on Sundays.",
    "He hit me!",
]


@pytest.fixture(scope="module")
def scorer() -> LlmScorer:
    return LlmScorer(LabelerConfig())


@pytest.fixture(scope="module")
def exact() -> LlmScorer:
    """Without 4-bit weights; loading it and running its instruction is most of what a test of it would take."""
    return LlmScorer(LabelerConfig(quantization="none"))


def written_out(scorer: LlmScorer, texts: list[str]) -> torch.Tensor:
    """Logits of every thirteenth prompt of each text, by the library's own attention and cache.

    The instruction is the same tokens in all of them and is run once; the very first prompt is run from its first token on.
    """
    shared = scorer.model.config._attn_implementation
    scorer.model.set_attn_implementation("sdpa")

    def last(ids: list[int], cache: Any = None) -> torch.Tensor:
        given = torch.tensor([ids])
        return scorer.model(input_ids=given, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()

    rows, start = [], len(scorer.prefix)
    with torch.inference_mode():
        cache = scorer.model.base_model(input_ids=torch.tensor([scorer.prefix]), use_cache=True).past_key_values
        for text in texts:
            for prompt_ids in scorer.prompts(text)[::13]:
                assert prompt_ids[:start] == scorer.prefix
                rows.append(last(prompt_ids[start:], copy.deepcopy(cache)) if rows else last(prompt_ids))
    scorer.model.set_attn_implementation(shared)
    return torch.stack(rows).unflatten(0, (len(texts), -1))


def packed(scorer: LlmScorer, texts: list[str]) -> torch.Tensor:
    return scorer.logits(scorer.states(texts)).flatten(1, 2)[:, ::13]


def test_packed_logits_equal_those_of_prompts_written_out(exact: LlmScorer):
    assert torch.allclose(packed(exact, TEXTS), written_out(exact, TEXTS), atol=1e-3)


@pytest.mark.slow
def test_packed_probabilities_in_4_bits_stay_within_two_hundredths(scorer: LlmScorer):
    assert (packed(scorer, TEXTS).softmax(-1) - written_out(scorer, TEXTS).softmax(-1)).abs().max() < 0.02


def test_a_text_s_answers_do_not_depend_on_its_neighbours(exact: LlmScorer):
    alone = np.concatenate([exact.score([t]) for t in TEXTS])
    assert np.abs(exact.score(TEXTS) - alone).max() < 1e-3


def test_concordance_is_the_auc_and_somers_d():
    rng = np.random.default_rng(0)
    binary, graded, score = rng.integers(0, 2, 200), rng.integers(0, 5, 200), rng.integers(0, 30, 200) / 30
    assert concordance(binary, score) == pytest.approx(roc_auc_score(binary, score))
    assert concordance(graded, score) == pytest.approx((1 + somersd(graded, score).statistic) / 2)


def answers_that_follow(values: np.ndarray, liking: float = 1.0) -> np.ndarray:
    """Log-probabilities whose every scale says `values`; the second word is liked `liking` times more, whatever the text."""
    logp = np.full((len(values), 2, NUM_WORDS), np.log(0.02))
    start = 0
    for question in FORM:
        if question.is_scale:
            high = liking * values
            logp[:, :, start] = np.log(0.5 * (1 - values) / (1 - values + high))[:, None]
            logp[:, :, start + 1] = np.log(0.5 * high / (1 - values + high))[:, None]
        start += len(question.words)
    return logp


def test_calibration_takes_out_what_is_said_of_every_text():
    values = np.linspace(0.1, 0.9, 50)
    plain, masses = calibrated(answers_that_follow(values))
    assert np.allclose(plain["regret", "regret"], values)  # as many say low as high: nothing to take out
    assert np.allclose(masses["regret", "regret"], 0.5)
    liked, _ = calibrated(answers_that_follow(values, liking=8.0))
    raw = 8 * values / (1 - values + 8 * values)
    assert np.all(np.diff(liked["regret", "regret"]) > 0)
    assert abs(raw.mean() - 0.5) > 0.25
    assert abs(liked["regret", "regret"].mean() - 0.5) < 0.1


def records(n: int, regret: np.ndarray | None = None, origin: str = "human") -> list[dict[str, Any]]:
    made = []
    for i in range(n):
        raw: dict[str, Any] = {"text": f"text number {i}", "split": "train"}
        if regret is not None:
            raw |= {"regret": float(regret[i]), "label_origin": {"regret": origin}}
        made.append(parse_record(raw, f"row {i}", "mine"))
    return made


def test_answers_that_people_contradict_are_refused():
    values = np.linspace(0.1, 0.9, 60)
    for human, accepted in ((values, True), (1 - values, False)):
        kept, report = judge(records(60, human), answers_that_follow(values), LabelerConfig())
        found = next(q for q in report if q["entry"] == "regret")
        assert (("regret", "regret") in kept) == found["accepted"] == accepted
        assert found["agreement"] == pytest.approx(float(accepted))
        assert ("agreement" in found["reason"]) != accepted


def test_answers_that_say_the_same_of_all_texts_are_refused():
    kept, report = judge(records(40), answers_that_follow(np.full(40, 0.3)), LabelerConfig())
    assert not kept
    assert report
    assert all("spread" in q["reason"] for q in report)


def test_labels_of_the_test_split_decide_nothing():
    """People contradict the LLM on the test texts alone: what is kept, and every score, stays; on dev they would refuse it."""
    values = np.tile(np.linspace(0.1, 0.9, 60), 3)

    def judged(split: str, contradicted: bool):
        rows = records(180, values)
        for row in rows[60:120]:
            row["split"] = split
            row["regret"] = 1 - row["regret"] if contradicted else row["regret"]
        return judge(rows, answers_that_follow(values), LabelerConfig(min_agreement=0.7))

    (kept, report), (other, other_report) = judged("test", True), judged("test", False)
    assert report == other_report
    assert next(q for q in report if q["entry"] == "regret")["compared"] == 120
    assert kept.keys() == other.keys()
    assert ("regret", "regret") in kept
    assert all(np.array_equal(kept[k], other[k]) for k in kept)
    assert ("regret", "regret") not in judged("dev", True)[0]


@pytest.mark.parametrize(("origin", "compared"), [("human", 120), ("author", 120), ("llm", 0)])
def test_authors_are_people_too(origin: str, compared: int):
    values = np.tile([0.1, 0.9], 60)
    said = answers_that_follow(1 - values)
    kept, report = judge(records(120, values, origin), said, LabelerConfig(min_agreement=0.7))
    assert next(q for q in report if q["entry"] == "regret")["compared"] == compared
    assert (("regret", "regret") in kept) == (not compared)


def test_an_answer_that_is_not_finite_is_refused():
    logp = answers_that_follow(np.linspace(0.1, 0.9, 40))
    logp[3, 1, 2] = np.nan
    with pytest.raises(RedHeartError, match="the LLM's log-probabilities: 1 of"):
        judge(records(40), logp, LabelerConfig())


def test_scores_are_mapped_to_what_people_say_of_training_texts():
    score = np.linspace(0, 1, 400)
    human = (np.random.default_rng(0).random(400) < score**2).astype(float)
    mapped = to_human_scale(score, human, np.ones(400, bool))
    assert np.all(np.diff(mapped) >= 0)
    assert np.abs(mapped - score**2).mean() < 0.06


def test_a_kill_costs_the_last_answer_at_most(exact: LlmScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("redheart.data.llm_labels.LlmScorer", lambda _: exact)
    corpus = records(8)
    config = DataConfig(labeler=LabelerConfig(batch_size=4))
    first = [json.loads(json.dumps(r)) for r in corpus]
    fill_labels(first, tmp_path, config)
    file = tmp_path / "labels-rank0.txt"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 8
    file.write_bytes(b"".join(lines[:5]) + lines[5][:100])  # the kill
    asked: list[str] = []
    score = exact.score
    monkeypatch.setattr(exact, "score", lambda texts: asked.extend(texts) or score(texts))
    second = [json.loads(json.dumps(r)) for r in corpus]
    result = fill_labels(second, tmp_path, config)
    assert len(asked) == 3
    assert len(file.read_bytes().splitlines()) == 8
    assert result.report["texts"] == 8
    for a, b in zip(first, second, strict=True):
        assert np.allclose(
            [v for v in a["bentham"] if v is not None], [v for v in b["bentham"] if v is not None], atol=0.03
        )
    monkeypatch.setattr("redheart.data.llm_labels.LlmScorer", lambda _: pytest.fail("all answers are there"))
    third = [json.loads(json.dumps(r)) for r in corpus]
    fill_labels(third, tmp_path, config)
    assert third == second
    content = bytearray(file.read_bytes())
    content[sum(map(len, lines[:3])) + 40] ^= 1  # a flipped bit: that text is asked about again
    file.write_bytes(content)
    assert len(lines_so_far(tmp_path, "labels")) == 7


@pytest.mark.slow
def test_two_ranks_ask_about_each_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, corpus, fingerprints = DataConfig(), records(9), []
    monkeypatch.setattr(labelling, "launched_world_size", lambda: 2)
    monkeypatch.setattr(labelling, "lines_so_far", lambda work, name, mend=None: {})  # both start at once
    for rank in (0, 1):
        monkeypatch.setattr(labelling, "launched_rank", lambda rank=rank: rank)
        fingerprints.append(labelling._ask(corpus, tmp_path, config)["fingerprint"])
    monkeypatch.undo()
    written = [line for r in (0, 1) for line in (tmp_path / f"labels-rank{r}.txt").read_text("utf-8").splitlines()]
    keys = [json.loads(line)["key"] for line in written]
    assert fingerprints[0] == fingerprints[1]
    assert sorted(keys) == sorted(labelling.key_of(r) for r in corpus)


def test_bench_counts_only_answers_of_the_list_in_whole_json():
    good = {q.key: q.words[-1] for q in FORM}
    assert parse(json.dumps(good)) == good
    assert parse(json.dumps(good | {"regret": "some", "hope": ["none"]})).keys() == good.keys() - {"regret", "hope"}
    assert parse(json.dumps(good)[:-4]) == {}
    assert parse("[1]") == {}
    assert len(prompt("It rained.", True).split("It rained.")) == 2
    assert prompt("It rained.", True) != prompt("It rained.", False)
