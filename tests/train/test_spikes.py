"""A loss that leaps is found, told and undone: the run is then one that never saw the samples at fault, and so is a resumed one."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from redheart.config import RunConfig, load_config
from redheart.data.order import global_batch
from redheart.data.shards import INDEX, write_shard
from redheart.data.stream import SampleStream
from redheart.files import read_sealed_json, write_sealed_json
from redheart.schema import RedHeartError
from redheart.train.aside import Events
from redheart.train.checkpoint import best, committed, save
from redheart.train.progress import Progress, parse_progress
from redheart.train.spikes import SpikeGuard
from redheart.train.start import train as start
from tests.runs import forked, last_weights, losses, train
from tests.train.tiny import SETTINGS

BATCH, STEPS, SPIKE = 4, 18, 13  # SPIKE: the step, from 0, whose batch is at fault
QUICK = [
    *SETTINGS,
    *("training.log_every=1", "training.evaluate_every=1000", "training.synergy_every=1000", f"training.max_steps={STEPS}"),
    *(f"training.global_batch_size={BATCH}", "training.micro_batch_size=2", "training.log_samples=true"),
    *("guard.window=8", "training.checkpoint_every=5", "guard.on_spike=rewind", "guard.skip_steps=2"),
]  # fmt: skip


def config(*settings: str) -> RunConfig:
    return load_config("local", [*QUICK, "memory.strategy=plain", *settings])


@pytest.fixture(scope="module")
def planted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared training rows six times over, so that no step sees a row twice, and one row of step SPIKE's whose labels lie far out
    of their range."""
    out = tmp_path_factory.mktemp("planted")
    index = read_sealed_json(data / INDEX, "again")
    index["plan"] = "planted"
    for split, times in (("train", 6), ("dev", 1)):
        stream = SampleStream(data, split)
        rows = [
            {**row, "id": f"{row['id']}-{k}"} for k in range(times) for row in stream.rows(np.arange(stream.num_rows))
        ]
        for write in range(2):
            entry = write_shard(out / f"{split}-00000.arrow", rows, 768, 64)
            index["splits"][split] |= {"shards": [entry], "rows": len(rows)}
            write_sealed_json(out / INDEX, index)
            if split == "dev" or write:
                break
            stream = SampleStream(out, "train")
            assert stream.num_rows >= STEPS * BATCH + 2 * BATCH
            victim = stream.rows(global_batch(stream.index, 0, SPIKE, BATCH)[:1])[0]["id"]
            for row in rows:
                if row["id"] == victim:
                    row["bentham"] = [30.0] * 7
    return out


def ids(run: Path, ranks: int = 1) -> list[list[str]]:
    """The samples of every step, over all ranks, in order."""
    lines = [
        [json.loads(x)["ids"] for x in (run / f"samples-rank{r}.jsonl").read_text().splitlines()] for r in range(ranks)
    ]
    return [[i for part in parts for i in part] for parts in zip(*lines, strict=True)]


def events(run: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["event"] == kind]


def same(a: Path, b: Path) -> bool:
    left, right = last_weights(a), last_weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def rewound(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("spikes") / "rewound"
    result = start(config(), planted, run)
    assert (result.state.spikes, result.state.rewinds, result.state.left_out) == (1, 1, [SPIKE - 1, SPIKE])
    return run


def test_a_planted_spike_is_undone_and_its_samples_left_out(planted: Path, rewound: Path):
    stream = SampleStream(planted, "train")
    read = [s if s < SPIKE - 1 else s + 2 for s in range(STEPS)]
    numbers = [global_batch(stream.index, 0, s, BATCH) for s in read]
    assert ids(rewound) == [list(stream.batch(n, np.zeros_like(n)).ids) for n in numbers]
    (spike,), (rewind,) = events(rewound, "spike"), events(rewound, "rewind")
    assert (spike["step"], spike["reads"]) == (SPIKE, SPIKE)
    assert spike["z"] > 12
    assert (rewind["to_step"], rewind["left_out"]) == (10, [SPIKE - 1, SPIKE])
    seen = losses(rewound)
    assert sorted(seen) == list(range(1, STEPS + 1))
    assert max(seen.values()) < 3 * min(seen.values())


def test_a_run_that_only_warns_goes_on_with_the_same_samples(planted: Path, tmp_path: Path, capsys):
    result = start(config("guard.on_spike=warn"), planted, tmp_path / "run")
    assert (result.state.spikes, result.state.rewinds, result.state.left_out) == (1, 0, [])
    assert losses(tmp_path / "run")[SPIKE + 1] > 10 * losses(tmp_path / "run")[SPIKE]
    assert f"step {SPIKE}: loss" in capsys.readouterr().err
    assert events(tmp_path / "run", "rewind") == []


@pytest.mark.parametrize(
    "stopped_at", [pytest.param(12, marks=pytest.mark.slow), SPIKE, pytest.param(16, marks=pytest.mark.slow)]
)
def test_a_resumed_run_rewinds_to_the_same_bits(
    planted: Path, rewound: Path, tmp_path: Path, monkeypatch, stopped_at: int
):
    """Whether it was stopped between the samples at fault, before the spike or after the rewind; other checkpoints are there then."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "ended", lambda self, *_: self.step >= stopped_at)
        start(config(), planted, run)
    assert committed(run)[-1].name == f"step-{stopped_at:08d}"
    result = start(config(), planted, run, "last")
    assert result.state.left_out == [SPIKE - 1, SPIKE]
    assert same(run, rewound)
    assert ids(run) == ids(rewound)
    assert losses(run) == losses(rewound)


def test_it_gives_up_after_the_bound(planted: Path, tmp_path: Path):
    """Every step is a spike to so low a threshold, wherever the run goes on."""
    always = config("guard.threshold=1e-9", "guard.max_rewinds=2", "optimizer.learning_rate=1e-9", "guard.skip_steps=1")
    with pytest.raises(
        RedHeartError, match=r"went back 2 times before \(guard\.max_rewinds\).*optimizer\.learning_rate"
    ):
        start(always, planted, tmp_path / "run")
    assert [e["rewinds"] for e in events(tmp_path / "run", "rewind")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_under_zero_the_rewound_run_is_the_one_that_never_saw_them(
    planted: Path, rewound: Path, tmp_path: Path, ranks: int
):
    settings = [x for s in [*QUICK, "memory.strategy=zero2_offload_8bit"] for x in ("--set", s)]
    train(planted, tmp_path / "run", STEPS, *settings, ranks=ranks)
    assert ids(tmp_path / "run", ranks) == ids(rewound)
    assert [e["left_out"] for e in events(tmp_path / "run", "rewind")] == [[SPIKE - 1, SPIKE]]
    never = ["--set", "guard.threshold=1e9"]
    run = tmp_path / "never"
    arguments = ["train", "--preset", "local", "--data", planted, "--out", run, *settings, *never]
    done = forked("tests.train.left_out", f"{SPIKE - 1},{SPIKE}", *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(tmp_path / "run", run)


def test_what_a_spike_is(tmp_path: Path):
    state = Progress(scales={"a": 0.5, "b": 0.5, "m/b": 0.5})
    factors = {"a": 2.0, "b": 1.0, "m/b": 1.0}
    guard = SpikeGuard(config("guard.threshold=6"), tmp_path, state, factors, Events(tmp_path), may_rewind=True)
    random = np.random.default_rng(0)
    recent = list(random.normal(0.8, 0.05, 8))
    for step, loss in enumerate(recent):
        guard.look(step, {"a": 0.0}, loss)
        guard.look(step, {"a": 0.0, "b": 0.0, "m/b": 0.0}, 4 * loss)  # another kind of batch, which changes nothing
    assert state.recent_losses["a"] == recent
    assert state.recent_losses["a b"] == pytest.approx([2 * loss for loss in recent])
    middle = np.median(recent)
    deviation = 1.4826 * np.median(np.abs(np.array(recent) - middle))
    guard.look(8, {"a": 0.0}, float("nan"))  # a step that was not applied says nothing
    guard.look(8, {"a": 0.0}, float(middle + 5.99 * deviation))
    guard.look(8, {"b": 0.0}, 1.49)  # the first of its kind, and 2.98 times the constant predictor's loss
    assert state.spikes == 0
    state.recent_losses["a"] = recent
    guard.look(8, {"a": 0.0}, float(middle + 6.01 * deviation))
    assert state.spikes == 1
    assert json.loads((tmp_path / "events.jsonl").read_text())["z"] == pytest.approx(6.01)
    guard.look(8, {"b": 0.0}, 15.0)
    assert state.spikes == 2


def test_batches_without_labels_are_no_reason_to_judge(tmp_path: Path):
    """Neither where nothing is left that could be compared, nor where most losses before were 0; a batch with labels is judged."""
    state = Progress(scales={"a": 0.5, "b": 0.0, "balance": 1.0})
    factors = {"a": 2.0, "b": 1.0, "balance": 1.0}
    guard = SpikeGuard(config(), tmp_path, state, factors, Events(tmp_path), may_rewind=True)
    for found in ({}, {"b": 0.5}):
        guard.look(0, found, 0.5 * len(found))
    assert state.recent_losses == {}
    for step in range(9):
        guard.look(step, {"balance": 0.0}, 0.0)
    guard.look(9, {"a": 5.0}, 10.0)
    assert state.spikes == 0
    for step in range(10, 18):
        guard.look(step, {"a": 0.5}, 1.0)
    guard.look(18, {"a": 5.0}, 10.0)
    assert state.spikes == 1


class StandIn:
    """An engine whose state is one small file, and a saver with nothing under way."""

    def save(self, directory: Path) -> None:
        (directory / "state").write_text("weights")

    def load(self, directory: Path) -> None: ...

    def finish(self) -> None: ...


def test_a_best_checkpoint_that_made_room_for_one_that_is_undone_is_searched_anew(tmp_path: Path):
    """Else nothing after the rewind would be the best, unless it were better than one that is gone."""
    settings, engine = config("checkpoint.keep_last=1"), StandIn()
    state = Progress(scales={"a": 1.0}, recent_losses={"a": [1.0] * 8})
    guard = SpikeGuard(settings, tmp_path, state, {"a": 1.0}, Events(tmp_path), may_rewind=True)
    for state.step, value in ((1, 3.0), (2, 3.5), (3, 2.5)):
        state.improves(value)
        save(engine, tmp_path, settings, state, keep=1)
    assert [d.name for d in committed(tmp_path)] == ["step-00000002", "step-00000003"]
    guard.look(3, {"a": 99.0}, 99.0)
    assert guard.undo(engine, engine)
    assert (state.step, state.best_value, state.best_step, state.looks_since_best) == (2, None, None, 0)
    state.step = 3
    assert state.improves(3.2)
    save(engine, tmp_path, settings, state, keep=1)
    found = best(tmp_path)
    assert found is not None
    assert found.name == "step-00000003"


def test_what_an_earlier_version_kept_of_losses_is_left_behind(tmp_path: Path):
    kept = asdict(Progress(recent_losses={"emotion": [0.5]}))
    assert parse_progress(kept, tmp_path).recent_losses == {"emotion": [0.5]}
    assert parse_progress(kept | {"recent_losses": [0.5, 0.25]}, tmp_path).recent_losses == {}


def test_what_was_left_out_is_passed_over_in_order():
    random = np.random.default_rng(1)
    for _ in range(50):
        left_out = random.permutation(40)[: random.integers(0, 12)].tolist()
        kept = [s for s in range(80) if s not in left_out]
        assert [Progress(left_out=left_out).reads(s) for s in range(60)] == kept[:60]
