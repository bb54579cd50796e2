"""Small data directories of random features with a known content, and a reader process that can be killed."""

import json
import sys
import time
from pathlib import Path

import numpy as np

from redheart.data.shards import FORMAT_VERSION, INDEX, label_facts, open_shard, write_shard
from redheart.data.stream import SampleStream
from redheart.files import write_sealed_json
from redheart.schema import LABELS

WIDTH = 8
MAX_TOKENS = 16


def make_row(number: int, rng: np.random.Generator) -> dict:
    """Row `number`: every third with a contrast, an emotion with a gap, a regret that grows."""
    row = dict.fromkeys(LABELS)
    row |= {"id": str(number), "source": "s", "split": "train", "lang": "en", "text": "t", "contrast_text": None}
    row["features"] = rng.normal(size=(int(rng.integers(1, MAX_TOKENS + 1)), WIDTH)).astype(np.float16)
    row["contrast_features"] = rng.normal(size=(2, WIDTH)).astype(np.float16) if number % 3 == 0 else None
    row |= {"emotion": [0.25, None, 0.5, 0, 0, 1, 0.75], "regret": (number % 20) / 20}
    row |= {"label_weight": {"emotion": 1.0, "regret": 0.5}, "label_origin": {"emotion": "author", "regret": "llm"}}
    return row


def write_directory(directory: Path, sizes: list[int], repeats: list[int] | None = None, **settings: int) -> list[dict]:
    """A data directory with a training shard of each size; returns all rows in the order they were given."""
    rng = np.random.default_rng(0)
    rows = [make_row(n, rng) for n in range(sum(sizes))]
    shards, start = [], 0
    for k, (size, repeat) in enumerate(zip(sizes, repeats or [1] * len(sizes), strict=True)):
        part = rows[start : start + size]
        shards.append(write_shard(directory / f"train-{k:05d}.arrow", part, WIDTH, MAX_TOKENS, repeat))
        start += size
    opened = [open_shard(directory / s["file"], WIDTH) for s in shards]
    split = {"rows": len(rows), "shards": shards, **label_facts((s.values, s.weights) for s in opened)}
    write_index(directory, {"train": split}, {"name": "random", "width": WIDTH}, **settings)
    return rows


def write_index(directory: Path, splits: dict, encoder: dict, **more: object) -> None:
    """The index of a data directory, sealed."""
    index = {"version": FORMAT_VERSION, "plan": "p", "splits": splits, "encoder": encoder, "sources": {}, **more}
    write_sealed_json(directory / INDEX, index)


def read_and_log(directory: str, log: str, rank: int, world_size: int, start: int, steps: int, batch: int) -> None:
    """Logs {"step", "ids"} of this rank's slice of each step, slowly enough to be killed on the way."""
    stream = SampleStream(directory, "train")
    with Path(log).open("a") as file:
        for step in range(start, steps):
            ids = [i for b in stream.micro_batches(step, 7, batch, 4, rank, world_size) for i in b.ids]
            file.write(json.dumps({"step": step, "ids": ids}) + "\n")
            file.flush()
            time.sleep(0.004)


if __name__ == "__main__":
    read_and_log(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
