"""`prepare --augment`: the LLM writes training texts anew, or what could have been done instead; marked, gated and counted.

    paraphrase      a further row with the text in other words and the labels of the original, origin `derived`
    counterfactual  a contrast text for a row that has none, and a preference for it, origin `llm`

Such a row's source is called SOURCE+paraphrase or SOURCE+counterfactual. What was written is kept only if the encoder finds it similar
(cosine of the mean token states) and the LLM's own answers agree: those of a paraphrase must hardly move, and of a counterfactual
the act must become more right and its effect more of a help. Dev and test rows are left as they are. Writing stands in
WORK/written-rankN.txt, a line per text: a kill costs at most the last batch.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from redheart.config import DataConfig
from redheart.console import console, progress
from redheart.data.encode import TextEncoder, wait_for
from redheart.data.fingerprint import mean_state
from redheart.data.label_quality import calibrated
from redheart.data.labelling import chosen, key_of, lines_so_far, share_of
from redheart.files import sealed_line, write_json
from redheart.ranks import launched_rank, launched_world_size
from redheart.schema import SPLITS, RedHeartError

MAX_NEW_TOKENS = 64
PROMPTS = {
    "paraphrase": """Each text is written again in other words, with the same meaning.

Text: My brother lent me money and I never paid him back.
Again: I borrowed money from my brother, and he never got it back.

Text: The nurse stayed with me all night, although her shift was over.
Again: Even after her shift had ended, the nurse sat by my bed until morning.

Text: {text}
Again:""",
    "counterfactual": """Each text is followed by what could have been done better instead.

Text: My brother lent me money and I never paid him back.
Better: My brother lent me money, and I paid him back as soon as I could.

Text: I saw an old man fall and walked on, since I was late.
Better: I saw an old man fall and helped him up, although I was late.

Text: {text}
Better:""",
}


def augment(
    records: list[dict[str, Any]], sources: Mapping[str, Mapping[str, Any]], work: Path, config: DataConfig
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """(the records with what was written and kept, the facts of the new sources: rows asked for, kept, and refused by reason)."""
    kind = config.augment.kind
    if kind is None:
        return records, {}
    train = (r for r in records if r["split"] == "train")
    askable = [r for r in train if kind == "paraphrase" or r["contrast_text"] is None]
    originals = chosen(askable, config.augment.max_texts)
    if not originals:
        raise RedHeartError(f"data.augment.kind = {kind}: no training record is left to write about")
    name = _write(originals, work, config)
    wait_for([_done_file(work, rank) for rank in range(launched_world_size())])
    written = lines_so_far(work, "written")
    rewrites = [written[key_of(r)] for r in originals]
    reasons = dict(zip((r["id"] for r in originals), judge(originals, rewrites, config), strict=True))
    if kind == "paraphrase":
        _refuse_repeats(records, originals, rewrites, reasons)
    texts = {r["id"]: w["text"] for r, w in zip(originals, rewrites, strict=True)}
    by_source: dict[str, list[str]] = {}
    for record in originals:
        by_source.setdefault(record["source"], []).append(reasons[record["id"]])
    facts = {f"{source}+{kind}": _facts(kind, name, sources[source], why) for source, why in by_source.items()}
    out = []
    for record in records:
        text = texts.get(record["id"])
        if text is None or reasons[record["id"]]:
            out.append(record)
        elif kind == "counterfactual":
            out.append(_with_contrast(record, text))
        else:
            out += [record, _again(record, text)]
    kept = sum(f["rows_kept"] for f in facts.values())
    console.print(
        f"{kind}: {len(originals)} written, {kept} kept; refused: {dict(Counter(r for r in reasons.values() if r))}"
    )
    return out, facts


def judge(records: Sequence[Mapping[str, Any]], rewrites: Sequence[Mapping[str, Any]], config: DataConfig) -> list[str]:
    """Why each rewrite is refused; empty where it is kept."""
    limits, n = config.augment, len(records)
    logp = np.array([r["before"] for r in rewrites] + [r["after"] for r in rewrites], np.float32)
    scores, _ = calibrated(logp)
    before = np.stack([s[:n] for s in scores.values()], 1)
    after = np.stack([s[n:] for s in scores.values()], 1)
    shift = np.abs(after - before).mean(1)
    act, effect = (
        scores[e][n:] - scores[e][:n] for e in (("acceptability", "acceptability"), ("ethics", "utilitarian"))
    )
    reasons = []
    for row, (record, rewrite) in enumerate(zip(records, rewrites, strict=True)):
        reason = ""
        if not rewrite["text"]:
            reason = "not finished"
        elif _plain(rewrite["text"]) == _plain(record["text"]):
            reason = "the same text"
        elif any(_plain(line) in _plain(rewrite["text"]) for line in _examples(str(limits.kind))):
            reason = "repeats an example"
        elif rewrite["similarity"] < limits.min_similarity:
            reason = f"similarity below {limits.min_similarity:g}"
        elif limits.kind == "paraphrase" and shift[row] > limits.max_shift:
            reason = f"the LLM's answers move by more than {limits.max_shift:g}"
        elif limits.kind == "counterfactual" and min(act[row], effect[row]) < limits.min_gain:
            reason = f"act or effect better by less than {limits.min_gain:g} to the LLM"
        reasons.append(reason)
    return reasons


def _refuse_repeats(
    records: Sequence[Mapping[str, Any]],
    originals: Sequence[Mapping[str, Any]],
    rewrites: Sequence[Mapping[str, Any]],
    reasons: dict[str, str],
) -> None:
    """A paraphrase that is a text of any split, or was written before, is refused too."""
    known = {_plain(r["text"]) for r in records}
    for record, rewrite in zip(originals, rewrites, strict=True):
        plain = _plain(rewrite["text"])
        if not reasons[record["id"]] and plain in known:
            reasons[record["id"]] = "a text that is there already"
        known.add(plain)


def _examples(kind: str) -> list[str]:
    """The texts of a prompt's examples and what stands under them."""
    return [line.partition(": ")[2] for line in PROMPTS[kind].splitlines() if ": " in line and "{text}" not in line]


def _write(records: Sequence[dict[str, Any]], work: Path, config: DataConfig) -> str:
    """Appends this process's missing lines; returns the LLM's name."""
    rank = launched_rank()
    share = share_of(records, lines_so_far(work, "written", mend=rank))
    if share:
        from redheart.data.llm_labels import LlmScorer

        console.print(f"loading the LLM {config.labeler.name} ({config.labeler.quantization}) and the encoder …")
        llm, encoder, begin = LlmScorer(config.labeler), TextEncoder(config.encoder), time.monotonic()
        with (
            (work / f"written-rank{rank}.txt").open("a", encoding="utf-8") as file,
            progress(str(config.augment.kind), len(share)) as (bar, task),
        ):
            for start in range(0, len(share), config.labeler.batch_size):
                rows = share[start : start + config.labeler.batch_size]
                texts = [r["text"] for r in rows]
                again = llm.write(
                    [PROMPTS[str(config.augment.kind)].format(text=" ".join(t.split())) for t in texts], MAX_NEW_TOKENS
                )
                both = [*texts, *(a or t for a, t in zip(again, texts, strict=True))]
                logp = llm.score(both).round(4)
                means = np.stack([mean_state(f, encoder.fingerprint) for f in encoder.encode(both)[0]])
                means /= np.linalg.norm(means, axis=1, keepdims=True)
                for i, (record, text) in enumerate(zip(rows, again, strict=True)):
                    line = {
                        "key": key_of(record), "text": text, "similarity": float(means[i] @ means[i + len(rows)]),
                        "before": logp[i].tolist(), "after": logp[i + len(rows)].tolist(),
                    }  # fmt: skip
                    file.write(sealed_line(line))
                file.flush()
                rate = llm.tokens_written / (time.monotonic() - begin)
                bar.update(task, advance=len(rows), note=f"{llm.tokens_written:,} tokens written, {rate:,.0f}/s")
    write_json(_done_file(work, rank), {"name": config.labeler.name})
    return config.labeler.name


def _again(record: dict[str, Any], text: str) -> dict[str, Any]:
    origins = {n: None if o is None else "derived" for n, o in record["label_origin"].items()}
    identity = hashlib.sha256(f"paraphrase\0{record['id']}".encode()).hexdigest()[:20]
    return record | {
        "id": identity, "text": text, "source": f"{record['source']}+paraphrase", "label_origin": origins,
    }  # fmt: skip


def _with_contrast(record: dict[str, Any], text: str) -> dict[str, Any]:
    origins = record["label_origin"] | {"preference": "llm"}
    return record | {
        "contrast_text": text, "source": f"{record['source']}+counterfactual", "preference": 0.0, "label_origin": origins,
    }  # fmt: skip


def _facts(kind: str, llm: str, source: Mapping[str, Any], reasons: Sequence[str]) -> dict[str, Any]:
    kept = sum(not r for r in reasons)
    return {
        "origin": f"{kind} written by {llm}: {source['origin']}",
        "licence": source["licence"],
        "non_commercial": source["non_commercial"],
        "rows_read": len(reasons),
        "rows_kept": kept,
        "rows_rejected": len(reasons) - kept,
        "splits": {s: kept if s == "train" else 0 for s in SPLITS},
        "rejected": dict(Counter(r for r in reasons if r)),
        "left_out": {},
    }


def _done_file(work: Path, rank: int) -> Path:
    return work / f"written-rank{rank}.json"


def _plain(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())
