"""What a door is given in place of what it wants: a file for a directory, the reverse, a device that is not there. One line each."""

from pathlib import Path

import pytest
import torch

from redheart import cli
from redheart.bench.parity import bench_parity
from redheart.config import load_config
from redheart.data.dedup import dedup
from redheart.data.store import Store
from redheart.device import device_of
from redheart.infer import RedHeartPipeline
from redheart.schema import RedHeartError
from redheart.train.claim import Claim
from redheart.train.export import export, resolve
from redheart.train.grow import grow
from redheart.train.validate import validate
from redheart.version import VERSION


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xfftext")
    return path


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """What `redheart ARGUMENTS` ends with, in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr("sys.argv", ["redheart", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    code = ended.value.code
    return code if isinstance(code, int) else 0, told.out, told.err


def test_the_version_alone_is_an_answer(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, VERSION + "\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--checkpoint", "FILE"),
        ("predict", "--checkpoint", "FILE", "text"),
        ("export", "--checkpoint", "FILE", "--out", "x"),
        ("grow", "--checkpoint", "FILE", "--to", "base", "--out", "x"),
        ("dedup", "--data", "FILE"),
        ("params", "--preset", "FOLDER.yaml"),
        ("params", "--preset", "FILE.yaml"),
        ("bench", "ablation", "--checkpoint", "FILE"),
        ("bench", "gpu", "--out", "FILE"),
        ("bench", "loader", "--data", "FILE"),
        ("plan", "--write-ds-configs", "FILE"),
    ],
)
def test_a_file_for_a_directory_is_one_line(monkeypatch, capsys, tmp_path, file, arguments):
    (tmp_path / "folder [x].yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    places = {"FILE": file, "FOLDER.yaml": tmp_path / "folder [x].yaml", "FILE.yaml": tmp_path / "binary.yaml"}
    code, out, err = run(monkeypatch, capsys, *(str(places.get(a, a)) for a in arguments))
    lines = [line for line in err.splitlines() if line.startswith("redheart: ")]
    assert (code, out, len(lines)) == (1, "", 1), err
    assert str(next(places[a] for a in arguments if a in places)) in lines[0]
    assert "Traceback" not in err


def test_the_doors_below_the_command_line_say_so_too(file, tmp_path):
    with pytest.raises(RedHeartError, match=r"is a file.*redheart prepare --source NAME="):
        Store(file)
    with pytest.raises(RedHeartError, match="is a file"):
        resolve(file)
    for out in (file, file / "below"):
        with pytest.raises(RedHeartError, match=r"--out .*is a file"):
            Claim(out).take(resuming=False, overwrite=False, log_samples=False)
    for act in (
        lambda: export(tmp_path, file / "out"),
        lambda: grow(tmp_path, load_config("base"), file / "out"),
        lambda: dedup(str(tmp_path), file / "out", None),
    ):
        with pytest.raises(RedHeartError, match=r"--out .*rows\.csv is a file"):
            act()
    with pytest.raises(RedHeartError, match=r"--report .* is a directory: name a file in it"):
        validate(tmp_path, None, "test", tmp_path)
    with pytest.raises(RedHeartError, match=r"--report .*rows\.csv is a file"):
        validate(tmp_path, None, "test", file / "report.md")
    with pytest.raises(RedHeartError, match=r"--work .* is a file"):
        bench_parity(tmp_path, file, "local", (), 10, 1, 1, None)
    with pytest.raises(RedHeartError, match=r"--out .* is a directory"):
        bench_parity(tmp_path, tmp_path, "local", (), 10, 1, 1, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.csv"]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "mps", "cpu:3", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(tmp_path, name):
    with pytest.raises(RedHeartError, match=r"^--device"):
        device_of(name)
    with pytest.raises(RedHeartError, match=r"^--device"):
        RedHeartPipeline.from_pretrained(tmp_path / "nothing", device=name)
    with pytest.raises(RedHeartError, match=r"^--device"):
        validate(tmp_path / "nothing", None, "test", None, name)


@pytest.mark.parametrize(
    ("count", "name", "fine"), [(0, "cuda", False), (1, "cuda", True), (1, "cuda:1", False), (2, "cuda:1", True)]
)
def test_a_gpu_is_taken_where_torch_counts_one(monkeypatch, count, name, fine):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert device_of("cpu") == torch.device("cpu")
    if fine:
        assert device_of(name) == torch.device(name)
    else:
        with pytest.raises(RedHeartError, match="torch sees"):
            device_of(name)
