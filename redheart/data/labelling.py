"""The labelling step of `prepare`: asks the LLM what no human labelled. Resumable per text; each process asks about its share.

Answers stand in WORK/labels-rankN.bin, one record of fixed size per text, appended: a kill costs at most the last one. They are
read by every rank of any later call, whatever its number of processes.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from redheart.config import DataConfig
from redheart.console import console, is_verbose, progress, table
from redheart.data.encode import wait_for
from redheart.data.label_quality import judge
from redheart.data.questions import FORM, HEADING, lacks, lists
from redheart.files import read_sealed_json, write_sealed_json
from redheart.ranks import launched_rank, launched_world_size
from redheart.schema import LABELS, RedHeartError

NUM_WORDS = sum(len(q.words) for q in FORM)
# sum: the CRC-32 of what stands before it
ANSWER = np.dtype([("key", "S32"), ("logp", "<f4", (2, NUM_WORDS)), ("sum", "<u4")])


@dataclass
class Labelled:
    """What the labelling step did. `fingerprint` names the LLM; None where nothing was asked."""

    fingerprint: dict[str, Any] | None = None
    answers: int = 0
    refused: int = 0
    report: dict[str, Any] = field(default_factory=dict)


def fill_labels(records: list[dict[str, Any]], work: Path, config: DataConfig) -> Labelled:
    """Fills what the records lack with the LLM's scores, of the questions whose answers are good enough."""
    result = Labelled()
    unlabelled = chosen([r for r in records if lacks(r)], config.labeler.max_texts)
    if not unlabelled:
        return result
    facts = _ask(unlabelled, work, config)
    wait_for([_facts_file(work, rank) for rank in range(launched_world_size())])
    answers = _answers(work)
    logp = np.stack([answers[_key(r)] for r in unlabelled])
    accepted, questions = judge(unlabelled, logp, config.labeler)
    for row, record in enumerate(unlabelled):
        for name in lacks(record):
            names = LABELS[name].names
            values = [float(accepted[name, e][row]) if (name, e) in accepted else None for e in names]
            given = sum(v is not None for v in values)
            result.answers += given
            result.refused += len(values) - given
            if given:
                record[name] = values[0] if LABELS[name].scalar else values
                record["label_origin"][name] = "llm"
    result.fingerprint = facts["fingerprint"]
    result.report = {
        "texts": len(unlabelled), "seconds": facts["seconds"], "tokens": facts["tokens"], "questions": questions,
    }  # fmt: skip
    if is_verbose():
        _show(questions)
    else:
        refused = [f"{q['label']}.{q['entry']} ({q['reason']})" for q in questions if q["reason"]]
        console.print(
            f"the LLM labelled {len(unlabelled)} texts: {len(questions) - len(refused)} of {len(questions)} answers become labels"
            + (f", not {', '.join(refused)}" if refused else "")
        )
    return result


def chosen(records: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
    """`most` of the records, by the hashes of their ids: sources and splits in proportion."""
    if most is None or most >= len(records):
        return records
    keep = set(sorted(hashlib.sha256(r["id"].encode()).hexdigest() for r in records)[:most])
    return [r for r in records if hashlib.sha256(r["id"].encode()).hexdigest() in keep]


def _ask(records: Sequence[dict[str, Any]], work: Path, config: DataConfig) -> dict[str, Any]:
    """Appends this process's missing answers; returns the facts of its work."""
    rank, size = launched_rank(), launched_world_size()
    facts_file = _facts_file(work, rank)
    done = _answers(work, mend=rank)
    missing = [r for r in records if _key(r) not in done]
    unanswered = sorted(missing[rank::size], key=lambda r: len(r["text"]))
    facts: dict[str, Any] = {"seconds": 0.0, "tokens": 0}
    if facts_file.is_file():
        facts = read_sealed_json(facts_file, "--force-preprocess labels anew")
    if not unanswered and "fingerprint" in facts:
        return facts
    from redheart.data.llm_labels import LlmScorer

    console.print(f"loading the labelling LLM {config.labeler.name} ({config.labeler.quantization}) …")
    scorer = LlmScorer(config.labeler)
    if facts.get("fingerprint", scorer.fingerprint) != scorer.fingerprint:
        raise RedHeartError(f"{work} holds answers of another LLM: --force-preprocess labels anew")
    begin, batch = time.monotonic(), config.labeler.batch_size
    share = len(done) // size
    with (
        (work / f"labels-rank{rank}.bin").open("ab") as file,
        progress("LLM labels", share + len(unanswered), share) as (bar, task),
    ):
        for start in range(0, len(unanswered), batch):
            rows = unanswered[start : start + batch]
            lines = np.zeros(len(rows), ANSWER)
            lines["key"] = [_key(r) for r in rows]
            lines["logp"] = scorer.score([r["text"] for r in rows])
            lines["sum"] = _sums(lines)
            file.write(lines.tobytes())
            file.flush()
            rate = scorer.tokens_read / (time.monotonic() - begin)
            bar.update(task, advance=len(rows), note=f"{scorer.tokens_read:,} tokens, {rate:,.0f}/s")
    facts["seconds"] += time.monotonic() - begin
    facts["tokens"] += scorer.tokens_read
    facts["fingerprint"] = scorer.fingerprint
    write_sealed_json(facts_file, facts)
    return facts


def form_digest() -> str:
    """A word that changes with the questions."""
    content = json.dumps([HEADING, lists(False), lists(True)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _key(record: dict[str, Any]) -> bytes:
    return hashlib.sha256(f"{record['id']}\0{record['text']}".encode()).hexdigest()[:32].encode()


def _sums(lines: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(line.tobytes()[:-4]) for line in lines], np.uint32)


def _facts_file(work: Path, rank: int) -> Path:
    return work / f"labeler-rank{rank}.json"


def _answers(work: Path, mend: int | None = None) -> dict[bytes, np.ndarray]:
    """All whole answers so far, without damaged ones; what a kill cut short at the end of file number `mend` is cut off."""
    answers: dict[bytes, np.ndarray] = {}
    for path in sorted(work.glob("labels-rank*.bin")):
        content = path.read_bytes()
        whole = len(content) // ANSWER.itemsize * ANSWER.itemsize
        if whole < len(content) and mend is not None and path.name == f"labels-rank{mend}.bin":
            with path.open("r+b") as file:
                file.truncate(whole)
        lines = np.frombuffer(content[:whole], ANSWER)
        lines = lines[lines["sum"] == _sums(lines)]
        answers.update(zip(lines["key"].tolist(), lines["logp"], strict=True))
    return answers


def _show(questions: Sequence[dict[str, Any]]) -> None:
    rows = [
        (f"{q['label']}.{q['entry']}", f"{q['mass']:.2f}", f"{q['spread']:.3f}",
         "" if q["agreement"] is None else f"{q['agreement']:.3f}", q["compared"], q["reason"] or "labels")
        for q in questions
    ]  # fmt: skip
    titles = ["answer", "mass", "spread", "agreement", "compared with", "becomes"]
    console.print(table("the LLM's answers", titles, rows))
