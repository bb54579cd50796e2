"""sources -> LLM scores for what is missing -> token features -> SURD label -> shards and index. Resumable.

The rows of a split are dealt into shards by the hash of their id, so that every shard is a random part of it. Work in progress
stands in OUT/work: the LLM's answers and one file of encoded features per shard. A second call goes on from there;
`index.json`, written last, commits the result. Launched with several processes, each labels and encodes its share.
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

from redheart.config import DataConfig
from redheart.data.card import dataset_card
from redheart.data.derive import surd_labels
from redheart.data.encode import check_languages, encode_parts, load_part
from redheart.data.gather import gather, mix, take
from redheart.data.labelling import fill_labels, form_digest
from redheart.data.order import CHUNK, WINDOW_SHARDS
from redheart.data.shards import FORMAT_VERSION, INDEX, label_histograms, open_shard, write_shard
from redheart.data.store import Store
from redheart.files import read_json, write_json, write_text
from redheart.ranks import launched_rank
from redheart.schema import LABELS, SPLITS, RedHeartError


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
    labelled = fill_labels(records, work, config)
    report.llm_answers, report.llm_refused = labelled.answers, labelled.refused
    report.llm = labelled.report
    parts = deal(records, config)
    encoder, pooled, report.cut_texts = encode_parts([(p.name, p.records) for p in parts], work, config.encoder)
    if launched_rank() > 0:
        return report
    records = [r for p in parts for r in p.records]  # the order of `pooled`
    for record, derived in zip(records, surd_labels(records, pooled), strict=True):
        if record["surd"] is None and derived is not None:
            record["surd"], record["label_origin"]["surd"] = derived, "derived"
    splits = _write(parts, out, work, config, encoder["width"], report)
    index = {
        "version": FORMAT_VERSION, "plan": plan, "chunk": CHUNK, "window_shards": WINDOW_SHARDS, "encoder": encoder,
        "labeler": labelled.fingerprint, "sources": gathered.sources, "report": asdict(report), "splits": splits,
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
        weight = config.mixture.get(record["source"], 1.0) if record["split"] == "train" else 1.0
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
    settings = config.model_dump(mode="json", exclude={"remote"})
    content = json.dumps([records, settings, form_digest()], sort_keys=True, ensure_ascii=False)
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
    report: PrepareReport,
) -> dict[str, Any]:
    """Writes the shards and returns the index entries of the splits."""
    splits: dict[str, dict[str, Any]] = {s: {"rows": 0, "tokens": 0, "shards": []} for s in SPLITS}
    origins: dict[str, Counter[str]] = {name: Counter() for name in LABELS}
    for part in parts:
        states = load_part(work, part.name, part.records)
        rows = [
            {**record, "features": f, "contrast_features": c, "label_weight": _weights(record, config)}
            for record, (f, c) in zip(part.records, states, strict=True)
        ]
        for row in rows:
            for name, label in LABELS.items():
                if row[name] is not None:
                    known = 1 if label.scalar else sum(v is not None for v in row[name])
                    origins[name][row["label_origin"][name]] += known
        split = splits[rows[0]["split"]]
        entry = write_shard(out / f"{part.name}.arrow", rows, width, config.encoder.max_tokens, part.repeat)
        split["shards"].append(entry)
        split["rows"] += entry["rows"]
        split["tokens"] += entry["tokens"]
    for split in splits.values():
        opened = ((open_shard(out / e["file"], width), e["repeat"]) for e in split["shards"])
        split["histograms"] = label_histograms((s.values, s.weights * repeat) for s, repeat in opened)
    report.rows = {s: splits[s]["rows"] for s in SPLITS}
    report.labels = {name: dict(counts) for name, counts in origins.items() if counts}
    return splits


def _weights(record: dict[str, Any], config: DataConfig) -> dict[str, float | None]:
    """1 for what people labelled, `data.labeler.weight` for the rest."""
    return {
        name: None if origin is None else 1.0 if origin in ("human", "author") else config.labeler.weight
        for name, origin in record["label_origin"].items()
    }
