"""Near-duplicates between the splits: which rows leak, found by an exact text match and by FAISS over pooled token features.

FAISS lives in an environment of its own (launch/setup_env.sh --retrieval), reached through Arrow files alone, so that its
packages can never meet torch's. Two texts are duplicates where they are identical (case folded, white space collapsed), whatever
the encoder says, or where the cosine of their mean token states reaches the threshold. A row has one text or, with its
contrast, two; two rows are duplicates where any text of one is a duplicate of any text of the other, since a pair whose one half
stands in the test split gives that half away.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from redheart.console import console, progress
from redheart.data.sources.records import normalised
from redheart.schema import SPLITS, RedHeartError

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("retrieval_worker.py")
VARIABLE = "REDHEART_RETRIEVAL_PYTHON"
REMEDY = (
    f"run launch/setup_env.sh --retrieval in a checkout, pip install 'redheart[retrieval]', or set {VARIABLE} to a Python with faiss-cpu, "
    "numpy and pyarrow"
)
IVF_ABOVE = 65_536  # indexed texts beyond which the search is approximate
MOST_THREADS = 8
EXAMPLES = 8
IDENTICAL = 2.0  # stands for the similarity of identical texts, above every cosine
JUDGES = {"train": ("dev", "test"), "dev": ("test",)}  # rows of a split are dropped where they repeat one of these


@dataclass(frozen=True)
class Leaks:
    """`dropped`: ids of the rows that leak. `report`: plain values for the index.

    threshold, dropped {source: {split: rows}}, identical and near (of the dropped rows, by their closest match), within {split: rows
    with a duplicate in their own split, all kept}, exact {search: bool}, examples [{similarity, split, text, against, other}].
    """

    dropped: frozenset[str]
    report: dict[str, Any]


@dataclass(frozen=True)
class _Texts:
    """Every text of every row, with its contrast: parallel lists, one entry per text."""

    text: list[str]
    row: np.ndarray  # [T] int64, a place in the records
    split: np.ndarray  # [T] int8, a place in SPLITS
    vectors: np.ndarray  # [T, E] float32


def near_leaks(
    records: Sequence[Mapping[str, Any]],
    pooled: np.ndarray,
    contrasts: np.ndarray,
    threshold: float,
    work: Path,
    named: str = "data.dedup_threshold",
) -> Leaks:
    """Finds the train rows that repeat a dev or test row, and the dev rows that repeat a test row; test rows always stay.

    pooled [N, E]: mean token states of the records' texts; contrasts [C, E]: those of the contrast texts that are there, in order.
    Files pass through `work`. `named`: how the user gives the threshold. Raises RedHeartError where FAISS cannot be had or fails, or
    where a split would become empty.
    """
    texts = _texts_of(records, pooled, contrasts)
    a, b, similarity, exact = search(texts.vectors, texts.split, texts.row, threshold, work)
    # of a leaking row: (similarity; 2 if identical, text, text of the other)
    closest: dict[int, tuple[float, int, int]] = {}
    repeated: set[int] = set()  # rows with a duplicate in their own split
    pairs = [*_identical(texts), *zip(a.tolist(), b.tolist(), similarity.tolist(), strict=True)]
    for one, other, value in pairs:
        split, judge = SPLITS[texts.split[one]], SPLITS[texts.split[other]]
        row = int(texts.row[one])
        if split == judge:
            repeated |= {row, int(texts.row[other])}
        elif judge in JUDGES[split] and (row not in closest or value > closest[row][0]):
            closest[row] = (value, one, other)
    dropped: dict[str, Counter[str]] = {}
    for row in closest:
        dropped.setdefault(records[row]["source"], Counter())[records[row]["split"]] += 1
    _refuse_empty(records, dropped, threshold, named)
    identical = sum(value == IDENTICAL for value, _, _ in closest.values())
    within = Counter(records[row]["split"] for row in repeated)
    report = {
        "threshold": threshold,
        "dropped": {source: {s: counts[s] for s in JUDGES} for source, counts in sorted(dropped.items())},
        "identical": identical,
        "near": len(closest) - identical,
        "within": {s: within[s] for s in SPLITS},
        "exact": exact,
        "examples": _examples(records, texts, list(closest.values())),
    }
    return Leaks(frozenset(records[row]["id"] for row in closest), report)


def describe(report: Mapping[str, Any]) -> str:
    """The report of `near_leaks` in a few lines."""
    lines = [
        f"{source}: {' and '.join(f'{n} {s}' for s, n in counts.items() if n)} rows"
        for source, counts in report["dropped"].items()
    ]
    within = ", ".join(f"{n} in {s}" for s, n in report["within"].items())
    return "\n".join(
        [
            f"rows that leak at similarity {report['threshold']:g}: {report['identical'] + report['near']} "
            f"({report['identical']} identical, {report['near']} near)",
            *lines,
            f"rows with a duplicate in their own split, kept: {within}",
            *(
                f"  {e['similarity']:.3f}  {e['split']}: {_short(e['text'])}  |  {e['against']}: {_short(e['other'])}"
                for e in report["examples"]
            ),
        ]
    )


def search(
    vectors: np.ndarray, split: np.ndarray, row: np.ndarray, threshold: float, work: Path, ivf_above: int = IVF_ABOVE
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, bool]]:
    """Runs the worker: (a, b, cosine similarity) of texts at least `threshold` alike, and by search whether it was exact.

    vectors [T, E] float32, split [T] int8, row [T] int64. What is searched, and what is not, is told in retrieval_worker.py.
    """
    python = interpreter()
    work.mkdir(parents=True, exist_ok=True)
    source, target, log = (work / f"neighbours.{end}" for end in ("in.arrow", "out.arrow", "log"))
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
    table = pa.table(
        {
            "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            "split": pa.array(split, pa.int8()),
            "row": pa.array(row, pa.int64()),
        }
    )
    with pa.OSFile(str(source), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    target.unlink(missing_ok=True)
    threads = min(MOST_THREADS, int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    command = [python, "-I", WORKER, source, target, repr(threshold), str(threads), str(ivf_above)]
    limits = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    code = _run([str(c) for c in command], {**os.environ, **limits}, log)
    if code != 0 or not target.is_file():
        tail = " | ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-4:])
        raise RedHeartError(f"the near-duplicate search failed (exit code {code}) in {python}: {tail or 'no message'}")
    with pa.OSFile(str(target), "rb") as file:
        pairs = pa.ipc.open_file(file).read_all()
    for path in (source, target, log):
        path.unlink()
    exact = json.loads(pairs.schema.metadata[b"searches"])
    return *(pairs[name].to_numpy() for name in ("a", "b", "similarity")), exact


def interpreter() -> str:
    """The Python that has FAISS: the variable's, else this one if it is installed here (the worker is a process that imports no
    torch), else the checkout's own environment, which is made on first use."""
    given = os.environ.get(VARIABLE)
    if given:
        python = shutil.which(given)
        if python is None:
            raise RedHeartError(f"{VARIABLE}={given} is not a program: {REMEDY}")
        return python
    if importlib.util.find_spec("faiss") is not None:
        return sys.executable
    environment, script = ROOT / "red_heart_retrieval_env", ROOT / "launch" / "setup_env.sh"
    if not (environment / ".complete").is_file():
        if not script.is_file():
            raise RedHeartError(
                f"the near-duplicate search needs an environment with FAISS, and there is none: {REMEDY}"
            )
        console.print(
            "the near-duplicate search needs FAISS: making its environment, once (launch/setup_env.sh --retrieval) …"
        )
        done = subprocess.run(["bash", str(script), "--retrieval"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            tail = " | ".join(done.stderr.decode(errors="replace").strip().splitlines()[-3:])
            raise RedHeartError(f"the environment with FAISS could not be made ({tail}): {REMEDY}")
    return str(environment / "bin" / "python")


def _texts_of(records: Sequence[Mapping[str, Any]], pooled: np.ndarray, contrasts: np.ndarray) -> _Texts:
    paired = [i for i, r in enumerate(records) if r["contrast_text"] is not None]
    row = np.array([*range(len(records)), *paired], np.int64)
    text = [*(r["text"] for r in records), *(records[i]["contrast_text"] for i in paired)]
    split = np.array([SPLITS.index(r["split"]) for r in records], np.int8)
    return _Texts(text, row, split[row], np.concatenate([pooled, contrasts]))


def _identical(texts: _Texts) -> list[tuple[int, int, float]]:
    """(text, text of another row, IDENTICAL) of one equal text in each split that holds one, as far as it may matter."""
    holders: dict[str, dict[int, list[int]]] = {}  # normalised text: by split up to two texts of different rows
    keys = [normalised(t) for t in texts.text]
    for place, key in enumerate(keys):
        known = holders.setdefault(key, {}).setdefault(int(texts.split[place]), [])
        if len(known) < 2 and all(texts.row[k] != texts.row[place] for k in known):
            known.append(place)
    pairs = []
    for place, key in enumerate(keys):
        own = int(texts.split[place])
        for split, known in holders[key].items():
            if split >= own:
                pairs += [(place, k, IDENTICAL) for k in known if texts.row[k] != texts.row[place]][:1]
    return pairs


def _refuse_empty(
    records: Sequence[Mapping[str, Any]], dropped: Mapping[str, Mapping[str, int]], threshold: float, named: str
) -> None:
    rows = Counter(r["split"] for r in records)
    for split, judges in JUDGES.items():
        if rows[split] and sum(counts.get(split, 0) for counts in dropped.values()) == rows[split]:
            raise RedHeartError(
                f"all {rows[split]} rows of {split} repeat {' or '.join(judges)} rows at similarity {threshold:g}: "
                f"raise {named}, or split the sources otherwise"
            )


def _examples(
    records: Sequence[Mapping[str, Any]], texts: _Texts, matches: Sequence[tuple[float, int, int]]
) -> list[dict[str, Any]]:
    """A few near pairs spread from the least similar one up, then an identical one where there is one."""
    near = sorted(f for f in matches if f[0] < IDENTICAL)
    places = sorted({round(i) for i in np.linspace(0, len(near) - 1, min(EXAMPLES - 1, len(near)))})
    chosen = [near[i] for i in places] + [f for f in matches if f[0] == IDENTICAL][:1]
    return [
        {
            "similarity": round(min(value, 1.0), 4),
            "split": SPLITS[texts.split[one]],
            "text": texts.text[one],
            "against": SPLITS[texts.split[other]],
            "other": texts.text[other],
        }
        for value, one, other in chosen
    ]


def _run(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Runs the worker, its progress as a bar and its errors in `log`; returns the exit code."""
    with log.open("wb") as errors, progress("near-duplicates", 1) as (bar, task):
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        except OSError as error:
            raise RedHeartError(f"{command[0]} cannot be run ({error.strerror}): {REMEDY}") from error
        with process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    done, total, name = line.split(maxsplit=2)
                    bar.update(task, completed=int(done), total=int(total), note=name.strip())
            except BaseException:
                process.kill()
                raise
        return process.returncode


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
