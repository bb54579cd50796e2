"""Every kind of file that is written and read back, each with the function behind its door, and what damage to it comes to.

The table (`-s` shows it) counts, by kind: refused by name, harmless (the same result), silent (another result), tracebacks (any other
exception).
"""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from redheart.config import (
    AugmentConfig,
    DataConfig,
    EncoderConfig,
    LabelerConfig,
    RemoteConfig,
    dump_config,
    load_config,
)
from redheart.data import augment as augmenting
from redheart.data import encode, llm_labels
from redheart.data.labelling import fill_labels
from redheart.data.questions import NUM_WORDS
from redheart.data.shards import INDEX, write_shard
from redheart.data.sources.records import parse_record
from redheart.data.stream import SampleStream
from redheart.evaluation import calibration
from redheart.files import read_sealed_json, write_sealed_json
from redheart.memory import activations
from redheart.owned import MARKER, owned
from redheart.schema import RedHeartError
from redheart.train import grow as growing
from redheart.train.aside import SampleLog
from redheart.train.checkpoint import last
from redheart.train.export import export
from redheart.train.moments import open_moments
from redheart.train.start import train
from redheart.train.stored import load_stored, open_stored
from tests.data.shard_data import MAX_TOKENS, WIDTH, make_row, write_directory

SETTINGS = [
    *("model.width=24", "model.heads=2", "model.layers=1", "model.task_width=16", "model.task_heads=2"),
    *(f"model.encoder_width={WIDTH}", "data.encoder.name=random", "data.encoder.layers=[0]"),
    *(f"data.encoder.max_tokens={MAX_TOKENS}", "memory.strategy=plain", "training.precision=fp32"),
    *("training.max_steps=2", "training.checkpoint_every=1", "training.global_batch_size=4", "training.micro_batch_size=4"),
    "training.log_samples=true",
]  # fmt: skip


class Kind(NamedTuple):
    """`root` is copied anew for every bit; `door` reads it, with `file` in it damaged, and gives what can be compared."""

    root: Path
    file: str
    door: Callable[[Path], Any]


class Encoder:
    """Stands for the frozen encoder: features from a hash of the text."""

    width, device = WIDTH, torch.device("cpu")

    def __init__(self, config: EncoderConfig):
        self.fingerprint = {
            "name": config.name,
            "revision": "r",
            "layers": [0],
            "width": WIDTH,
            "max_tokens": MAX_TOKENS,
        }

    def encode(self, texts: Any, tick: Callable[[int], None] = lambda n: None) -> tuple[list[np.ndarray], list[bool]]:
        drawn = [np.random.default_rng(list(hashlib.sha256(t.encode()).digest())) for t in texts]
        return [d.normal(size=(3, WIDTH)).astype(np.float16) for d in drawn], [False] * len(texts)


class Llm:
    """Stands for the labelling LLM."""

    tokens_read = tokens_written = 0

    def __init__(self, config: LabelerConfig):
        self.fingerprint = {"name": "stub"}

    def score(self, texts: list[str]) -> np.ndarray:
        drawn = [np.random.default_rng(list(t.encode())).random((2, NUM_WORDS)) for t in texts]
        return np.log(np.stack(drawn) / NUM_WORDS).astype(np.float32)

    def write(self, prompts: list[str], most: int) -> list[str]:
        return [f"Again: {p[-20:]}" for p in prompts]


@pytest.fixture(scope="module", name="stubs")
def stand_ins() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "TextEncoder", Encoder)
        patch.setattr(augmenting, "TextEncoder", Encoder)
        patch.setattr(llm_labels, "LlmScorer", Llm)
        yield patch


def records() -> list[dict[str, Any]]:
    raw = [{"text": f"Text {i} says so.", "regret": i / 12, "split": "train"} for i in range(12)]
    return [parse_record(r, f"record {i}", "mine") for i, r in enumerate(raw)]


def write_data(directory: Path, seed: int = 0) -> None:
    """Two training shards and a dev shard of random features."""
    write_directory(directory, [8 - seed, 4 + seed])
    index, rng = read_sealed_json(directory / INDEX, "again"), np.random.default_rng(1 + seed)
    shard = write_shard(directory / "dev-00000.arrow", [make_row(n, rng) for n in range(4)], WIDTH, MAX_TOKENS)
    index["splits"]["dev"] = {"rows": 4, "shards": [shard], "histograms": {}}
    index["levels"] = {"regret": [0.3, 0.6]}
    index["encoder"] = Encoder(EncoderConfig(name="random")).fingerprint
    write_sealed_json(directory / INDEX, index)


def tree(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def exported(root: Path) -> dict[str, str]:
    out = root.parent / "exported"
    shutil.rmtree(out, ignore_errors=True)
    export(root, out)
    return tree(out)


def rows_of(location: str | Path) -> str:
    found = hashlib.sha256()
    for split in ("train", "dev"):
        stream = SampleStream(location, split, RemoteConfig(attempts=1))
        found.update(repr([stream.encoder, stream.index, stream.label_sample()]).encode())
        for row in stream.rows(np.arange(stream.num_rows)):
            found.update(repr(row).encode())
    return found.hexdigest()


def carried(root: Path) -> list[Any]:
    """Weights, moments and settings of a grown export."""
    stored = open_stored(root)
    state = load_stored(stored).state_dict()
    with open_moments(stored) as moments:
        read = {n: moments.read(n) for n, _ in load_stored(stored).named_parameters()}
    digest = hashlib.sha256()
    for tensor in [*state.values(), *itertools.chain(*read.values())]:
        digest.update(tensor.numpy().tobytes())
    return [stored.sizes.to_dict(), stored.config, stored.progress, moments.step, digest.hexdigest()]


def trimmed(root: Path) -> str:
    SampleLog(root, 0, 1, 2)
    return (root / "samples-rank0.jsonl").read_text()


def labelled(root: Path) -> Any:
    found = records()
    result = fill_labels(found, root, DataConfig())
    return found, result.fingerprint, result.report["tokens"]


def augmented(root: Path) -> Any:
    facts = {"mine": {"origin": "o", "licence": "l", "non_commercial": False}}
    settings = AugmentConfig(kind="paraphrase", min_similarity=-1, max_shift=1)
    return augmenting.augment(records(), facts, root, DataConfig(augment=settings))


def encoded(root: Path) -> Any:
    fingerprint, pooled, cut = encode.encode_parts([("p", records())], root, EncoderConfig())
    loaded = [f.tolist() for f, _ in encode.load_part(root, "p", records())]
    return fingerprint, pooled.tolist(), cut, loaded


@pytest.fixture(scope="module", name="kinds")
def every_kind(tmp_path_factory: pytest.TempPathFactory, stubs: pytest.MonkeyPatch) -> dict[str, Kind]:
    return make_kinds(tmp_path_factory.mktemp("kinds"), stubs)


def make_kinds(base: Path, stubs: pytest.MonkeyPatch, seed: int = 0) -> dict[str, Kind]:
    """All kinds below `base`; another seed, another run on other data."""
    data, run, out, grown = (base / n for n in ("data", "run", "export", "grown"))
    data.mkdir()
    write_data(data, seed)
    config = load_config("local", [*SETTINGS, f"training.seed={seed}"])
    torch.manual_seed(seed)
    stubs.setattr("redheart.train.start.check_memory", lambda *_: None)  # measures for a while
    train(config, data, run)
    export(run, out)
    larger = load_config(
        "local", [*SETTINGS, "model.width=48", "model.heads=4", "model.task_width=32", "model.task_heads=4"]
    )
    stubs.setattr(growing, "SHARD_SIZE", 500_000)
    growing.grow(run, larger, grown, moments=True)
    work = base / "work"
    for door in (labelled, augmented, encoded):
        (work / door.__name__).mkdir(parents=True)
        door(work / door.__name__)
    cache = base / "cache"
    stubs.setenv("XDG_CACHE_HOME", str(cache))
    step = activations.MicroStep(*range(1, 1 + len(activations.MicroStep.__dataclass_fields__)))
    stubs.setattr(activations, "measure", lambda *_: step)

    def looked_up(root: Path) -> Any:
        stubs.setenv("XDG_CACHE_HOME", str(root))
        return activations.activations(config, 8, False, torch.float32)

    def fetched(root: Path) -> str:
        """From a store, into an empty cache."""
        shutil.rmtree(root.parent / "empty", ignore_errors=True)
        stubs.setenv("XDG_CACHE_HOME", str(root.parent / "empty"))
        return rows_of(f"file://{root}")

    def kept(root: Path) -> str:
        """From a cache; a damaged shard in it is fetched again."""
        stubs.setenv("XDG_CACHE_HOME", str(root))
        return rows_of(f"file://{data}")

    kept(base / "fetched")
    shard = next((base / "fetched").rglob("*.arrow")).relative_to(base / "fetched")
    looked_up(cache)
    cached = next(p.relative_to(cache) for p in cache.rglob("*.json"))
    checkpoint = last(run)
    assert checkpoint is not None
    inside = str(checkpoint.relative_to(run))
    found = {
        f"checkpoint {name}": Kind(run, f"{inside}/{name}", exported)
        for name in ("manifest.json", "trainer.json", "config.yaml", "plain_state.pt")
    }
    found |= {
        f"pointer {name}": Kind(run, f"checkpoints/{name}", exported)
        for name in ("last", "best")
        if (run / "checkpoints" / name).exists()
    }
    found |= {
        "run config.yaml": Kind(run, "config.yaml", lambda r: dump_config(load_config(str(r / "config.yaml")))),
        "run marker": Kind(run, MARKER, lambda r: owned(r, "run")),
        "sample log": Kind(run, "samples-rank0.jsonl", trimmed),
    }
    calibrated = next(run.rglob(calibration.CALIBRATION))
    found["calibration"] = Kind(calibrated.parent, calibrated.name, calibration.read)
    found |= {f"export {p.name}": Kind(out, p.name, exported) for p in sorted(out.iterdir()) if p.name != "README.md"}
    grown_files = ["manifest.json", "moments.json", "model.safetensors.index.json"]
    grown_files += [min(p.name for p in grown.glob(f"{kind}-*.safetensors")) for kind in ("model", "moments")]
    found |= {f"grown {name}": Kind(grown, name, carried) for name in grown_files}
    found |= {
        "data index": Kind(data, INDEX, rows_of),
        "data shard": Kind(data, "train-00001.arrow", rows_of),
        "remote index": Kind(data, INDEX, fetched),
        "remote shard": Kind(data, "train-00000.arrow", fetched),
        "cached shard": Kind(base / "fetched", str(shard), kept),
        "LLM answers": Kind(work / "labelled", "labels-rank0.txt", labelled),
        "LLM facts": Kind(work / "labelled", "labeler-rank0.json", labelled),
        "LLM texts": Kind(work / "augmented", "written-rank0.txt", augmented),
        "encoded part": Kind(work / "encoded", next((work / "encoded").glob("encoded-p*")).name, encoded),
        "activations": Kind(cache, str(cached), looked_up),
    }
    return found


def flip_bits(kinds: dict[str, Kind], bits: int, directory: Path) -> dict[str, Counter[str]]:
    """How often each kind came to which end."""
    table: dict[str, Counter[str]] = {}
    results: dict[tuple[Path, Callable[[Path], Any]], Any] = {}  # of what is undamaged
    for number, (name, kind) in enumerate(kinds.items()):
        ends = table[name] = Counter()
        root = directory / f"kind-{number}" / "root"

        def read(changed: bytes | None = None, root: Path = root, kind: Kind = kind) -> Any:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(kind.root, root)
            if changed is not None:
                (root / kind.file).write_bytes(changed)
            torch.manual_seed(0)
            return kind.door(root)

        whole, source = (kind.root / kind.file).read_bytes(), (kind.root, kind.door)
        expected = results[source] if source in results else results.setdefault(source, read())
        chosen = random.Random(name)
        for _ in range(bits):
            place, bit = chosen.randrange(len(whole)), chosen.randrange(8)
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            try:
                ends["harmless" if read(bytes(changed)) == expected else f"silent at {place}.{bit}"] += 1
            except RedHeartError as error:
                ends["refused" if Path(kind.file).name in str(error) else f"not named: {error}"] += 1
            except Exception as error:
                ends[f"traceback at {place}.{bit}: {error!r}"] += 1
        print(f"{name:35} {bits:3} flips: {dict(ends)}", flush=True)
        shutil.rmtree(root.parent, ignore_errors=True)
    return table


def assert_nothing_silent(table: dict[str, Counter[str]]) -> None:
    wrong = {
        name: {end: n for end, n in ends.items() if end not in ("refused", "harmless")} for name, ends in table.items()
    }
    assert not any(wrong.values()), {name: ends for name, ends in wrong.items() if ends}
