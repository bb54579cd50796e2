"""Networks of several seeds are compared with networks of the same seeds, or not at all."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from redheart.bench.ablation import _check_complete, _of_one
from redheart.config import load_config
from redheart.data.shards import label_facts, open_shard, write_shard
from redheart.model.redheart import RedHeartConfig, RedHeartModel
from redheart.model.select import MODULES
from redheart.schema import LABELS, SPLITS, RedHeartError
from redheart.train.export import Trained
from redheart.train.progress import Progress
from tests.data.shard_data import MAX_TOKENS, WIDTH, make_row, write_index
from tests.model.test_model import SMALL


def others(*of: tuple[str, int]):
    trained = [
        (name, SimpleNamespace(config=SimpleNamespace(training=SimpleNamespace(seed=seed)))) for name, seed in of
    ]
    return {Path(str(number)): one for number, one in enumerate(trained)}


def test_a_comparison_that_lacks_a_seed_is_refused_by_name():
    _check_complete(others(("aux.dsp", 1), ("aux.dsp", 0)), [0, 1])
    _check_complete(others(("aux.dsp", 5)), [0])  # of one network any will do
    for lacking in (("aux.dsp", 0),), (("aux.dsp", 0), ("aux.dsp", 1), ("aux.kalman", 1)):
        with pytest.raises(
            RedHeartError, match=rf"{lacking[-1][0]}: .*\[{lacking[-1][1]}\].*\[0, 1\]: name one of each"
        ):
            _check_complete(others(*lacking), [0, 1])


def test_only_entries_that_the_network_learned_are_judged_and_on_features_of_its_encoder(tmp_path):
    """The data have labels of regret and of all emotions, and joy alone trained the network."""
    rng = np.random.default_rng(0)
    rows = [make_row(number, rng) for number in range(60)]
    for number, row in enumerate(rows):
        row["emotion"] = [number % 2, number % 3 == 0, *rng.random(5)]
        row["label_origin"] = {"emotion": "human", "regret": "human"}
    entry = write_shard(tmp_path / "all.arrow", rows, WIDTH, MAX_TOKENS)
    shard, encoder = open_shard(tmp_path / "all.arrow", WIDTH), {"name": "random", "width": WIDTH}
    split = {"rows": 60, "shards": [entry], **label_facts([(shard.values, shard.weights)])}
    write_index(tmp_path, dict.fromkeys(SPLITS, split), encoder)
    labels = {name: [0.0] * label.size for name, label in LABELS.items()} | {"emotion": [60.0, *[0.0] * 6]}
    left_out = [name for name in MODULES if name not in ("backbone", "heads.emotion", "heads.regret")]
    model = RedHeartModel(RedHeartConfig(encoder_width=WIDTH, ablate=left_out, **SMALL)).eval()
    whole = Trained(model, load_config("local"), Progress(data=str(tmp_path), encoder=encoder, labels=labels))
    found = _of_one(whole, {}, None, "test", None, by_seed=False)
    assert {line.task for line in found} == {"emotion"}
    moved = whole._replace(progress=replace(whole.progress, encoder=encoder | {"name": "another"}))
    with pytest.raises(RedHeartError, match=r"was encoded by .* but the network was trained on"):
        _of_one(moved, {}, None, "test", None, by_seed=False)
