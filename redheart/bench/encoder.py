"""`redheart bench encoder`: which frozen encoder to build on, and which of its layers, by linear probes on the dev splits of real corpora.

Each text is one vector, the mean of its token features. Emotions: logistic regression per emotion, macro-F1 with thresholds
chosen on the training texts, and macro ROC-AUC. Valence, arousal, dominance: ridge regression, Pearson's r. Pairs: logistic regression on
standardised differences without intercept, accuracy. Theories: logistic regression, ROC-AUC. Test splits are not touched.

An encoder is read once, all of the layers that are asked for together.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
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
from redheart.schema import ETHICS, PACKAGED, RedHeartError

SOURCES = ("goemotions", "emobank", "ethics")
FEWEST = 100  # rows of a split from which a task is judged
Records = Sequence[dict[str, Any]]
Layers = tuple[int, ...]


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
    A task with fewer than 100 training or dev rows is left out. texts_per_s is of reading up to the deepest layer that is asked for.
    """
    records = gather(source or corpora(*SOURCES), DataConfig(), False).records
    tasks = {name: _split(records, labelled, train_texts, dev_texts) for name, labelled in TASKS.items()}
    tasks = {name: parts for name, parts in tasks.items() if min(map(len, parts)) >= FEWEST}
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
                    for metric, value in PROBES[probe](train, dev, vectors).items()
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


def _split(
    records: Records, labelled: Callable[[dict[str, Any]], bool], max_train: int, max_dev: int
) -> tuple[Records, Records]:
    """The task's training and dev records, a random part by the hash of their ids."""
    rows = sorted((r for r in records if labelled(r)), key=lambda r: hashlib.sha256(r["id"].encode()).digest())
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


def _emotion(train: Records, dev: Records, vectors: dict[str, np.ndarray]) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    sides = [(_matrix(part, vectors), np.array([r["emotion"] for r in part], float)) for part in (train, dev)]
    models = [_logistic(sides[0][0], sides[0][1][:, entry] > 0.5) for entry in range(7)]
    said = [np.stack([model.predict_proba(x)[:, 1] for model in models], 1) for x, _ in sides]
    chosen, judged = (Answers(p, labels, np.ones_like(labels)) for p, (_, labels) in zip(said, sides, strict=True))
    areas = [roc_auc_score(judged.target[:, k] > 0.5, judged.prediction[:, k]) for k in range(7)]
    return {"emotion_macro_f1": tuned_macro_f1(chosen, judged), "emotion_macro_auc": float(np.mean(areas))}


def _vad(train: Records, dev: Records, vectors: dict[str, np.ndarray]) -> dict[str, float]:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, z = _matrix(train, vectors), _matrix(dev, vectors)
    y, t = (np.array([r["vad"] for r in part]) for part in (train, dev))
    predicted = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 9))).fit(x, y).predict(z)
    return {"vad_pearson": float(np.mean([np.corrcoef(predicted[:, i], t[:, i])[0, 1] for i in range(3)]))}


def _pairs(train: Records, dev: Records, vectors: dict[str, np.ndarray]) -> dict[str, float]:
    x, z = (_matrix(p, vectors) - _matrix(p, vectors, "contrast_text") for p in (train, dev))
    y, t = (np.array([r["preference"] for r in part]) > 0.5 for part in (train, dev))
    return {"preference_accuracy": float((_logistic(x, y, intercept=False).predict(z) == t).mean())}


def _theory(entry: int) -> Callable[[Records, Records, dict[str, np.ndarray]], dict[str, float]]:
    def probe(train: Records, dev: Records, vectors: dict[str, np.ndarray]) -> dict[str, float]:
        from sklearn.metrics import roc_auc_score

        y, t = (np.array([r["ethics"][entry] for r in part]) > 0.5 for part in (train, dev))
        model = _logistic(_matrix(train, vectors), y)
        return {f"{ETHICS[entry]}_auc": float(roc_auc_score(t, model.predict_proba(_matrix(dev, vectors))[:, 1]))}

    return probe


def _labelled(entry: int) -> Callable[[dict[str, Any]], bool]:
    return lambda r: r["ethics"] is not None and r["ethics"][entry] is not None


TASKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "emotion": lambda r: r["emotion"] is not None,
    "vad": lambda r: r["vad"] is not None,
    "preference": lambda r: r["preference"] is not None,
    **{ETHICS[e]: _labelled(e) for e in (1, 2, 3)},
}
PROBES = {"emotion": _emotion, "vad": _vad, "preference": _pairs, **{ETHICS[e]: _theory(e) for e in (1, 2, 3)}}
