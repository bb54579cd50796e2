"""sources -> LLM scores for what is missing -> token features -> near-duplicates out (on demand) -> SURD label -> shards and
index. Resumable.

The rows of a split are dealt into shards by the hash of their id, so that every shard is a random part of it. Work in progress
stands in OUT/work: the LLM's answers and one file of encoded features per shard. A second call goes on from there;
`index.json`, written last, commits the result. An earlier result is removed when only its successor's shards are left to write.
Launched with several processes, each labels and encodes its share; the first one alone claims the directory and writes the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redheart.config import DataConfig
from redheart.console import console
from redheart.data.augment import PROMPTS, augment
from redheart.data.card import cut_texts, dataset_card
from redheart.data.derive import surd_labels, training_edges
from redheart.data.directory import (
    CARD,
    KIND,
    REJECTED,
    WORK,
    claim,
    make_room,
    refuse_sources_of_ours,
    start_afresh,
    written,
)
from redheart.data.encode import contrast_means, encode_parts, load_part, wait_for
from redheart.data.gather import Gathered, digest_of, gather, mix, set_aside, take, tell_crossing, write_rejected
from redheart.data.labelling import chosen, fill_labels, form_digest
from redheart.data.neighbours import describe, near_leaks
from redheart.data.order import CHUNK, WINDOW_SHARDS
from redheart.data.pretrained import revision
from redheart.data.questions import lacks
from redheart.data.readable import check_languages, unreadable
from redheart.data.reuse import contents_of, refuse_itself
from redheart.data.shards import FORMAT_VERSION, INDEX, LABEL_REMEDY, SplitsWriter
from redheart.data.store import Store
from redheart.device import chosen_device
from redheart.files import read_sealed_json, telling_no_room, write_sealed_json, write_text
from redheart.owned import exclusive, make_directory, owned, remove
from redheart.ranks import after_main, check_launch, launched_rank
from redheart.schema import JUDGED_ORIGINS, SPLITS, RedHeartError

RECIPE = 2  # raised where the same input gives other shards than before, and nothing else in the plan says so
DONE = "done"
OTHER = "other sources, models or settings, or of another version: choose another --out, or --force-preprocess"


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
    cut_texts: dict[str, float] = field(default_factory=dict)  # share per source, contrast texts included
    cut_counts: dict[str, list[int]] = field(default_factory=dict)  # per source: texts cut, texts
    unlabelled: list[str] = field(default_factory=list)  # splits with rows and without a label
    labels: dict[str, dict[str, int]] = field(default_factory=dict)  # per label: entries by origin
    duplicates: dict[str, Any] = field(default_factory=dict)  # of data/neighbours.py; empty without --dedup
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
    renew: bool = False,
    wait: bool = False,
) -> PrepareReport:
    """Prepares a data directory; see the module's docstring. Raises RedHeartError on any input that breaks the schema.

    `force`: afresh, whatever earlier work is there; `renew`: only where it is of other sources or settings. `wait`: each
    process of a launch returns when the result is there.
    """
    check_launch()
    refuse_itself(config.features_from, out)
    gathered = gather(sources, config, skip_invalid)
    records = take(mix(gathered.records, config.mixture), num_samples)
    for encoder in config.encoder.each:
        if not skip_invalid:
            check_languages(records, encoder)
        gathered, records = set_aside(gathered, records, unreadable(records, encoder), skip_invalid, encoder.name)
    if not config.dedup:
        tell_crossing(records)
    plan = _plan_of(records, gathered, config)
    report = PrepareReport(str(out), sources=gathered.sources, rejected=len(gathered.refused))
    kept = "; what is prepared so far is kept, and the same again goes on from there"
    with telling_no_room(f"writing {out}", kept), ExitStack() as held:
        if after_main(lambda: _claim(sources, out, plan, deal(records, config), gathered, force, renew, held)) == DONE:
            return _reuse(out, report, config)
        report = _make(records, gathered, out, config, plan, report)
    if wait and launched_rank() > 0:
        wait_for([out / INDEX], lambda _: _holds(out, plan))
    return report


def _make(
    records: list[dict[str, Any]], gathered: Gathered, out: Path, config: DataConfig, plan: str, report: PrepareReport
) -> PrepareReport:
    work, read = out / WORK, digest_of(gathered.records)
    records, written = augment(records, gathered.sources, work, config)
    report.sources = gathered.sources | written
    labelled = fill_labels(records, work, config)
    report.llm_answers, report.llm_refused = labelled.answers, labelled.refused
    report.llm = labelled.report
    parts = deal(records, config)
    if launched_rank() == 0:
        claim(out, _files(parts))  # more of them than before where the LLM wrote texts
    named = [(p.name, p.records) for p in parts]
    encoder, pooled, report.cut_counts = encode_parts(named, work, config.encoder, config.features_from, config.remote)
    if launched_rank() > 0:
        return report
    report.cut_texts = {source: cut / texts for source, (cut, texts) in report.cut_counts.items()}
    records = [r for p in parts for r in p.records]  # the order of `pooled`
    dropped: Set[str] = frozenset()
    if config.dedup:
        contrasts = contrast_means(named, work, encoder)
        leaks = near_leaks(records, pooled, contrasts, config.dedup_threshold, work)
        dropped, report.duplicates = leaks.dropped, leaks.report
        kept = [i for i, r in enumerate(records) if r["id"] not in dropped]
        records, pooled = [records[i] for i in kept], pooled[kept]
        console.print(describe(leaks.report))
    for record, derived in zip(records, surd_labels(records, pooled), strict=True):
        if record["surd"] is None and derived is not None:
            record["surd"], record["label_origin"]["surd"] = derived, "derived"
    levels = training_edges(records)
    make_room(out, _files(parts))
    splits = _write(parts, out, work, config, encoder, dropped, report)
    index = {
        "version": FORMAT_VERSION, "plan": plan, "chunk": CHUNK, "window_shards": WINDOW_SHARDS, "encoder": encoder,
        "labeler": labelled.fingerprint, "levels": levels,
        "sources": report.sources, "read": read, "report": asdict(report), "splits": splits,
    }  # fmt: skip
    write_text(out / CARD, dataset_card(index))
    write_sealed_json(out / INDEX, index)
    remove(work)
    _say(report, config)
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


def _plan_of(records: list[dict[str, Any]], gathered: Gathered, config: DataConfig) -> str:
    """A digest of everything that the result depends on: what was read, the settings, the models, and how this program works."""
    without = {"remote", "file", "features_from"} | (set() if config.dedup else {"dedup", "dedup_threshold"})
    settings = config.model_dump(mode="json", exclude=without)
    if config.features_from:  # they decide the last bits of the features
        settings["features_from"] = contents_of(config.features_from, config.remote)
    device = chosen_device(config.encoder.device, "data.encoder.device")
    settings["encoder"]["device"] = device.type  # decides the last bits of the features
    if not config.encoder.beside:
        del settings["encoder"]["beside"]  # what a version without it prepared is the same
    asks = config.augment.kind is not None or bool(chosen([r for r in records if lacks(r)], config.labeler.max_texts))
    models = [*(revision(e.name) for e in config.encoder.each), revision(config.labeler.name) if asks else None]
    program = [RECIPE, FORMAT_VERSION, CHUNK, WINDOW_SHARDS, form_digest(), PROMPTS]
    content = [records, gathered.sources, settings, models, program]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _claim(
    sources: Sequence[str],
    out: Path,
    plan: str,
    parts: Sequence[Part],
    gathered: Gathered,
    force: bool,
    renew: bool,
    held: ExitStack,
) -> str:
    """Makes the directory ours, for as long as `held` lasts; DONE where it holds the result already."""
    refuse_sources_of_ours(sources, out)
    force = force or (renew and _is_other(out, plan))
    if not force and _is_done(out, plan) and not (out / WORK).exists():
        return DONE  # nothing is written: others may be reading it, or this place may be read-only
    make_directory(out, "--out")
    held.enter_context(exclusive(out, "preparing"))
    if force:
        start_afresh(out)
    elif _is_done(out, plan):
        if WORK in owned(out, KIND) and (renew or _plan_at_work(out) in (None, plan)):
            remove(
                out / WORK
            )  # of a preparation that ended before it had cleaned up; what began to replace this one stays
        return DONE
    claim(out, _files(parts), bool(gathered.refused))
    if _plan_at_work(out) not in (None, plan):
        raise RedHeartError(f"{out / WORK} belongs to {OTHER}")
    write_sealed_json(out / WORK / "plan.json", {"plan": plan})
    if gathered.refused:
        write_rejected(gathered.refused, out / REJECTED)
    elif REJECTED in owned(out, KIND):
        remove(out / REJECTED)  # of an earlier call
    return ""


def _is_done(out: Path, plan: str) -> bool:
    """Whether the result is there; RedHeartError where it is another one."""
    ours = written(out)
    if INDEX not in ours:
        return False  # none, or the user's own: `claim` says so
    if Store(out).index["plan"] == plan:
        return True
    if WORK in ours and _plan_at_work(out) == plan:
        return False  # an earlier call was told to replace it
    raise RedHeartError(f"{out} holds data of {OTHER}")


def _holds(out: Path, plan: str) -> bool:
    """Whether the result is there, asked while another process writes it."""
    try:
        return Store(out).index["plan"] == plan
    except RedHeartError:  # the earlier one was removed
        return False


def _plan_at_work(out: Path) -> str | None:
    path = out / WORK / "plan.json"
    return read_sealed_json(path, "--force-preprocess").get("plan") if path.is_file() else None


def _is_other(out: Path, plan: str) -> bool:
    """Whether we prepared something else there, or began to."""
    ours = written(out)
    plans = {Store(out).index["plan"] if INDEX in ours else None, _plan_at_work(out) if WORK in ours else None} - {None}
    return bool(plans) and plan not in plans


def _files(parts: Sequence[Part]) -> list[str]:
    return [f"{part.name}.arrow" for part in parts]


def _reuse(out: Path, report: PrepareReport, config: DataConfig) -> PrepareReport:
    if launched_rank() > 0:
        return report
    store = Store(out)
    for split in SPLITS:
        for entry in store.shards(split):
            store.fetch(entry)
    known = {k: v for k, v in store.index["report"].items() if k != "out"}
    report = PrepareReport(**{**asdict(report), **known, "reused": True})
    _say(report, config)
    return report


def _say(report: PrepareReport, config: DataConfig) -> None:
    """What a user has to know of a result that is whole all the same."""
    for line in cut_texts({"report": asdict(report), "encoder": {"max_tokens": config.encoder.max_tokens}}):
        console.print(f"{line} (for more, --set data.encoder.max_tokens=N, at most 512)")
    if report.unlabelled:
        console.print(
            f"no row of {', '.join(report.unlabelled)} has a label"
            + (", and `redheart train` refuses such data" if "train" in report.unlabelled else "")
            + f": {LABEL_REMEDY}"
        )


def _write(
    parts: Sequence[Part],
    out: Path,
    work: Path,
    config: DataConfig,
    encoder: dict[str, Any],
    dropped: Set[str],
    report: PrepareReport,
) -> dict[str, Any]:
    """Writes the shards, without the rows whose ids are in `dropped`, and returns the index entries of the splits."""
    writer = SplitsWriter(out, encoder["width"], encoder["max_tokens"])
    for part in parts:
        rows = [
            {**record, "features": f, "contrast_features": c, "label_weight": _weights(record, config)}
            for record, (f, c) in zip(part.records, load_part(work, part.name, part.records), strict=True)
            if record["id"] not in dropped
        ]
        writer.write(f"{part.name}.arrow", rows, part.repeat)
    splits = writer.finish()
    report.rows = {s: splits[s]["rows"] for s in SPLITS}
    report.labels, report.sources = writer.labels, writer.sources(report.sources)
    report.unlabelled = [s for s in SPLITS if splits[s]["rows"] and not splits[s]["histograms"]]
    return splits


def _weights(record: dict[str, Any], config: DataConfig) -> dict[str, float | None]:
    """1 for what people labelled, `data.labeler.weight` for the rest."""
    return {
        name: None if origin is None else 1.0 if origin in JUDGED_ORIGINS else config.labeler.weight
        for name, origin in record["label_origin"].items()
    }
