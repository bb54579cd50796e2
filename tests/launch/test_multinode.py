"""A real run across two nodes: the losses of one node to the last bit, nothing passed on, and a lost node loses nothing.

The nodes are network namespaces of this machine (nodes.py); the network is tiny, the data random features.
"""

import json
import subprocess
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from redheart.data.shards import label_facts, open_shard, write_shard
from redheart.files import read_pointer
from redheart.train.checkpoint import committed
from tests.data.shard_data import MAX_TOKENS, WIDTH, make_row, write_index
from tests.launch.nodes import INTERFACE, Nodes, why_not
from tests.runs import BIN, ROOT, losses, redheart

pytestmark = pytest.mark.multinode
REASON = why_not()
if REASON:
    pytest.skip(REASON, allow_module_level=True)

STEPS = 8
PATIENCE_S = 600  # for a run to end; on a quiet machine a tenth of it is enough
TIMEOUT_S = 20  # how long a rank waits for one that does not answer
END_S = TIMEOUT_S + 100  # and by then every process of both nodes has ended, on a busy machine too
SETTINGS = [
    *("model.width=24", "model.heads=2", "model.layers=1", "model.task_width=16", "model.task_heads=2", "model.encoder_width=8"),
    *("data.encoder.name=random", "data.encoder.layers=[0]", f"data.encoder.max_tokens={MAX_TOKENS}"),
    *(f"training.max_steps={STEPS}", "training.log_every=1", "training.evaluate_every=1000", "training.checkpoint_every=2"),
    *(f"training.collective_timeout_s={TIMEOUT_S}", "checkpoint.keep_last=9"),
]  # fmt: skip


def words(data: Path, run: Path, *more: str) -> list[str]:
    arguments = ["train", "--preset", "local", "--data", str(data), "--out", str(run)]
    return [*arguments, *(word for setting in SETTINGS for word in ("--set", setting)), *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training rows and 4 dev rows of random features."""
    directory, rng = tmp_path_factory.mktemp("nodes") / "data", np.random.default_rng(0)
    directory.mkdir()
    splits = {}
    for split, size in (("train", 24), ("dev", 4), ("test", 4)):
        rows = [{**make_row(n, rng), "split": split} for n in range(size)]
        shard = write_shard(directory / f"{split}-00000.arrow", rows, WIDTH, MAX_TOKENS)
        opened = open_shard(directory / shard["file"], WIDTH)
        splits[split] = {
            "rows": size,
            "shards": [shard],
            **label_facts([(opened.values, opened.weights)]),
        }
    encoder = {"name": "random", "revision": "", "layers": [0], "width": WIDTH, "max_tokens": MAX_TOKENS}
    write_index(directory, splits, encoder, levels={"regret": [0.3, 0.6]})
    return directory


@pytest.fixture(scope="module")
def one_node(data: Path) -> dict[int, float]:
    """The losses of two ranks on one node; run first, so that the kernels are compiled."""
    run = data.parent / "one-node"
    launcher = [str(BIN / "accelerate"), "launch", "--config_file", "launch/accelerate/zero2_offload.yaml"]
    launcher += ["--num_processes", "2", "--main_process_port", "0", "-m", "redheart"]
    done = redheart(*words(data, run), launcher=launcher, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    found = losses(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


class Pair:
    """One run on both nodes, node 0 with a secret in its environment."""

    def __init__(self, nodes: Nodes, launcher: str, folder: Path, arguments: list[str]):
        self.nodes, self.secret = nodes, f"secret-{uuid.uuid4().hex}"
        hostfile = folder / "hostfile"
        hostfile.write_text("node-0 slots=1\nnode-1 slots=1\n")
        self.logs = [folder / f"node-{k}-{uuid.uuid4().hex[:4]}.log" for k in range(2)]
        command = ["bash", ROOT / "launch/multinode/run_node.sh", "--launcher", launcher, "--hostfile", hostfile]
        self.processes: list[subprocess.Popen[bytes]] = []
        for k in range(2):
            more = ["--node-rank", str(k), "--interface", INTERFACE, "--main-port", "29611", "--", *arguments]
            token = {"SECRET_TOKEN": self.secret} if k == 0 else {}
            self.processes.append(nodes.start(k, [*command, *more], self.logs[k], **token))

    def said(self) -> str:
        return "\n".join(f"== node {k}\n{log.read_text(errors='replace')[-3000:]}" for k, log in enumerate(self.logs))

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes, None where a node has not ended by then."""
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in self.processes) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [p.poll() for p in self.processes]

    def wait_for_checkpoint(self, run: Path, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not committed(run):
            assert all(p.poll() is None for p in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)


def holding(folder: Path, secret: str) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_two_nodes_have_the_losses_of_one_and_pass_no_secret_on(
    launcher: str, data: Path, one_node: dict[int, float], tmp_path: Path
):
    run = tmp_path / "run"
    with Nodes() as nodes:
        pair = Pair(nodes, launcher, tmp_path, words(data, run))
        pair.wait_for_checkpoint(run, PATIENCE_S)
        on_nodes = [any(pair.secret.encode() in e for e in nodes.environments(k)) for k in range(2)]
        assert pair.wait(PATIENCE_S) == [0, 0], pair.said()
    assert losses(run) == one_node
    assert on_nodes == [True, False]
    assert holding(tmp_path, pair.secret) == []
    places = (ROOT, Path.home(), tmp_path, tmp_path / "run")
    assert [p for p in places if (p / ".deepspeed_env").exists()] == []


def test_a_node_that_is_cut_off_ends_the_run_and_resume_loses_nothing(
    data: Path, one_node: dict[int, float], tmp_path: Path
):
    run = tmp_path / "run"
    with Nodes() as nodes:
        pair = Pair(nodes, "deepspeed", tmp_path, words(data, run))
        pair.wait_for_checkpoint(run, PATIENCE_S)
        nodes.cut(1)
        codes = pair.wait(END_S)
        assert None not in codes, pair.said()
        assert 0 not in codes, pair.said()
        for log in pair.logs:
            text = log.read_text()
            assert "lost another rank" in text, pair.said()
            assert "--resume goes on from the last checkpoint" in text
            assert "Traceback" not in text, text
        last = read_pointer(run / "checkpoints" / "last")
        assert last is not None
        assert json.loads((last / "trainer.json").read_text())["step"] < STEPS
        nodes.join(1)
        again = Pair(nodes, "deepspeed", tmp_path, words(data, run, "--resume"))
        assert again.wait(PATIENCE_S) == [0, 0], again.said()
    assert losses(run) == one_node


@pytest.mark.slow
@pytest.mark.usefixtures("one_node")  # it has compiled the kernels
def test_nodes_that_share_no_run_directory_are_told_so(data: Path, tmp_path: Path):
    with Nodes() as nodes:
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("node-0 slots=1\nnode-1 slots=1\n")
        started, logs = [], [tmp_path / f"node-{k}.log" for k in range(2)]
        for k in range(2):
            command = ["bash", ROOT / "launch/multinode/run_node.sh", "--launcher", "torchrun", "--hostfile", hostfile]
            command += ["--node-rank", str(k), "--interface", INTERFACE, "--", *words(data, tmp_path / f"own-{k}")]
            started.append(nodes.start(k, command, logs[k]))
        deadline = time.monotonic() + PATIENCE_S
        while any(p.poll() is None for p in started) and time.monotonic() < deadline:
            time.sleep(0.1)
        text = [log.read_text(errors="replace") for log in logs]
        assert all(p.poll() not in (None, 0) for p in started), text
    assert all("is not the same on all nodes" in one for one in text), text
    assert "does not see what rank 0 wrote" in text[1]
