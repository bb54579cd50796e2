"""The labelling step of `prepare`: asks the LLM what no human labelled. Resumable per text; each process asks about its share.

Answers stand in WORK/labels-rankN.txt, a sealed line per text, appended: a kill costs at most the last one. They are read by every
rank of any later call, whatever its number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from redheart.config import DataConfig
from redheart.console import console, is_verbose, progress, table
from redheart.data.encode import wait_for
from redheart.data.label_quality import judge
from redheart.data.questions import HEADING, lacks, lists
from redheart.files import check_sealed_json, read_sealed_json, sealed_line, write_sealed_json
from redheart.ranks import launched_rank, launched_world_size
from redheart.schema import LABELS, RedHeartError


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
    answers = lines_so_far(work, "labels")
    logp = np.array([answers[key_of(r)]["logp"] for r in unlabelled], np.float32)
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
    rank, facts_file = launched_rank(), _facts_file(work, launched_rank())
    done = lines_so_far(work, "labels", mend=rank)
    unanswered = share_of(records, done)
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
    share = len(done) // launched_world_size()
    with (
        (work / f"labels-rank{rank}.txt").open("a", encoding="utf-8") as file,
        progress("LLM labels", share + len(unanswered), share) as (bar, task),
    ):
        for start in range(0, len(unanswered), batch):
            rows = unanswered[start : start + batch]
            for record, logp in zip(rows, scorer.score([r["text"] for r in rows]).tolist(), strict=True):
                file.write(sealed_line({"key": key_of(record), "logp": logp}))
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


def key_of(record: Mapping[str, Any]) -> str:
    """Of a text in the files of this step and of augment.py."""
    return hashlib.sha256(f"{record['id']}\0{record['text']}".encode()).hexdigest()[:32]


def share_of(records: Sequence[dict[str, Any]], done: Collection[str]) -> list[dict[str, Any]]:
    """This process's share of the records whose keys are not `done`, short texts first."""
    missing = [r for r in records if key_of(r) not in done]
    return sorted(missing[launched_rank() :: launched_world_size()], key=lambda r: len(r["text"]))


def _facts_file(work: Path, rank: int) -> Path:
    return work / f"labeler-rank{rank}.json"


def lines_so_far(work: Path, name: str, mend: int | None = None) -> dict[str, dict[str, Any]]:
    """All whole lines of the files WORK/NAME-rankN.txt by their keys, without damaged ones; what a kill cut short at the end of file
    number `mend` is cut off."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(work.glob(f"{name}-rank*.txt")):
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content) and mend is not None and path.name == f"{name}-rank{mend}.txt":
            with path.open("r+b") as file:
                file.truncate(whole)
        for text in content[:whole].splitlines():
            with contextlib.suppress(ValueError, RedHeartError):
                line = check_sealed_json(json.loads(text), path, "")
                found[line["key"]] = line
    return found


def _show(questions: Sequence[dict[str, Any]]) -> None:
    rows = [
        (f"{q['label']}.{q['entry']}", f"{q['mass']:.2f}", f"{q['spread']:.3f}",
         "" if q["agreement"] is None else f"{q['agreement']:.3f}", q["compared"], q["reason"] or "labels")
        for q in questions
    ]  # fmt: skip
    titles = ["answer", "mass", "spread", "agreement", "compared with", "becomes"]
    console.print(table("the LLM's answers", titles, rows))
