"""bench encoder: any encoder at any of its layers, each way once, and nothing that the rows cannot tell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from redheart.bench.encoder import ENTRIES, _emotion, _split, _tells, _vad, _ways, bench_encoder
from redheart.schema import PACKAGED, RedHeartError


def test_layers_are_read_as_they_are_asked_for():
    assert _ways("package:minilm", None) == [PACKAGED["package:minilm"].layers]
    assert _ways("package:minilm", ["each", "4+6", "6"]) == [*((n,) for n in range(7)), (4, 6)]
    for wrong in ("4,6", "4+", "last", "-1"):
        with pytest.raises(RedHeartError, match="numbers with \\+ between them"):
            _ways("package:minilm", [wrong])


def test_it_probes_what_the_rows_have_and_an_encoder_is_read_once(tmp_path: Path):
    """Joy and its absence in plain words: every layer tells them apart on dev, and there is no task but emotion."""
    happy, sad = ("delighted", "cheerful", "overjoyed", "glad"), ("miserable", "heartbroken", "gloomy", "devastated")
    rows = [
        {"text": f"I was {word} at number {n}.", "split": "train" if n % 2 else "dev", "emotion": {
            "joy": float(word in happy), "sadness": float(word in sad), "anger": float(n % 3 == 0), "fear": float(n % 4 < 2),
            "surprise": float(n % 5 < 2), "disgust": float(n % 3 == 1), "neutral": float(n % 6 < 3)}}
        for n in range(28) for word in (*happy, *sad)
    ]  # fmt: skip
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    found = bench_encoder(["package:minilm"], ["4+6", "0"], [f"rows={file}"], train_texts=112, dev_texts=112)
    assert list(found["dev"]) == ["minilm-4+6", "minilm-0"]
    assert found["texts"] == {"emotion": [112, 112]}
    assert found["texts_per_s"].keys() == {"minilm"}
    assert all(scores.keys() == {"emotion_macro_f1", "emotion_macro_auc"} for scores in found["dev"].values())
    assert all(scores["emotion_macro_auc"] > 0.6 for scores in found["dev"].values())
    with pytest.raises(RedHeartError, match="no task has 100 training and 100 dev rows"):
        bench_encoder(["package:minilm"], None, ["everyday"], train_texts=100, dev_texts=50)


def test_what_has_no_label_is_no_no(tmp_path: Path):
    """Entries are trained and judged on the rows that have them; one that too few rows have, or all alike, is left out aloud."""
    rng, made = np.random.default_rng(0), []
    for n in range(520):
        words = rng.choice(["delighted", "gloomy", "furious", "calm"], 2)
        emotion: list[float | None] = [
            float("delighted" in words),
            float("gloomy" in words),
            None,
            None,
            None,
            None,
            0.0,
        ]
        if n % 2:
            emotion[0] = None
        made.append(
            {"id": str(n), "text": f"{words[0]} {words[1]} {n}", "split": "train" if n % 4 < 2 else "dev", "emotion": emotion,
             "contrast_text": None, "preference": None, "ethics": None, "vad": [float("calm" in words), None, None]}
        )  # fmt: skip
    parts = _split(made, ENTRIES["emotion"], 1000, 1000)
    told = [entry for entry in ENTRIES["emotion"] if _tells(parts, entry)]
    assert told == [("emotion", 0), ("emotion", 1)]
    assert [entry for entry in ENTRIES["vad"] if _tells(parts, entry)] == [("vad", 0)]
    vectors = {
        r["text"]: np.array([w in r["text"] for w in ("delighted", "gloomy", "furious", "calm")], float) for r in made
    }
    assert _emotion(*parts, vectors, told) == pytest.approx({"emotion_macro_f1": 1, "emotion_macro_auc": 1})
    assert _vad(*parts, vectors, [("vad", 0)])["vad_pearson"] > 0.9
