"""`redheart bench loader`: how fast samples reach the step, beside `datasets` streaming with a shuffle buffer.

Both sides read the same columns of the same shards in the same run, in turn, and hand out the same thing: padded token
features, a mask, and every label with its weight as tensors. Theirs is tried in each format its documentation names for
iterable data sets; the fastest one counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer

from redheart.bench.timing import interleaved
from redheart.caches import cache_directory
from redheart.config import DataConfig, LabelerConfig
from redheart.console import console
from redheart.data.order import Order, positions
from redheart.data.prepare import prepare
from redheart.data.stream import SampleStream
from redheart.memory.budget import status_bytes
from redheart.schema import LABELS, Batch, RedHeartError

BUFFER = 1000  # the shuffle buffer of their documentation's examples
COLUMNS = ["id", "features", "contrast_features", *LABELS, "label_weight"]
FORMATS = ("arrow", "numpy", "torch")
Counted = tuple[int, int, int]  # samples, real tokens, tokens with padding
Read = tuple[list[Any], list[Any], dict[str, torch.Tensor]]  # [T, E] tensors; the same or None for contrasts; labels


def bench_loader(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="A prepared directory. [default: GoEmotions and ETHICS, prepared once]"),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1024, help="Samples prepared without --data.")] = 8192,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
) -> dict[str, Any]:
    """Samples per second into padded batches, beside `datasets` streaming with a shuffle buffer: medians of interleaved rounds."""
    rounds, seconds = 5, 2.0
    directory = data or _default_data(rows)
    stream = SampleStream(directory, "train")
    files = [str(directory / e["file"]) for e in stream.store.shards("train")]
    trial, failing = {}, {}
    for form in FORMATS:
        try:
            trial[form] = _rate(_their_batches(files, batch_size, form, 0), seconds)[0]
        except AttributeError as error:  # datasets 5 cannot read a batch as NumPy whose first row lacks a nested column
            failing[form] = str(error)
    fastest = max(trial, key=lambda f: trial[f])
    console.print("their formats, samples per second: " + ", ".join(f"{f} {r:,.0f}" for f, r in trial.items()))
    if failing:
        console.print(f"`datasets` cannot read these shards as {', '.join(failing)}: {next(iter(failing.values()))}")
    _rate(_our_batches(stream, batch_size, 0), seconds)
    rates: dict[str, list[tuple[float, float]]] = {"redheart": [], "datasets": []}
    for i in range(rounds):
        rates["redheart"].append(_rate(_our_batches(stream, batch_size, i), seconds))
        rates["datasets"].append(_rate(_their_batches(files, batch_size, fastest, i), seconds))
    speed = {name: median(r for r, _ in taken) for name, taken in rates.items()}
    return {
        "samples_per_s": speed,
        "ratio": speed["redheart"] / speed["datasets"],
        "padding_fraction": {n: median(p for _, p in taken) for n, taken in rates.items()},
        "rows": stream.num_rows,
        "batch_size": batch_size,
        "datasets_format": fastest,
        "datasets_samples_per_s_by_format": trial,
        "datasets_formats_that_fail": failing,
        "shuffle_buffer": BUFFER,
        "first_batch_s": first_batch_seconds(),
        "private_memory_growth_mib_over_100k_rows": _growth(stream, batch_size),
    }


def first_batch_seconds(batch_size: int = 32) -> dict[str, float]:
    """Seconds to build the order and compute a batch at two positions, of 10 and of 10 million rows (a synthetic index)."""
    small = {"shards": [{"rows": 10, "buckets": [[5, 4], [9, 6]]}]}
    large = {"shards": [{"rows": 2048, "buckets": [[n, 64] for n in range(3, 35)]}] * 4883}

    def first(split: dict[str, Any], step: int = 0) -> None:
        Order(split, seed=0).samples(positions(step, batch_size))

    runs = {"10_rows": partial(first, small), "10m_rows": partial(first, large)}
    runs["10m_rows_position_9m"] = partial(first, large, 281_250)
    return {name: median(took) for name, took in interleaved(runs, 7).items()}


def _default_data(rows: int) -> Path:
    """Real texts, prepared once into the cache: GoEmotions and ETHICS pairs where they are, else an error that says how."""
    out = cache_directory() / f"bench-loader-{rows}"
    config = DataConfig(labeler=LabelerConfig(max_texts=0))
    prepare(corpora("goemotions", "ethics"), out, config, num_samples=rows)
    return out


def corpora(*names: str) -> list[str]:
    """`--source` of corpora below $REDHEART_DATA; RedHeartError where one of them is not there."""
    root = Path(os.environ.get("REDHEART_DATA", "../shared/data"))
    missing = [str(root / name) for name in names if not (root / name).is_dir()]
    if missing:
        raise RedHeartError(
            f"{missing[0]} is missing: set REDHEART_DATA to the corpora (`bench loader`: or give --data)"
        )
    return [f"{name}={root / name}" for name in names]


def _our_batches(stream: SampleStream, batch_size: int, seed: int) -> Iterator[Counted]:
    step = 0
    while True:
        for batch in stream.micro_batches(step, seed, batch_size, batch_size, 0, 1):
            yield _count(batch)
        step += 1


def _count(batch: Batch) -> Counted:
    real = int(batch.mask.sum()) + int(batch.contrast_mask.sum())
    return len(batch), real, batch.mask.numel() + batch.contrast_mask.numel()


def _their_batches(files: list[str], batch_size: int, form: str, seed: int) -> Iterator[Counted]:
    import datasets

    datasets.disable_progress_bars()
    from_numpy = partial(_from_rows, lambda states: torch.from_numpy(np.stack(list(states)).astype(np.float16)))
    from_torch = partial(_from_rows, lambda states: torch.stack(list(states)) if isinstance(states, list) else states)
    readers: dict[str, Callable[[Any], Read]] = {"arrow": _from_arrow, "numpy": from_numpy, "torch": from_torch}
    stream = datasets.load_dataset("arrow", data_files=files, streaming=True, split="train")
    stream = stream.select_columns(COLUMNS).shuffle(seed=seed, buffer_size=BUFFER).with_format(form)
    while True:
        for rows in stream.iter(batch_size=batch_size):
            features, contrasts, _ = readers[form](rows)
            real = padded = 0
            for states in (features, [c for c in contrasts if c is not None and len(c)]):
                if states:
                    block = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
                    real += sum(len(s) for s in states)
                    padded += block.shape[0] * block.shape[1]
            yield len(features), real, padded


def _from_arrow(rows: Any) -> Read:
    states: list[list[Any]] = []
    for name in ("features", "contrast_features"):
        column = rows[name].combine_chunks()
        width = column.type.value_type.list_size
        offsets, valid = column.offsets.to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)
        values = torch.from_numpy(column.values.values.to_numpy().reshape(-1, width).copy())
        states.append([values[a:b] if v else None for a, b, v in zip(offsets[:-1], offsets[1:], valid)])
    labels = {}
    for name, label in LABELS.items():
        column = rows[name].combine_chunks()
        if label.scalar:
            labels[name] = torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())
        else:
            filled = np.full((len(column), label.size), np.nan, np.float32)
            known = column.is_valid().to_numpy(zero_copy_only=False)
            filled[known] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, label.size)
            labels[name] = torch.from_numpy(filled)
    return states[0], states[1], labels


def _from_rows(tensor: Callable[[Any], torch.Tensor], rows: Any) -> Read:
    features, contrasts = (
        [None if states is None else tensor(states) for states in rows[name]]
        for name in ("features", "contrast_features")
    )
    return features, contrasts, {name: _filled(rows[name], label.size) for name, label in LABELS.items()}


def _filled(column: Any, size: int) -> torch.Tensor:
    values = np.full((len(column), size), np.nan, np.float32)
    for i, value in enumerate(column):
        if value is not None:
            values[i] = np.asarray(value, dtype=np.float32)
    return torch.from_numpy(values)


def _rate(batches: Iterator[Counted], seconds: float) -> tuple[float, float]:
    """(samples per second, share of padding) over a while, the first batch not counted."""
    next(batches)
    samples = real = padded = 0
    started = time.perf_counter()
    while (took := time.perf_counter() - started) < seconds or not samples:
        n, r, p = next(batches)
        samples, real, padded = samples + n, real + r, padded + p
    return samples / took, 1 - real / padded


def _growth(stream: SampleStream, batch_size: int, rows: int = 100_000) -> float:
    """Private memory (RssAnon) that the process gains over so many rows, after a first pass; mapped file pages are the kernel's."""
    batches = _our_batches(stream, batch_size, 99)
    for _ in range(min(rows, 2 * stream.rows_per_epoch) // batch_size):
        next(batches)
    before = status_bytes("RssAnon")
    for _ in range(rows // batch_size):
        next(batches)
    return (status_bytes("RssAnon") - before) / 2**20
