"""`redheart bench encoder`: which frozen encoder to build on, and which of its layers, by linear probes on the dev splits of real corpora.

Each text is one vector, the mean of its token features. Emotions: logistic regression per emotion, macro-F1 with thresholds
chosen on the training texts, and macro ROC-AUC. Valence, arousal, dominance: ridge regression, Pearson's r. Pairs: logistic regression on
standardised differences without intercept, accuracy. Theories: logistic regression, ROC-AUC. Test splits are not touched.

An encoder is read once, all of the layers that are asked for together.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import typer

from redheart.bench.loader import corpora
from redheart.config import DataConfig, EncoderConfig
from redheart.console import console, progress
from redheart.data.encode import TextEncoder
from redheart.data.gather import gather
from redheart.data.pretrained import OPTIONAL, encoder_path, naming_model, package_directory
from redheart.evaluation.answers import Answers, tuned_macro_f1
from redheart.schema import EMOTIONS, ETHICS, LABELS, PACKAGED, RedHeartError

SOURCES = ("goemotions", "emobank", "ethics")
FEWEST = 100  # rows of a split from which a task is judged
Records = Sequence[dict[str, Any]]
Layers = tuple[int, ...]
Vectors = dict[str, np.ndarray]  # of every text
Entry = tuple[str, int | None]  # a label, and the place of one of its entries


def bench_encoder(
    encoder: Annotated[
        list[str] | None, typer.Option("--encoder", help="A package, a directory or a hub id; may be repeated.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", help="Hidden layers read together, as 4+6, or `each` alone; may be repeated."),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option("--source", metavar="NAME=PATH", help="As of `prepare`; may be repeated.")
    ] = None,
    train_texts: Annotated[int, typer.Option("--train-texts", min=100, help="Most training texts of a task.")] = 4000,
    dev_texts: Annotated[int, typer.Option("--dev-texts", min=100, help="Most dev texts of a task.")] = 1500,
) -> dict[str, Any]:
    """Encoders and their layers under linear probes on dev splits.

    By default the packaged ones that are installed, at their layers (of another encoder each layer), on GoEmotions, EmoBank and ETHICS.
    A task, or an entry of one, with fewer than 100 training or dev rows, or with labels all alike, is left out. texts_per_s is of
    reading up to the deepest layer that is asked for.
    """
    records = gather(source or corpora(*SOURCES), DataConfig(), False).records
    tasks = {name: _split(records, entries, train_texts, dev_texts) for name, entries in ENTRIES.items()}
    told = {name: [entry for entry in ENTRIES[name] if _tells(parts, entry)] for name, parts in tasks.items()}
    tasks = {name: parts for name, parts in tasks.items() if told[name]}
    for name in tasks:
        if missing := [
            LABELS[label].names[place or 0] for label, place in ENTRIES[name] if (label, place) not in told[name]
        ]:
            console.print(
                f"{name}: without {', '.join(missing)}, of which fewer than {FEWEST} rows of a split are labelled, or all alike"
            )
    if not tasks:
        raise RedHeartError(f"no task has {FEWEST} training and {FEWEST} dev rows: there is nothing to probe with")
    result: dict[str, Any] = {
        "dev": {},
        "texts_per_s": {},
        "texts": {n: [len(a), len(b)] for n, (a, b) in tasks.items()},
    }
    for name in encoder or _installed():
        ways = _ways(name, layers)
        read = tuple(sorted({layer for way in ways for layer in way}))
        reader, started = TextEncoder(EncoderConfig(name=name, layers=read)), time.perf_counter()
        both = (
            r[field] for pair in tasks.values() for part in pair for r in part for field in ("text", "contrast_text")
        )
        texts = list(dict.fromkeys(text for text in both if text is not None))
        console.print(f"{name}: {len(texts)} texts", markup=False)
        pooled = np.split(_pooled(reader, texts), len(read), 1)
        short = name.removeprefix("package:")
        result["texts_per_s"][short] = len(texts) / (time.perf_counter() - started)
        with progress(f"{short}: probes", len(ways), 0) as (bar, task):
            for way in ways:
                chosen = np.concatenate([pooled[read.index(layer)] for layer in way], 1)
                vectors = dict(zip(texts, chosen, strict=True))
                result["dev"][f"{short}-{'+'.join(map(str, way))}"] = {
                    metric: value
                    for probe, (train, dev) in tasks.items()
                    for metric, value in PROBES[probe](train, dev, vectors, told[probe]).items()
                }
                bar.advance(task)
    return result


def _installed() -> list[str]:
    names = []
    for name in PACKAGED:
        try:
            package_directory(name)
        except RedHeartError as error:
            if name not in OPTIONAL:
                raise
            console.print(f"{name} is left out: {error}", markup=False)
            continue
        names.append(name)
    return names


def _ways(name: str, asked: Sequence[str] | None) -> list[Layers]:
    """Layers that are read together, each way once."""
    if not asked and name in PACKAGED:
        return [PACKAGED[name].layers]
    ways: list[Layers] = []
    for word in asked or ("each",):
        if word == "each":
            ways += [(layer,) for layer in range(_depth(name) + 1)]
        elif all(part.isdecimal() for part in word.split("+")):
            ways.append(tuple(map(int, word.split("+"))))
        else:
            raise RedHeartError(f"--layers {word!r}: write numbers with + between them, as 4+6, or each")
    return list(dict.fromkeys(ways))


def _depth(name: str) -> int:
    from transformers import AutoConfig

    with naming_model(name):
        return int(AutoConfig.from_pretrained(encoder_path(name)).num_hidden_layers)


def _split(records: Records, entries: Sequence[Entry], max_train: int, max_dev: int) -> tuple[Records, Records]:
    """The training and dev records that have one of the entries, a random part by the hash of their ids."""
    known = np.any([np.isfinite(_values(records, entry)) for entry in entries], 0)
    rows = sorted(
        (r for r, has in zip(records, list(known), strict=True) if has),
        key=lambda r: hashlib.sha256(r["id"].encode()).digest(),
    )
    return [r for r in rows if r["split"] == "train"][:max_train], [r for r in rows if r["split"] == "dev"][:max_dev]


def _pooled(encoder: TextEncoder, texts: list[str]) -> np.ndarray:
    vectors = []
    with progress("encoding", len(texts)) as (bar, task):
        for start in range(0, len(texts), 1024):
            features, _ = encoder.encode(texts[start : start + 1024], lambda n: bar.advance(task, n))
            vectors += [f.astype(np.float32).mean(0) for f in features]
    return np.stack(vectors)


def _matrix(records: Records, vectors: dict[str, np.ndarray], field: str = "text") -> np.ndarray:
    return np.stack([vectors[r[field]] for r in records])


def _logistic(x: np.ndarray, y: np.ndarray, intercept: bool = True) -> Any:
    """Standardised logistic regression; C by 4-fold cross-validation on the training texts."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = LogisticRegressionCV(
        Cs=[0.0003, 0.003, 0.03], cv=4, scoring="neg_log_loss", max_iter=500, fit_intercept=intercept,
        l1_ratios=(0.0,), use_legacy_attributes=False,
    )  # fmt: skip
    return make_pipeline(StandardScaler(with_mean=intercept), model).fit(x, y)


def _values(records: Records, entry: Entry) -> np.ndarray:
    """[rows], NaN where the entry has no label."""
    label, place = entry
    found = [r[label] for r in records]
    return np.array(found if place is None else [None if v is None else v[place] for v in found], float)


def _tells(parts: tuple[Records, Records], entry: Entry) -> bool:
    """Whether enough rows of both splits have the entry, and not all of them alike."""
    for records in parts:
        values = _values(records, entry)
        known = values[np.isfinite(values)]
        if len(known) < FEWEST or len(np.unique(known if entry[0] == "vad" else known > 0.5)) < 2:
            return False
    return True


def _of_entry(entry: Entry, train: Records, dev: Records, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, ...]:
    """(x, labels) of the training rows and of the dev rows that have the entry."""
    y, t = _values(train, entry), _values(dev, entry)
    return x[np.isfinite(y)], y[np.isfinite(y)], z[np.isfinite(t)], t[np.isfinite(t)]


def _emotion(train: Records, dev: Records, vectors: Vectors, entries: Sequence[Entry]) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    x, z = _matrix(train, vectors), _matrix(dev, vectors)
    models, areas = [], []
    for entry in entries:
        known, y, judged, t = _of_entry(entry, train, dev, x, z)
        models.append(_logistic(known, y > 0.5))
        areas.append(roc_auc_score(t > 0.5, models[-1].predict_proba(judged)[:, 1]))

    def answered(records: Records, rows: np.ndarray) -> Answers:
        labels = np.stack([_values(records, entry) for entry in entries], 1)
        said = np.stack([model.predict_proba(rows)[:, 1] for model in models], 1)
        return Answers(said, np.nan_to_num(labels), np.isfinite(labels).astype(float))

    f1 = tuned_macro_f1(answered(train, x), answered(dev, z))
    return {"emotion_macro_f1": f1, "emotion_macro_auc": float(np.mean(areas))}


def _vad(train: Records, dev: Records, vectors: Vectors, entries: Sequence[Entry]) -> dict[str, float]:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, z, found = _matrix(train, vectors), _matrix(dev, vectors), []
    for entry in entries:
        known, y, judged, t = _of_entry(entry, train, dev, x, z)
        predicted = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 9))).fit(known, y).predict(judged)
        found.append(np.corrcoef(predicted, t)[0, 1] if np.ptp(predicted) else 0.0)
    return {"vad_pearson": float(np.mean(found))}


def _pairs(train: Records, dev: Records, vectors: Vectors, entries: Sequence[Entry]) -> dict[str, float]:
    x, z = (_matrix(p, vectors) - _matrix(p, vectors, "contrast_text") for p in (train, dev))
    y, t = (_values(part, entries[0]) > 0.5 for part in (train, dev))
    return {"preference_accuracy": float((_logistic(x, y, intercept=False).predict(z) == t).mean())}


def _theory(train: Records, dev: Records, vectors: Vectors, entries: Sequence[Entry]) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    (entry,) = entries
    x, y, z, t = _of_entry(entry, train, dev, _matrix(train, vectors), _matrix(dev, vectors))
    area = roc_auc_score(t > 0.5, _logistic(x, y > 0.5).predict_proba(z)[:, 1])
    return {f"{ETHICS[entry[1] or 0]}_auc": float(area)}


ENTRIES: dict[str, list[Entry]] = {
    "emotion": [("emotion", place) for place in range(len(EMOTIONS))],
    "vad": [("vad", place) for place in range(len(LABELS["vad"].names))],
    "preference": [("preference", None)],
    **{ETHICS[place]: [("ethics", place)] for place in (1, 2, 3)},
}
PROBES = {"emotion": _emotion, "vad": _vad, "preference": _pairs, **{ETHICS[place]: _theory for place in (1, 2, 3)}}
