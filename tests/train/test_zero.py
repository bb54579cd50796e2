"""ZeRO-2 and ZeRO-3 with 8-bit states: resumed bit by bit, on another number of ranks too."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from redheart.config import load_config
from redheart.memory import states
from redheart.memory.states import REDUCE_BUCKET, bucket_of
from redheart.model.build import build_model
from redheart.model.select import MODULES
from redheart.train.engine import consolidated_weights, make_engine, weights_in_parts, zero
from redheart.train.engine.machinery import settle_sizes
from redheart.train.engine.universal import universal_checkpoint, whole_moments
from redheart.train.engine.zero import TAG, place_buffers
from redheart.train.engine.zero_files import ZeroFiles, is_readable_in_parts
from redheart.train.measure import run_steps
from tests.runs import distance, forked
from tests.train.tiny import SETTINGS


def test_buffers_follow_where_the_engine_computes():
    """ZeRO-3 places parameters alone: what is no parameter would stay on the host beside a GPU."""
    model = build_model(load_config("local", SETTINGS), None)
    names = [n for n, _ in model.named_buffers()]
    assert names
    place_buffers(model, torch.device("meta"))
    assert {b.device.type for _, b in model.named_buffers()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.state_dict().keys() == build_model(load_config("local", SETTINGS), None).state_dict().keys()


@pytest.mark.parametrize(("stage", "bucket"), [(1, 20_000_000), (2, 20_000_000), (3, REDUCE_BUCKET)])
def test_a_bucket_holds_the_largest_gradient(stage: int, bucket: int):
    """DeepSpeed clones a larger one and keeps it until the backward pass is over; ZeRO-3 does not."""
    settings = [{"zero_optimization": {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET}} for _ in range(2)]
    settle_sizes(settings, [20_000_000, 300])
    assert [s["zero_optimization"]["reduce_bucket_size"] for s in settings] == [bucket] * 2
    settle_sizes(settings, [200, 300])
    assert [s["zero_optimization"]["reduce_bucket_size"] for s in settings] == [bucket] * 2
    assert bucket_of([20_000_000, 300], stage) == bucket


@pytest.mark.parametrize("is_settled", [True, False])
def test_an_engine_lets_go_of_every_gradient_while_it_goes_back(is_settled: bool, monkeypatch: pytest.MonkeyPatch):
    """Bytes of gradients of their own storage when the backward pass of a micro-step is over: none, but with DeepSpeed's small bucket
    all that are larger than it."""
    monkeypatch.setattr(states, "REDUCE_BUCKET", 100)
    whole = zero.deepspeed_config

    def small(*given: Any) -> dict[str, Any]:
        settings = whole(*given)
        settings["zero_optimization"]["reduce_bucket_size"] = 100
        return settings

    monkeypatch.setattr(zero, "deepspeed_config", small)
    if not is_settled:
        monkeypatch.setattr(zero, "settle_sizes", lambda settings, sizes: None)
    config = load_config("local", [*SETTINGS, "memory.strategy=zero2_offload_8bit", "training.precision=fp32"])
    engine = make_engine(partial(build_model, config, None), config, 2, 2)
    try:
        kept: list[int] = []
        ends = engine._zero._clear_param_grad_only

        def look() -> None:
            bucket = engine._zero.ipg_buckets[torch.float32].buffer[0].untyped_storage().data_ptr()
            gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
            kept.append(sum(g.nbytes for g in gradients if g.untyped_storage().data_ptr() != bucket))
            ends()

        monkeypatch.setattr(engine._zero, "_release_ipg_buffers", lambda: None)  # so that `look` finds the bucket
        monkeypatch.setattr(engine._zero, "_clear_param_grad_only", look)
        run_steps(engine, config, 2, 2, 8, 1)
        large = sum(p.nbytes for p in engine.model.parameters() if p.numel() > 100)
        assert kept == [0 if is_settled else large, 0]  # the last micro-step's are gone with their copies on the host
        assert engine._zero.reduce_bucket_size == (
            max(p.numel() for p in engine.model.parameters()) if is_settled else 100
        )
    finally:
        engine.close()


def run(ranks: int, **wanted: Any) -> dict[str, Any]:
    done = forked("tests.train.tiny_run", json.dumps({"precision": "fp32", **wanted}), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("strategy", ["zero2_offload_8bit", pytest.param("zero3_offload_8bit", marks=pytest.mark.slow)])
def test_two_ranks_become_one_and_two_again(strategy: str, tmp_path: Path):
    whole = run(2, strategy=strategy, steps=8, save_at=2, save=str(tmp_path / "a"), twice=True)
    assert whole["optimizer"] == "CPUAdamW8bit"
    assert whole["bitwise"]  # as many ranks: native states
    assert whole["losses"][-1] < whole["losses"][0]
    one = run(1, strategy=strategy, steps=3, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    two = run(2, strategy=strategy, steps=3, load=str(tmp_path / "b"), save=str(tmp_path / "c"))
    assert one["losses"][0] == pytest.approx(whole["losses"][2], rel=1e-5)
    assert one["losses"] == pytest.approx(whole["losses"][2:5], rel=1e-3)
    # twice blocks of 8 bits began elsewhere, and the steps drift apart
    assert two["losses"] == pytest.approx(whole["losses"][5:], rel=1e-2)
    assert not list(tmp_path.glob("*.universal"))
    for saved, steps in ((tmp_path / "a", 2), (tmp_path / "b", 5)):
        assert_read_in_parts(saved, steps, strategy.startswith("zero2"))


def assert_read_in_parts(checkpoint: Path, steps: int, in_parts: bool) -> None:
    """Weights and moments one by one are those of DeepSpeed's ways, of as many ranks as there were; ZeRO-3's are not asked for so."""
    assert is_readable_in_parts(checkpoint / TAG) == in_parts
    read, shapes = weights_in_parts(checkpoint)
    whole = consolidated_weights(checkpoint)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in whole.items()}
    assert all(torch.equal(read(name), tensor) for name, tensor in whole.items())
    assert all(read(name).dtype == tensor.dtype for name, tensor in whole.items())
    if not in_parts:
        return
    files = ZeroFiles(checkpoint / TAG)
    assert files.step == steps
    with universal_checkpoint(checkpoint / TAG) as converted:
        names = [name for name in whole if (converted / "zero" / name / "exp_avg.pt").is_file()]
        assert len(names) > 200
        for name in names:
            for mine, theirs in zip(files.moments(name), whole_moments(converted, name), strict=True):
                assert torch.equal(mine.flatten(), theirs.flatten())


def assert_exported(checkpoint: Path, **wanted: Any) -> None:
    """A ZeRO-3 checkpoint, loaded and gathered, holds what its export does."""
    gathered = checkpoint.with_suffix(".pt")
    run(1, steps=0, load=str(checkpoint), weights=str(gathered), **wanted)
    exported, own = consolidated_weights(checkpoint), torch.load(gathered, weights_only=True)
    assert own.keys() <= exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in own.items())


def test_one_rank_resumes_bitwise_under_zero_3_and_its_losses_are_zero_2s(tmp_path: Path):
    three = run(1, strategy="zero3_offload_8bit", steps=4, save_at=2, save=str(tmp_path / "a"), twice=True)
    assert_exported(tmp_path / "a", strategy="zero3_offload_8bit")
    two = run(1, strategy="zero2_offload_8bit", steps=4, save=str(tmp_path / "b"))
    assert three["bitwise"]
    assert three["losses"] == pytest.approx(two["losses"], rel=2e-3)
    assert len(three["norms"]) == len(MODULES)  # no module's gradient goes missing on its way into a partition
    assert three["norms"] == pytest.approx(two["norms"], rel=1e-3)


@pytest.mark.slow
def test_zero_2_and_3_on_one_and_two_ranks_agree(tmp_path: Path):
    """In fp32 with torch's AdamW, so that nothing but the cutting up differs."""
    found = {}
    for strategy in ("zero2", "zero3"):
        for ranks in (1, 2):
            directory = tmp_path / f"{strategy}-{ranks}"
            found[directory] = run(
                ranks, strategy=strategy, steps=6, save=str(directory), weights=str(directory) + ".pt"
            )
    losses = [told["losses"] for told in found.values()]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
    exported = [consolidated_weights(directory) for directory in found]
    for directory, weights in zip(found, exported, strict=True):
        own = torch.load(f"{directory}.pt", weights_only=True)
        assert own.keys() <= weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in own.items())
        # Adam makes a whole step of a gradient that is rounding alone
        assert distance(weights, exported[0]) <= 1e-5 * torch.cat([t.flatten() for t in weights.values()]).norm()


@pytest.mark.slow
def test_fp32_states_change_their_world_size_too(tmp_path: Path):
    whole = run(1, strategy="zero2_offload", steps=6, save_at=2, save=str(tmp_path / "a"), twice=True)
    assert whole["optimizer"] == "DeepSpeedCPUAdam"
    assert whole["bitwise"]
    two = run(2, strategy="zero2_offload", steps=4, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    assert two["losses"] == pytest.approx(whole["losses"][2:], rel=1e-4)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(7, id="two and one batches", marks=pytest.mark.slow),
        pytest.param(2, id="one and none"),
    ],
)
def test_ranks_with_unlike_numbers_of_batches_evaluate_under_zero_3(rows: int):
    wanted = json.dumps({"rows": rows, "batch_size": 3})
    done = forked("tests.train.evaluate_run", wanted, ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["ranks"] == 2
    assert told["together"]["rows"] == told["alone"]["rows"] == rows
    assert told["together"]["losses"] == pytest.approx(told["alone"]["losses"], rel=1e-5)
