"""What the LLM writes: marked, gated, counted, in training rows only; a kill costs the last batch at most."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redheart.config import AugmentConfig, DataConfig, LabelerConfig
from redheart.data import augment as module
from redheart.data.augment import augment, judge
from redheart.data.gather import gather
from redheart.data.llm_labels import LlmScorer
from redheart.data.questions import FORM, NUM_WORDS
from redheart.data.sources.records import parse_record
from redheart.files import sealed_line
from redheart.schema import RedHeartError

FACTS = {"mine": {"origin": "mine.json", "licence": "the user's own", "non_commercial": False}}


def config(kind: str, **limits: Any) -> DataConfig:
    return DataConfig(labeler=LabelerConfig(batch_size=2), augment=AugmentConfig(kind=kind, **limits))


def records() -> list[dict[str, Any]]:
    texts = [
        "I lied to my sister.", "It rained all day.", "We won the game!", "He kept my coat.", "She called me back.",
    ]  # fmt: skip
    raw = [{"text": t, "regret": 0.5, "split": "train"} for t in texts]
    raw += [{"text": "Held out.", "split": "dev"}, {"text": "One.", "contrast_text": "Two.", "split": "train"}]
    return [parse_record(r, f"row {i}", "mine") for i, r in enumerate(raw)]


def answers(value: float) -> list[list[float]]:
    """Answers that say the second word of every scale with probability `value`."""
    logp = np.full((2, NUM_WORDS), -2.0)
    start = 0
    for question in FORM:
        if question.is_scale:
            logp[:, start : start + 2] = np.log([1 - value, value])
        start += len(question.words)
    return logp.tolist()


def rewrite(
    text: str = "Other words.", similarity: float = 0.9, before: float = 0.5, after: float = 0.5
) -> dict[str, Any]:
    return {"text": text, "similarity": similarity, "before": answers(before), "after": answers(after)}


def test_every_gate_refuses_what_it_is_for():
    rows = records()[:5]
    written = [
        rewrite(), rewrite(text=""), rewrite(text="we WON the game"), rewrite(similarity=0.5), rewrite(before=0.4, after=0.6),
    ]  # fmt: skip
    found = judge(rows, written, config("paraphrase"))
    assert found[0] == ""
    copied = rewrite(text="I borrowed money from my brother, and he never got it back. It rained.")
    assert judge(rows[:1], [copied], config("paraphrase")) == ["repeats an example"]
    for reason, word in zip(found[1:], ("not finished", "the same", "similarity", "move"), strict=True):
        assert word in reason
    better = [rewrite(before=0.3, after=0.7), rewrite(before=0.7, after=0.3), rewrite()]
    found = judge(rows[:3], better, config("counterfactual"))
    assert found[0] == ""
    assert all("better" in reason for reason in found[1:])


@pytest.fixture(scope="module")
def llm() -> LlmScorer:
    """The real one; loading it and running its instruction is most of what a test of it would take."""
    return LlmScorer(LabelerConfig(quantization="none"))


@pytest.fixture(scope="module")
def written(llm: LlmScorer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work of one run over the records, by the real LLM and encoder."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("redheart.data.llm_labels.LlmScorer", lambda _: llm)
        augment(records(), FACTS, work, config("paraphrase"))
    return work


@pytest.fixture
def work(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "work"))


def all_kept(monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    monkeypatch.setattr(module, "judge", lambda rows, *_: ["" if i < keep else "no good" for i in range(len(rows))])


def test_paraphrases_are_further_training_rows_marked_as_derived(work: Path, monkeypatch: pytest.MonkeyPatch):
    all_kept(monkeypatch, 2)
    lines = [json.loads(line) for line in (work / "written-rank0.txt").read_text().splitlines()]
    for line in lines:
        del line["sha256"]
    renamed = [sealed_line(line | {"text": f"{line['text']} It is version {i}."}) for i, line in enumerate(lines)]
    (work / "written-rank0.txt").write_text("".join(renamed))
    before = records()
    after, facts = augment(before, FACTS, work, config("paraphrase"))
    new = [r for r in after if r["source"] == "mine+paraphrase"]
    assert [r for r in after if r["source"] == "mine"] == before
    assert len(new) == facts["mine+paraphrase"]["rows_kept"] == 2
    assert all(r["split"] == "train" and r["label_origin"]["regret"] == "derived" for r in new)
    assert facts["mine+paraphrase"]["rejected"] == {"no good": 4}
    assert facts["mine+paraphrase"]["licence"] == "the user's own"
    assert len({r["id"] for r in after}) == len(after)
    repeated = [sealed_line(line | {"text": "Held out!"}) for line in lines]
    (work / "written-rank0.txt").write_text("".join(repeated))
    after, facts = augment(before, FACTS, work, config("paraphrase"))
    assert after == before
    assert facts["mine+paraphrase"]["rejected"] == {"a text that is there already": 2, "no good": 4}


def test_counterfactuals_become_contrast_texts_of_rows_without_one(work: Path, monkeypatch: pytest.MonkeyPatch):
    all_kept(monkeypatch, 5)
    before = records()
    after, facts = augment(before, FACTS, work, config("counterfactual"))
    changed = [(a, b) for a, b in zip(after, before, strict=True) if a != b]
    assert len(changed) == facts["mine+counterfactual"]["rows_read"] == 5
    for a, b in changed:
        assert a["source"] == "mine+counterfactual"
        assert (a["preference"], a["label_origin"]["preference"]) == (0.0, "llm")
        assert (a["text"], a["id"], b["contrast_text"]) == (b["text"], b["id"], None)


def test_a_kill_costs_the_last_batch_at_most(work: Path, llm: LlmScorer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("redheart.data.llm_labels.LlmScorer", lambda _: llm)
    settings = config("paraphrase", min_similarity=-1, max_shift=1)
    first = augment(records(), FACTS, work, settings)
    file = work / "written-rank0.txt"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    assert all(np.isfinite(json.loads(line)["before"]).all() for line in lines)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:100])  # the kill
    asked: list[str] = []
    write = llm.write
    monkeypatch.setattr(llm, "write", lambda prompts, most: asked.extend(prompts) or write(prompts, most))
    second = augment(records(), FACTS, work, settings)
    assert len(asked) == 2
    assert [r["text"] for r in second[0]] == [r["text"] for r in first[0]]
    monkeypatch.setattr("redheart.data.llm_labels.LlmScorer", lambda _: pytest.fail("all is written"))
    assert augment(records(), FACTS, work, settings) == second
    content = bytearray(file.read_bytes())
    content[content.index(b'"text"') + 12] ^= 1  # a flipped bit: that text is written about again
    file.write_bytes(content)
    assert len(module.lines_so_far(work, "written")) == 5


def test_a_source_cannot_be_named_as_if_the_llm_had_written_it():
    with pytest.raises(RedHeartError, match=r"no '\+'"):
        gather(["mine+paraphrase=x.json"], DataConfig(), False)
