"""The labelling step of `prepare`: asks the LLM what no human labelled. Resumable, one line of answers per record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redheart.config import DataConfig
from redheart.console import console, progress
from redheart.data.questions import missing_questions
from redheart.files import read_json, write_json, write_text
from redheart.schema import LABELS


@dataclass
class Labelled:
    """What the labelling step did. `fingerprint` names the LLM; None where nothing was asked."""

    fingerprint: dict[str, Any] | None = None
    answers: int = 0
    refused: int = 0


def fill_labels(records: list[dict[str, Any]], work: Path, config: DataConfig) -> Labelled:
    """Fills what the records lack with the LLM's scores."""
    result = Labelled()
    asked = {r["id"]: missing_questions(r) if config.labeler.max_texts != 0 else [] for r in records}
    done = _finished_lines(work / "labels.jsonl")
    todo = [r for r in records if asked[r["id"]] and r["id"] not in done]
    if todo:
        from redheart.data.llm_labels import LlmScorer

        console.print(f"loading the labelling LLM {config.labeler.name} ({config.labeler.quantization}) …")
        scorer = LlmScorer(config.labeler)
        result.fingerprint = scorer.fingerprint
        write_json(work / "labeler.json", result.fingerprint)
        total = sum(bool(a) for a in asked.values())
        with (
            (work / "labels.jsonl").open("a", encoding="utf-8") as file,
            progress("LLM labels", total, total - len(todo)) as (bar, task),
        ):
            for record in todo:
                answers = scorer.score(record["text"], [q for _, _, q in asked[record["id"]]])
                done[record["id"]] = [[a.score, a.mass] for a in answers]
                file.write(json.dumps({"id": record["id"], "answers": done[record["id"]]}) + "\n")
                file.flush()
                bar.advance(task)
    elif (work / "labeler.json").is_file():
        result.fingerprint = read_json(work / "labeler.json", "--force-preprocess")
    for record in records:
        for (name, entry, _), (score, mass) in zip(asked[record["id"]], done.get(record["id"], []), strict=True):
            if mass < config.labeler.min_mass:
                result.refused += 1
                continue
            result.answers += 1
            if LABELS[name].scalar:
                record[name] = score
            else:
                record[name] = record[name] or [None] * LABELS[name].size
                record[name][entry] = score
            record["label_origin"][name] = record["label_origin"][name] or "llm"
    return result


def _finished_lines(path: Path) -> dict[str, Any]:
    """Answers by record; a last line cut by a kill is dropped."""
    if not path.is_file():
        return {}
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    write_text(path, whole + "\n" if whole else "")
    return {line["id"]: line["answers"] for line in map(json.loads, whole.splitlines())}
