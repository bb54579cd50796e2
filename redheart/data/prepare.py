"""sources -> LLM scores for what is missing -> token features -> near-duplicates out (on demand) -> SURD label -> shards and
index. Resumable.

The rows of a split are dealt into shards by the hash of their id, so that every shard is a random part of it. Work in progress
stands in OUT/work: the LLM's answers and one file of encoded features per shard. A second call goes on from there;
`index.json`, written last, commits the result. Launched with several processes, each labels and encodes its share.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redheart.config import DataConfig
from redheart.console import console
from redheart.data.augment import PROMPTS, augment
from redheart.data.card import dataset_card
from redheart.data.derive import surd_labels
from redheart.data.encode import check_languages, contrast_means, encode_parts, load_part
from redheart.data.gather import gather, mix, take
from redheart.data.labelling import fill_labels, form_digest
from redheart.data.neighbours import describe, near_leaks
from redheart.data.order import CHUNK, WINDOW_SHARDS
from redheart.data.shards import FORMAT_VERSION, INDEX, SplitsWriter
from redheart.data.store import Store
from redheart.files import read_json, write_json, write_text
from redheart.ranks import check_launch, launched_rank
from redheart.schema import SPLITS, RedHeartError


@dataclass
class PrepareReport:
    """Counts of one preparation; kept in the index."""

    out: str
    rows: dict[str, int] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    rejected: int = 0
    llm_answers: int = 0
    llm_refused: int = 0
    llm: dict[str, Any] = field(default_factory=dict)
    cut_texts: dict[str, float] = field(default_factory=dict)  # share per source
    labels: dict[str, dict[str, int]] = field(default_factory=dict)  # per label: entries by origin
    duplicates: dict[str, Any] = field(
        default_factory=dict
    )  # as data/neighbours.py reports them; empty without --dedup
    reused: bool = False


@dataclass(frozen=True)
class Part:
    """The records of one future shard."""

    name: str  # such as train-00003
    records: list[dict[str, Any]]
    repeat: int


def prepare(
    sources: Sequence[str],
    out: Path,
    config: DataConfig,
    num_samples: int | None = None,
    force: bool = False,
    skip_invalid: bool = False,
) -> PrepareReport:
    """Prepares a data directory; see the module's docstring. Raises RedHeartError on any input that breaks the schema."""
    check_launch()
    if force and launched_rank() == 0 and out.is_dir() and ((out / INDEX).is_file() or (out / "work").is_dir()):
        shutil.rmtree(out)
    gathered = gather(sources, config, skip_invalid, out / "rejected.jsonl")
    records = take(mix(gathered.records, config.mixture), num_samples)
    check_languages(records, config.encoder)
    plan = _plan_of(records, config)
    report = PrepareReport(str(out), sources=gathered.sources, rejected=gathered.rejected)
    if (out / INDEX).is_file():
        return _reuse(out, plan, report)
    work = out / "work"
    _claim(work, plan)
    records, written = augment(records, gathered.sources, work, config)
    report.sources = gathered.sources | written
    labelled = fill_labels(records, work, config)
    report.llm_answers, report.llm_refused = labelled.answers, labelled.refused
    report.llm = labelled.report
    parts = deal(records, config)
    named = [(p.name, p.records) for p in parts]
    encoder, pooled, report.cut_texts = encode_parts(named, work, config.encoder)
    if launched_rank() > 0:
        return report
    records = [r for p in parts for r in p.records]  # the order of `pooled`
    dropped: Set[str] = frozenset()
    if config.dedup:
        contrasts = contrast_means(named, work, encoder["width"])
        leaks = near_leaks(records, pooled, contrasts, config.dedup_threshold, work)
        dropped, report.duplicates = leaks.dropped, leaks.report
        kept = [i for i, r in enumerate(records) if r["id"] not in dropped]
        records, pooled = [records[i] for i in kept], pooled[kept]
        console.print(describe(leaks.report))
    for record, derived in zip(records, surd_labels(records, pooled), strict=True):
        if record["surd"] is None and derived is not None:
            record["surd"], record["label_origin"]["surd"] = derived, "derived"
    splits = _write(parts, out, work, config, encoder["width"], dropped, report)
    index = {
        "version": FORMAT_VERSION, "plan": plan, "chunk": CHUNK, "window_shards": WINDOW_SHARDS, "encoder": encoder,
        "labeler": labelled.fingerprint, "sources": report.sources, "report": asdict(report), "splits": splits,
    }  # fmt: skip
    write_text(out / "README.md", dataset_card(index))
    write_json(out / INDEX, index)
    shutil.rmtree(work)
    return report


def deal(records: Sequence[dict[str, Any]], config: DataConfig) -> list[Part]:
    """Deals the records of each split into shards of at most `rows_per_shard`, in the order of their ids' hashes.

    Training rows of a source with an integer mixing weight above 1 get shards of their own, shown so many times an epoch.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        weight = config.mixture.get(record["source"].split("+")[0], 1.0) if record["split"] == "train" else 1.0
        groups.setdefault((record["split"], max(1, int(weight))), []).append(record)
    parts: list[Part] = []
    numbers = dict.fromkeys(SPLITS, 0)
    for split, repeat in sorted(groups, key=lambda g: (SPLITS.index(g[0]), g[1])):
        rows = sorted(groups[split, repeat], key=lambda r: hashlib.sha256(r["id"].encode()).digest())
        for start in range(0, len(rows), config.rows_per_shard):
            name = f"{split}-{numbers[split]:05d}"
            parts.append(Part(name, rows[start : start + config.rows_per_shard], repeat))
            numbers[split] += 1
    return parts


def _plan_of(records: list[dict[str, Any]], config: DataConfig) -> str:
    """A digest of everything that the result depends on."""
    without = {"remote"} if config.dedup else {"remote", "dedup", "dedup_threshold"}
    settings = config.model_dump(mode="json", exclude=without)
    content = json.dumps([records, settings, form_digest(), PROMPTS], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _claim(work: Path, plan: str) -> None:
    path = work / "plan.json"
    if path.is_file() and read_json(path, "--force-preprocess")["plan"] != plan:
        raise RedHeartError(f"{work} belongs to other sources or settings: choose another --out, or --force-preprocess")
    if launched_rank() == 0:
        write_json(path, {"plan": plan})
    work.mkdir(parents=True, exist_ok=True)


def _reuse(out: Path, plan: str, report: PrepareReport) -> PrepareReport:
    store = Store(out)
    if store.index["plan"] != plan:
        raise RedHeartError(
            f"{out} holds data of other sources or settings: choose another --out, or --force-preprocess"
        )
    for split in SPLITS:
        for entry in store.shards(split):
            store.fetch(entry)
    known = {k: v for k, v in store.index["report"].items() if k != "out"}
    return PrepareReport(**{**asdict(report), **known, "reused": True})


def _write(
    parts: Sequence[Part],
    out: Path,
    work: Path,
    config: DataConfig,
    width: int,
    dropped: Set[str],
    report: PrepareReport,
) -> dict[str, Any]:
    """Writes the shards, without the rows whose ids are in `dropped`, and returns the index entries of the splits."""
    writer = SplitsWriter(out, width, config.encoder.max_tokens)
    for part in parts:
        rows = [
            {**record, "features": f, "contrast_features": c, "label_weight": _weights(record, config)}
            for record, (f, c) in zip(part.records, load_part(work, part.name, part.records), strict=True)
            if record["id"] not in dropped
        ]
        writer.write(f"{part.name}.arrow", rows, part.repeat)
    splits = writer.finish()
    report.rows = {s: splits[s]["rows"] for s in SPLITS}
    report.labels = writer.labels
    return splits


def _weights(record: dict[str, Any], config: DataConfig) -> dict[str, float | None]:
    """1 for what people labelled, `data.labeler.weight` for the rest."""
    return {
        name: None if origin is None else 1.0 if origin in ("human", "author") else config.labeler.weight
        for name, origin in record["label_origin"].items()
    }
