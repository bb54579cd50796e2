"""sources -> LLM scores for what is missing -> token features -> SURD label -> shards and index. Resumable.

Work in progress stands in OUT/work: `labels.jsonl` (one line per record the LLM read) and `encoded-00000.safetensors`. A second
call goes on from there; `index.json`, written last, commits the result. `--force-preprocess` starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from redheart.config import DataConfig
from redheart.console import console, progress
from redheart.data.derive import surd_labels
from redheart.data.gather import check_languages, gather, take
from redheart.data.labelling import fill_labels
from redheart.data.questions import QUESTIONS
from redheart.data.shards import FORMAT_VERSION, INDEX, read_index, shard_paths, write_shard
from redheart.files import read_json, write_json
from redheart.schema import LABELS, SPLITS, RedHeartError

CHUNK = 256  # records encoded between two saves


@dataclass
class PrepareReport:
    """Counts of one preparation; kept in the index."""

    out: str
    rows: dict[str, int] = field(default_factory=dict)
    rejected: int = 0
    llm_answers: int = 0
    llm_refused: int = 0
    cut_texts: dict[str, float] = field(default_factory=dict)  # share per source
    labels: dict[str, dict[str, int]] = field(default_factory=dict)  # per label: entries by origin
    reused: bool = False


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
    check_languages(records, config)
    plan = _plan_of(records, config)
    report = PrepareReport(str(out), rejected=rejected)
    if (out / INDEX).is_file():
        return _reuse(out, plan, report)
    work = out / "work"
    if (work / "plan.json").is_file() and read_json(work / "plan.json", "--force-preprocess")["plan"] != plan:
        raise RedHeartError(f"{work} belongs to other sources or settings: choose another --out, or --force-preprocess")
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "plan.json", {"plan": plan})
    labelled = fill_labels(records, work, config)
    report.llm_answers, report.llm_refused = labelled.answers, labelled.refused
    encoder, pooled = _encode(records, work, config, report)
    for record, derived in zip(records, surd_labels(records, pooled), strict=True):
        if record["surd"] is None and derived is not None:
            record["surd"], record["label_origin"]["surd"] = derived, "derived"
    _write(records, out, work, config, encoder, labelled.fingerprint, licences, plan, report)
    shutil.rmtree(work)
    return report


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
