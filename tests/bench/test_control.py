"""The plain transformer on samples whose labels follow from their tokens, and the bench of it beside a tiny network."""

import json
import os
import signal
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redheart.bench.control import _Bench, _config, _time_to, bench_control
from redheart.bench.plain import PlainTransformer, num_parameters, train_control, width_of_size
from redheart.cli import main
from redheart.data.shards import label_facts, open_shard, write_shard
from redheart.data.stream import SampleStream
from redheart.evaluation.answers import answers, thresholds
from redheart.evaluation.evaluate import evaluate, forward
from redheart.files import read_sealed_json, read_sealed_lines
from redheart.schema import EMOTIONS, LABELS, Batch, RedHeartError
from redheart.train import stages
from tests.data.shard_data import write_index

E = 8
ROWS = {"train": 192, "dev": 64, "test": 64}
TINY = [
    *("model.width=24", "model.heads=2", "model.layers=1", "model.task_width=16", "model.task_heads=2"),
    *(f"model.encoder_width={E}", "memory.strategy=plain", "training.log_samples=true"),
    *("training.global_batch_size=16", "training.micro_batch_size=8"),
]


def row(split: str, number: int, rng: np.random.Generator) -> dict:
    """Emotion k is there where one token has a 4 in channel k; of a pair the text with the larger last channel is preferred; valence is
    that channel. An LLM labelled regret everywhere, people culture but not in dev, and a counterfactual but not in test."""
    tokens = lambda: rng.normal(size=(int(rng.integers(2, 8)), E)) * 0.3  # noqa: E731
    text, contrast = tokens(), tokens()
    there = rng.random(len(EMOTIONS)) < 0.3
    for k in np.flatnonzero(there):
        text[rng.integers(len(text)), k] = 4.0
    level, other = rng.uniform(-1, 1, 2)
    text[:, -1], contrast[:, -1] = 3 * level, 3 * other
    made = dict.fromkeys(LABELS)
    made |= {"id": f"{split}{number}", "source": "s", "split": split, "lang": "en", "text": "t", "contrast_text": None}
    made |= {"features": text.astype(np.float16), "contrast_features": None, "regret": float(rng.random())}
    made |= {"emotion": there.astype(float).tolist(), "vad": [float(level), None, None]}
    origins = {"emotion": "human", "vad": "human", "regret": "llm"}
    if number % 2:
        made |= {"contrast_features": contrast.astype(np.float16), "preference": float(level > other)}
        made["contrast_text"], origins["preference"] = "u", "author"
    if split != "dev":
        made["culture"], origins["culture"] = [0.0, 1.0, float(number % 2)], "human"
    if split != "test":
        made["counterfactual"], origins["counterfactual"] = float(there[0]), "human"
    weights = {label: 0.3 if origin == "llm" else 1.0 for label, origin in origins.items()}
    return made | {"label_weight": weights, "label_origin": origins}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("control") / "data"
    out.mkdir()
    splits = {}
    for place, (split, count) in enumerate(ROWS.items()):
        rng = np.random.default_rng(place)
        rows = [row(split, n, rng) for n in range(count)]
        shards = [
            write_shard(out / f"{split}-{k:05d}.arrow", rows[k * count // 2 : (k + 1) * count // 2], E, 64)
            for k in range(2)
        ]
        opened = [open_shard(out / entry["file"], E) for entry in shards]
        splits[split] = {"rows": count, "shards": shards, **label_facts((s.values, s.weights) for s in opened)}
    encoder = {"name": "package:minilm", "layers": [4, 6], "max_tokens": 64, "width": E}
    write_index(out, splits, encoder, levels={"regret": [1 / 3, 2 / 3]}, chunk=8)
    return out


@pytest.fixture
def batch(data: Path) -> Batch:
    every_fourth = np.arange(0, ROWS["dev"], 4)  # rows are in order of their lengths, those without a contrast first
    return SampleStream(data, "dev").batch(every_fourth, every_fourth).to("cpu", torch.float32)


def trained(data: Path, steps: int, width: int = 32, split: str = "dev") -> tuple[_Bench, PlainTransformer, float]:
    config = _config(str(data), "local", TINY, steps, 1.0, 32, evaluations=4)
    bench = _Bench(str(data), data, config, split, 3e-3)
    torch.manual_seed(0)
    network = PlainTransformer(E, width, bench.labels)
    best = train_control(network, (bench.streams["train"], bench.streams["dev"]), config, bench.factors, 3e-3)
    network.load_state_dict(best.weights)
    return bench, network.eval(), best.value


def test_sizes():
    assert num_parameters(768, 96, ["emotion", "emotion_fine"]) == pytest.approx(0.41e6, rel=0.01)
    network = PlainTransformer(768, 96, ["emotion"])
    assert sum(p.numel() for p in network.parameters()) == num_parameters(768, 96, ["emotion"])
    for target in (1, 50_000, 413_000, 5_309_454):
        width = width_of_size(768, target, ["emotion"])
        gap = {w: abs(num_parameters(768, w, ["emotion"]) - target) for w in (width - 8, width, width + 8) if w > 0}
        assert min(gap, key=gap.get) == width
        assert width % 8 == 0


@torch.no_grad()
def test_padding_changes_nothing_and_a_fresh_query_takes_the_mean(batch: Batch):
    network = PlainTransformer(E, 16, ["emotion", "preference"]).eval()
    whole = forward(network, batch)
    pooled = []
    network.answers.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    for n in (0, 1, 5):
        length = int(batch.mask[n].sum())
        alone = network._read(batch.features[n : n + 1, :length], batch.mask[n : n + 1, :length])
        torch.testing.assert_close(alone[:, : len(EMOTIONS)], whole.emotion_logits[n : n + 1], atol=1e-5, rtol=1e-4)
        x = network.input(batch.features[n : n + 1, :length]) + network.positions[:length]
        for layer in network.layers:
            x = layer(x)
        torch.testing.assert_close(pooled[-1], network.norm(x).mean(1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_answer_about_a_pair_is_the_difference_of_two_utilities(batch: Batch):
    network = PlainTransformer(E, 16, ["emotion", "preference"]).eval()
    said = forward(network, batch).utility_difference
    rows = batch.contrast_rows
    texts = network._read(batch.features, batch.mask)[:, -1:]
    contrasts = network._read(batch.contrast_features, batch.contrast_mask)[:, -1:]
    torch.testing.assert_close(said[rows], texts[rows] - contrasts, atol=1e-5, rtol=1e-4)
    unpaired = torch.ones(len(said), dtype=torch.bool).index_fill(0, rows, False)
    assert 0 < unpaired.sum() < len(said)
    assert (said[unpaired] == 0).all()
    features, mask = batch.features[rows], batch.mask[rows]
    order = torch.arange(len(rows))
    there = network(features, mask, batch.contrast_features, batch.contrast_mask, order).utility_difference
    back = network(batch.contrast_features, batch.contrast_mask, features, mask, order).utility_difference
    torch.testing.assert_close(there, -back, atol=1e-5, rtol=1e-4)


def test_the_network_is_as_wide_as_the_features_where_nobody_names_a_width(data: Path):
    unnamed = [setting for setting in TINY if "encoder_width" not in setting]
    assert _config(str(data), "local", unnamed, 1, 1.0, None, 1).model.encoder_width == E


def test_only_what_people_labelled_in_every_split_takes_part(data: Path):
    config = _config(str(data), "local", TINY, 1, 1.0, None, 1)
    bench = _Bench(str(data), data, config, "dev", 3e-4)
    assert bench.labels == ["emotion", "vad", "preference", "counterfactual"]
    assert bench.entries.sum() == len(EMOTIONS) + 1 + 1 + 1  # of vad valence alone
    judged_on_test = _Bench(str(data), data, config, "test", 3e-4)
    assert judged_on_test.labels == bench.labels  # the same controls
    assert judged_on_test.entries.sum() == bench.entries.sum() - 1


def test_a_control_learns_what_can_be_learned_and_keeps_its_best(data: Path):
    from sklearn.metrics import f1_score

    bench, network, dev_loss = trained(data, 160, split="test")
    dev = evaluate(network, bench.streams["dev"], bench.config.loss, bench.factors)
    assert dev.total == pytest.approx(dev_loss, rel=1e-4)
    assert dev.losses.keys() == set(bench.labels)
    found = bench._measure(network)
    assert found["emotion"][1] > 0.9
    assert found["preference"][1] > 0.85
    assert found["vad"][1] > 0.9
    assert "counterfactual" not in found
    of_dev, of_test = (answers(network, bench.streams[split])["emotion"] for split in ("dev", "test"))
    expected = f1_score(of_test.target, of_test.prediction > thresholds(of_dev), average="macro")
    assert found["emotion"] == ("macro_f1", pytest.approx(expected))


def files(out: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.glob("*seed*")}


def test_a_whole_bench_and_what_is_kept_of_it(data: Path, tmp_path: Path):
    out = tmp_path / "bench"
    asked = {"widths": [16], "seeds": 2, "steps": 3, "evaluations": 1, "set_": TINY}
    told = bench_control(str(data), out, **asked)
    names = list(told["legs"])
    preset, small, equal = names
    assert (preset, small) == ("local", "control-16")
    legs = told["legs"]
    assert legs[equal]["parameters"] == pytest.approx(legs[preset]["parameters"], rel=0.2)
    assert told["batch"] == 16
    assert list(legs[small]["metrics"]) == ["emotion", "vad", "preference", "counterfactual", "counterfactual (F1)"]

    kept = [[read_sealed_json(out / f"{leg}-seed{s}-dev.json", "") for s in (0, 1)] for leg in names]
    for leg, runs in zip(names, kept, strict=True):
        for name, of in legs[leg]["metrics"].items():
            values = [run["metrics"][name]["value"] for run in runs]
            assert of["mean"] == pytest.approx(np.mean(values))
            assert of["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
        assert legs[leg]["dev_loss"].keys() == {"emotion", "vad", "preference", "counterfactual", "total"}
        seconds = [run["trained"]["seconds"] for run in runs]
        assert legs[leg]["seconds"]["mean"] == pytest.approx(np.mean(seconds))
        assert legs[leg]["samples_per_s"]["mean"] == pytest.approx(np.mean([3 * 16 / s for s in seconds]))
        for run in runs:  # the one look is at the weights that were judged, and at all of dev
            assert run["trained"]["dev_curve"] == [[3, pytest.approx(run["dev_losses"]["total"], rel=1e-4)]]
    ahead = told["difference"][small]["emotion"]["mean"]
    assert ahead == pytest.approx(
        legs[preset]["metrics"]["emotion"]["mean"] - legs[small]["metrics"]["emotion"]["mean"]
    )
    assert told["time_to"].keys() == {small, equal}
    assert (out / "control-dev.png").stat().st_size > 10_000
    assert json.loads((out / "control-dev.json").read_text())["legs"] == legs

    before = files(out)
    assert bench_control(str(data), out, **asked)["legs"] == legs
    assert files(out) == before
    only = asked | {"seeds": 1}
    judged = bench_control(str(data), out, **only, split="test")
    assert set(files(out).items()) > set(before.items())  # nothing is trained again to be judged on test
    assert "counterfactual" not in judged["legs"][small]["metrics"]
    assert judged["legs"][small]["metrics"]["emotion"]["sd"] is None
    with pytest.raises(RedHeartError, match=r"local-seed0\.json was made with other data, settings or code"):
        bench_control(str(data), out, **only | {"set_": [*TINY, "model.dropout=0.3"]})
    (out / "control-16-seed0.safetensors").write_bytes(b"")
    (out / "control-16-seed0-dev.json").unlink()
    with pytest.raises(RedHeartError, match="is not what was trained"):
        bench_control(str(data), out, **only, controls_only=True, equal_size=False)


def test_the_time_to_what_a_control_ends_with():
    run = lambda seconds, *losses: {"seconds": seconds, "dev_curve": [[10 * k + 10, x] for k, x in enumerate(losses)]}  # noqa: E731
    control = [run(100, 5.0, 4.0, 4.1, 4.2), run(100, 5.0, 4.0)]
    told = _time_to([run(80, 6.0, 4.0, 3.0, 3.5), run(50, 4.5, 4.2)], control)
    assert told == {"reached": 1, "mean": pytest.approx(0.4), "sd": None, "low": None, "high": None}
    assert _time_to([run(80, 6.0), run(50, 4.5)], control) == {"reached": 0}
    # of a leg that was taken up again, and of one without a module that the control's answers need
    for unknown in ({"seconds": None}, {"dev_curve": []}):
        assert _time_to([run(80, 1.0), run(50, 1.0) | unknown], control) == {"reached": None}
    assert _time_to([{"seconds": 80.0}, run(50, 1.0)], control) == {"reached": None}  # a leg of an earlier version


def test_an_interrupted_leg_goes_on_with_its_own_settings_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = {"widths": [16], "equal_size": False, "seeds": 1, "steps": 4, "evaluations": 1, "set_": TINY}
    update = stages.update

    def stopping(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return update(*given)

    monkeypatch.setattr(stages, "update", stopping)
    with pytest.raises(RedHeartError, match="stopped by a signal"):
        bench_control(str(data), tmp_path, **asked)
    monkeypatch.setattr(stages, "update", update)
    for changed in ({"steps": 6}, {"set_": [*TINY, "optimizer.learning_rate=0.005"]}):
        with pytest.raises(RedHeartError, match=r"/local-seed0 was made with other data, settings or code"):
            bench_control(str(data), tmp_path, **asked | changed)
    made = (tmp_path / "local-seed0.made.json").rename(tmp_path / "made.json")  # as an earlier version left it
    with pytest.raises(RedHeartError, match="/local-seed0 was made by an earlier version"):
        bench_control(str(data), tmp_path, **asked)
    made.rename(tmp_path / "local-seed0.made.json")
    assert bench_control(str(data), tmp_path, **asked)["legs"]["local"]["seconds"] is None  # taken up again


def test_seeds_side_by_side_are_those_of_one_call(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {"data": str(data), "widths": [16], "equal_size": False, "controls_only": True, "steps": 2, "batch": 16}
    one = bench_control(**asked, out=tmp_path / "one", seeds=2)
    for seed in (1, 0):
        alone = bench_control(**asked, out=tmp_path / "apart", only_seed=seed)
        assert alone["seeds"] == [seed]
        assert json.loads((tmp_path / "apart" / f"control-dev-seed{seed}.json").read_text()) == alone
    assert not (tmp_path / "apart" / "control-dev.json").exists()
    monkeypatch.setattr("redheart.bench.control.train_control", None)  # nothing is trained again
    apart = bench_control(**asked, out=tmp_path / "apart", seeds=2)
    metrics = lambda told: told["legs"]["control-16"]["metrics"]  # noqa: E731
    assert metrics(apart) == metrics(one)
    assert apart["seeds"] == [0, 1]


def test_a_control_reads_what_the_network_reads(data: Path, tmp_path: Path, monkeypatch):
    read: list[list[str]] = []
    window = SampleStream.window

    def spied(self, *cursor):
        batches = window(self, *cursor)
        read.append([name for batch in batches for name in batch.ids])
        return batches

    monkeypatch.setattr(SampleStream, "window", spied)
    asked = {"widths": [16], "equal_size": False, "seeds": 1, "steps": 12, "evaluations": 1}
    alone = bench_control(str(data), tmp_path, set_=TINY, **asked, controls_only=True)["legs"]
    control, read[:] = [*read], []
    left_out = [*TINY, "model.ablate=[analyzers.emotion, aux.utility]"]
    told = bench_control(str(data), tmp_path, set_=left_out, **asked, name="without")
    assert control == read  # of the network alone: the control is not trained again for another network
    assert told["legs"]["control-16"] == alone["control-16"]
    assert list(told["legs"]["without"]["metrics"]) == [
        "emotion",
        "preference",
        "counterfactual",
        "counterfactual (F1)",
    ]
    assert "total" not in told["legs"]["without"]["dev_loss"]
    assert told["difference"]["control-16"].keys() == told["legs"]["without"]["metrics"].keys()
    logged = read_sealed_lines(tmp_path / "without-seed0" / "samples-rank0.jsonl", "")
    assert [line["ids"] for line in logged] == control
    stream = SampleStream(data, "train")
    direct = [[i for b in stream.micro_batches(s, 0, 16, 8, 0, 1) for i in b.ids] for s in range(12)]
    assert control == direct
    assert sorted(chain(*control)) == sorted(f"train{n}" for n in range(ROWS["train"]))


def test_the_command(data: Path, tmp_path: Path, monkeypatch, capsys):
    def run(*more: str) -> tuple[int, str, str]:
        arguments = f"bench control --data {data} --out {tmp_path} --widths 16 --steps 2 --seeds 1 --batch 16 --json"
        flags = ["--controls-only", "--no-equal-size", "--set", f"model.encoder_width={E}"]
        monkeypatch.setattr("sys.argv", ["redheart", *arguments.split(), *flags, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    code, out, err = run()
    assert code == 0, err
    told = json.loads(out)
    assert list(told["legs"]) == ["control-16"]
    assert told["difference"] == {}
    assert told["legs"]["control-16"]["metrics"]["emotion"]["low"] is None
    assert (told["steps"], told["batch"], told["seeds"], told["split"]) == (2, 16, [0], "dev")
    code, out, err = run("--split", "train")
    assert (code, out) == (1, "")
    assert "choose dev or test" in err
