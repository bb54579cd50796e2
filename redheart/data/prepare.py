"""sources -> LLM scores for what is missing -> token features -> SURD label -> shards and index. Resumable.

Work in progress stands in OUT/work: `labels.jsonl` (one line per record the LLM read) and `encoded-00000.safetensors`. A second
call goes on from there; `index.json`, written last, commits the result. `--force-preprocess` starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from redheart.config import DataConfig
from redheart.console import console, progress
from redheart.data.derive import surd_labels
from redheart.data.questions import QUESTIONS, missing_questions
from redheart.data.shards import FORMAT_VERSION, INDEX, read_index, shard_paths, write_shard
from redheart.data.sources import everyday
from redheart.data.sources.records import InvalidRecord, parse_record, read_records
from redheart.files import read_json, write_json, write_text
from redheart.schema import LABELS, SPLITS, RedHeartError

CHUNK = 256  # records encoded between two saves


@dataclass
class PrepareReport:
    """What happened, for people and for `--json`."""

    out: str
    rows: dict[str, int] = field(default_factory=dict)
    rejected: int = 0
    llm_answers: int = 0
    llm_refused: int = 0
    cut_texts: dict[str, float] = field(default_factory=dict)  # share per source
    labels: dict[str, dict[str, int]] = field(default_factory=dict)  # per label: entries by origin
    reused: bool = False


def gather(
    sources: Sequence[str], skip_invalid: bool, rejected_file: Path
) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """(records, licence per source, number rejected) of `NAME=PATH` sources; `everyday` alone names the shipped corpus.

    The first invalid record stops everything, or, with skip_invalid, is written to `rejected_file` with its reason.
    """
    records: dict[str, dict[str, Any]] = {}
    licences, rejected = {}, []
    for spec in sources:
        name, _, given = spec.partition("=")
        if not given and name != everyday.NAME:
            raise RedHeartError(f"--source {spec!r}: write it as NAME=PATH (only {everyday.NAME!r} needs no path)")
        path = everyday.path() if name == everyday.NAME and not given else Path(given)
        licences[name] = everyday.LICENCE if path == everyday.path() else "the user's own"
        for number, raw in read_records(path, name):
            try:
                record = parse_record(raw, f"{path}: record {number}", name)
                if record["id"] in records:
                    raise InvalidRecord(
                        f"{path}: record {number}: its id {record['id']} (or its text) is there already"
                    )
                records[record["id"]] = record
            except InvalidRecord as error:
                if not skip_invalid:
                    raise RedHeartError(f"{error} (--skip-invalid leaves such records out)") from None
                rejected.append(
                    {
                        "source": name,
                        "record": number,
                        "reason": str(error),
                        "content": raw if isinstance(raw, dict) else str(raw),
                    }
                )
    if rejected:
        write_text(rejected_file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected))
    if not records:
        raise RedHeartError(f"no record is left of {', '.join(sources)}: the data set is empty")
    return list(records.values()), licences, len(rejected)


def take(records: list[dict[str, Any]], num_samples: int | None) -> list[dict[str, Any]]:
    """The first `num_samples` records, splits kept in proportion; each split keeps at least one where there is room."""
    if num_samples is None or num_samples >= len(records):
        return records
    by_split = {s: [r for r in records if r["split"] == s] for s in SPLITS}
    quota = {s: num_samples * len(rows) // len(records) for s, rows in by_split.items()}
    if num_samples >= len(SPLITS):
        quota = {s: max(q, 1 if by_split[s] else 0) for s, q in quota.items()}
    quota["train"] = min(len(by_split["train"]), num_samples - quota["dev"] - quota["test"])
    return [r for s in SPLITS for r in by_split[s][: quota[s]]]


def prepare(
    sources: Sequence[str],
    out: Path,
    config: DataConfig,
    num_samples: int | None = None,
    force: bool = False,
    skip_invalid: bool = False,
) -> PrepareReport:
    """Prepares a data directory; see the module's docstring. Raises RedHeartError on any input that breaks the schema."""
    if force and out.is_dir() and ((out / INDEX).is_file() or (out / "work").is_dir()):
        shutil.rmtree(out)
    records, licences, rejected = gather(sources, skip_invalid, out / "rejected.jsonl")
    records = take(records, num_samples)
    _check_languages(records, config)
    plan = _plan_of(records, config)
    report = PrepareReport(str(out), rejected=rejected)
    if (out / INDEX).is_file():
        return _reuse(out, plan, report)
    work = out / "work"
    if (work / "plan.json").is_file() and read_json(work / "plan.json", "--force-preprocess")["plan"] != plan:
        raise RedHeartError(f"{work} belongs to other sources or settings: choose another --out, or --force-preprocess")
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "plan.json", {"plan": plan})
    labeler = _label(records, work, config, report)
    encoder, pooled = _encode(records, work, config, report)
    for record, label in zip(records, surd_labels(records, pooled), strict=True):
        if record["surd"] is None and label is not None:
            record["surd"], record["label_origin"]["surd"] = label, "derived"
    _write(records, out, work, config, encoder, labeler, licences, plan, report)
    shutil.rmtree(work)
    return report


def _check_languages(records: Iterable[dict[str, Any]], config: DataConfig) -> None:
    foreign = Counter(r["lang"] for r in records if r["lang"] not in config.encoder.languages)
    if foreign:
        lang, count = foreign.most_common(1)[0]
        raise RedHeartError(
            f"{count} records are in {lang!r}, which encoder {config.encoder.name} was not made for (data.encoder.languages = "
            f"{list(config.encoder.languages)}): choose a multilingual encoder, or add the language there if it really reads it"
        )


def _plan_of(records: list[dict[str, Any]], config: DataConfig) -> str:
    """A digest of everything that the result depends on."""
    content = json.dumps([records, config.model_dump(mode="json"), QUESTIONS], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _reuse(out: Path, plan: str, report: PrepareReport) -> PrepareReport:
    index = read_index(out)
    if index["plan"] != plan:
        raise RedHeartError(
            f"{out} holds data of other sources or settings: choose another --out, or --force-preprocess"
        )
    for split in SPLITS:
        shard_paths(out, index, split)
    known = {k: v for k, v in index["report"].items() if k != "out"}
    return PrepareReport(**{**asdict(report), **known, "reused": True})


def _label(
    records: list[dict[str, Any]], work: Path, config: DataConfig, report: PrepareReport
) -> dict[str, Any] | None:
    """Fills what the records lack with the LLM's scores; returns the LLM's fingerprint (None where nothing was asked)."""
    asked = {r["id"]: missing_questions(r) for r in records}
    done = _finished_lines(work / "labels.jsonl")
    todo = [r for r in records if asked[r["id"]] and r["id"] not in done]
    fingerprint = None
    if todo:
        from redheart.data.llm_labels import LlmScorer

        console.print(f"loading the labelling LLM {config.labeler.name} ({config.labeler.quantization}) …")
        scorer = LlmScorer(config.labeler)
        fingerprint = scorer.fingerprint
        write_json(work / "labeler.json", fingerprint)
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
        fingerprint = read_json(work / "labeler.json", "--force-preprocess")
    for record in records:
        for (name, entry, _), (score, mass) in zip(asked[record["id"]], done.get(record["id"], []), strict=True):
            if mass < config.labeler.min_mass:
                report.llm_refused += 1
                continue
            report.llm_answers += 1
            if LABELS[name].scalar:
                record[name] = score
            else:
                record[name] = record[name] or [None] * LABELS[name].size
                record[name][entry] = score
            record["label_origin"][name] = record["label_origin"][name] or "llm"
    return fingerprint


def _finished_lines(path: Path) -> dict[str, Any]:
    """Answers by record; a last line cut by a kill is dropped."""
    if not path.is_file():
        return {}
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    write_text(path, whole + "\n" if whole else "")
    return {line["id"]: line["answers"] for line in map(json.loads, whole.splitlines())}


def _encode(
    records: list[dict[str, Any]], work: Path, config: DataConfig, report: PrepareReport
) -> tuple[dict[str, Any], np.ndarray]:
    """Encodes texts and contrasts chunk by chunk into the work directory; returns the fingerprint and pooled features [N, E]."""
    from redheart.data.encode import TextEncoder

    console.print(f"loading the encoder {config.encoder.name} …")
    encoder = TextEncoder(config.encoder)
    cut: Counter[str] = Counter()
    pooled = np.zeros((len(records), encoder.width), np.float32)
    with progress("token features", len(records)) as (bar, task):
        for start in range(0, len(records), CHUNK):
            path, rows = work / f"encoded-{start:09d}.safetensors", records[start : start + CHUNK]
            if not path.is_file():
                texts = [r["text"] for r in rows]
                contrasts = [r["contrast_text"] for r in rows if r["contrast_text"] is not None]
                features, _ = encoder.encode(texts, lambda n: bar.advance(task, n))
                contrast_features, _ = encoder.encode(contrasts)
                states = {f"t{i}": f for i, f in enumerate(features)}
                states |= {f"c{i}": f for i, f in enumerate(contrast_features)}
                save_file(states, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").rename(path)
            pooled[start : start + len(rows)] = [t.astype(np.float32).mean(0) for t, _ in load_chunk(path, rows)]
            bar.update(task, completed=start + len(rows))
    lengths = encoder.tokenizer([r["text"] for r in records])["input_ids"]
    for record, ids in zip(records, lengths, strict=True):
        cut[record["source"]] += len(ids) > config.encoder.max_tokens
    totals = Counter(r["source"] for r in records)
    report.cut_texts = {source: cut[source] / count for source, count in totals.items()}
    return encoder.fingerprint, pooled


def load_chunk(path: Path, rows: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(features, contrast features or None) of the records of one encoded chunk."""
    saved = load_file(path)
    contrasts = iter([saved[f"c{i}"] for i in range(len(saved) - len(rows))])
    return [(saved[f"t{i}"], None if row["contrast_text"] is None else next(contrasts)) for i, row in enumerate(rows)]


def _write(
    records: list[dict[str, Any]],
    out: Path,
    work: Path,
    config: DataConfig,
    encoder: dict[str, Any],
    labeler: dict[str, Any] | None,
    licences: dict[str, str],
    plan: str,
    report: PrepareReport,
) -> None:
    splits: dict[str, dict[str, Any]] = {s: {"rows": 0, "tokens": 0, "shards": []} for s in SPLITS}
    origins: dict[str, Counter[str]] = {name: Counter() for name in LABELS}
    waiting: dict[str, list[dict[str, Any]]] = {s: [] for s in SPLITS}

    def flush(split: str) -> None:
        entry = write_shard(
            out / f"{split}-{len(splits[split]['shards']):05d}.parquet", waiting[split], encoder["width"]
        )
        splits[split]["shards"].append(entry)
        splits[split]["rows"] += entry["rows"]
        splits[split]["tokens"] += entry["tokens"]
        waiting[split] = []

    for start in range(0, len(records), CHUNK):
        rows = records[start : start + CHUNK]
        for record, (features, contrast) in zip(
            rows, load_chunk(work / f"encoded-{start:09d}.safetensors", rows), strict=True
        ):
            origin = record["label_origin"]
            for name, label in LABELS.items():
                if record[name] is not None:
                    origins[name][origin[name]] += 1 if label.scalar else sum(v is not None for v in record[name])
            weight = {
                n: None if o is None else 1.0 if o in ("human", "author") else config.labeler.weight
                for n, o in origin.items()
            }
            waiting[record["split"]].append(
                {**record, "features": features, "contrast_features": contrast, "label_weight": weight}
            )
            if len(waiting[record["split"]]) == config.rows_per_shard:
                flush(record["split"])
    for split in SPLITS:
        if waiting[split]:
            flush(split)
    report.rows = {s: splits[s]["rows"] for s in SPLITS}
    report.labels = {name: dict(counts) for name, counts in origins.items() if counts}
    write_json(
        out / INDEX,
        {
            "version": FORMAT_VERSION, "plan": plan, "splits": splits, "encoder": encoder, "labeler": labeler,
            "licences": licences, "report": asdict(report),
        },
    )  # fmt: skip
