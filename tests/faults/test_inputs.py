"""Wrong inputs at every door: configurations mutated once, random and mutated files. Each is one line and an exit code, within 2 GiB and
10 s: never a traceback, never a silent start.

A mutated table may still be a whole one (a letter of a text was changed), and a mutated host name another host's: those are accepted, and
counted so; a file of another kind that is accepted is an error.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from redheart.config import dump_config, load_config
from redheart.data.shards import INDEX
from redheart.files import MANIFEST, sha256_of, write_manifest, write_sealed_json
from redheart.schema import RedHeartError
from redheart.train.checkpoint import last
from tests.faults.test_kills import SEED
from tests.faults.trials import ROOT, TABLE, Server, refused

SAMPLE = {"test_configurations_mutated_once"}
WRONG = (
    "{a: 1}",
    "[[1], 2]",
    "'many words'",
    "[",
    "{",
    "\t",
    '"',
    "!!python/name:os.system",
    "*x",
    ".nan",
    "-.inf",
    "-1e400",
    "\x00",
)


def mutated_config(whole: list[str], chosen: random.Random) -> str:
    """The lines of a configuration with one change that no configuration can have."""
    number = chosen.choice([n for n, line in enumerate(whole) if ":" in line])
    line, lines = whole[number], list(whole)
    key, _, _ = line.partition(":")
    place = chosen.randrange(len(key) - len(key.lstrip()), len(key))
    kind = chosen.randrange(4)
    if kind == 0:  # a misspelt key
        lines[number] = line[:place] + "xq" + line[place:]
    elif kind == 1:  # an impossible value
        lines[number] = f"{key}: {chosen.choice(WRONG)}"
    elif kind == 2:  # a key that is there twice
        lines.insert(number, line if not line.endswith(":") else f"{line} {{}}")
    else:  # a line of nobody's
        lines.insert(
            number, chosen.choice(("nonsense", "  - :", "}", "\tx: 1", "a: b: c", "? x", "--- |", "%YAML 9", "@x: 1"))
        )
    return "\n".join(lines) + "\n"


def test_configurations_mutated_once(tmp_path: Path):
    print(f"seed {SEED}")
    whole, chosen = dump_config(load_config("local")).splitlines(), random.Random(f"{SEED} configurations")
    file = tmp_path / "mutated.yaml"
    for _ in range(100):
        file.write_text(mutated_config(whole, chosen))
        with pytest.raises(RedHeartError) as refusal:
            load_config(str(file))
        assert str(refusal.value)
        TABLE.add("a configuration mutated once", "refused")


def noise(chosen: random.Random) -> bytes:
    """What is no file of ours: bytes, text, JSON, heads of other formats."""
    heads = (
        b"",
        b"\x89PNG\r\n",
        b"PK\x03\x04",
        b"ARROW1\0\0",
        b"PAR1",
        b"\xff\xfe",
        b"\x80\x02",
        b"{",
        b"[",
        b'"',
        b"[" * 5000,
        b"\0" * 64,
    )
    body = bytes(chosen.randrange(256) for _ in range(chosen.choice((0, 1, 7, 300, 5000))))
    return chosen.choice(heads) + (body if chosen.random() < 0.7 else body.hex().encode())


def says_the_same(content: bytes, changed: bytes) -> bool:
    """Whether both are JSON of the same: a space more between two words of it is no damage."""
    try:
        return json.loads(content) == json.loads(changed)
    except ValueError:
        return False


def mutated(content: bytes, chosen: random.Random) -> bytes:
    """One change: bytes replaced, put in, taken out or shown twice, the end cut off; a number made large."""
    start = chosen.randrange(len(content))
    stop = min(len(content), start + chosen.choice((1, 1, 4, 64, 1000)))
    junk = bytes(chosen.randrange(256) for _ in range(stop - start))
    return chosen.choice(
        (
            content[:start] + junk + content[stop:],
            content[:start] + junk + content[start:],
            content[:start] + content[stop:],
            content[:stop] + content[start:],
            content[: start + 1],
            content[:start] + b"9999999999999999" + content[stop:],
        )
    )


CSV = "text,regret,split\n" + "".join(f'"I forgot it, {n}.",0.{n},train\n' for n in range(9))
RECORDS = [{"text": f"I forgot it, {n}.", "regret": n / 10, "split": "train"} for n in range(9)]


class Doors:
    """door -> (whether a mutated file may be whole, what puts a content there and gives the command)."""

    def __init__(self, server: Server, home: Path):
        self.server, self.home = server, home

    def table(self, suffix: str, content: bytes) -> list[str | Path]:
        (self.home / f"own.{suffix}").write_bytes(content)
        shutil.rmtree(self.home / "out", ignore_errors=True)
        return [
            "prepare",
            "--source",
            f"own={self.home / f'own.{suffix}'}",
            "--out",
            self.home / "out",
            "--set",
            "data.labeler.max_texts=0",
        ]

    def index(self, content: bytes) -> list[str | Path]:
        (self.home / "data" / INDEX).write_bytes(content)
        return self.trains()

    def sealed_index(self, content: bytes) -> list[str | Path]:
        """With a digest that fits, where it is still a mapping."""
        try:
            write_sealed_json(
                self.home / "data" / INDEX, {k: v for k, v in json.loads(content).items() if k != "sha256"}
            )
        except (ValueError, AttributeError, RecursionError):
            (self.home / "data" / INDEX).write_bytes(content)
        return self.trains()

    def shard(self, content: bytes) -> list[str | Path]:
        (self.home / "data" / "train-00000.arrow").write_bytes(content)
        return self.trains()

    def named_shard(self, content: bytes) -> list[str | Path]:
        """With an index that says so."""
        file = self.home / "data" / "train-00000.arrow"
        file.write_bytes(content)
        index = json.loads((self.home / "data" / INDEX).read_text())
        index.pop("sha256")
        index["splits"]["train"]["shards"][0] |= {"sha256": sha256_of(file), "bytes": len(content)}
        write_sealed_json(self.home / "data" / INDEX, index)
        return self.trains()

    def trains(self) -> list[str | Path]:
        run = self.home / "run"
        return ["train", "--data", self.home / "data", "--out", run, "--resume", "--set", "training.max_steps=2"]

    def checkpoint(self, name: str, content: bytes) -> list[str | Path]:
        """With a manifest that says so."""
        folder = last(self.home / "run")
        assert folder is not None
        (folder / name).write_bytes(content)
        if name != MANIFEST:
            write_manifest(folder)
        return ["export", "--checkpoint", self.home / "run", "--out", self.home / "out"]

    def export(self, name: str, content: bytes) -> list[str | Path]:
        """Without a manifest."""
        (self.home / "export" / MANIFEST).unlink(missing_ok=True)
        (self.home / "export" / name).write_bytes(content)
        return ["export", "--checkpoint", self.home / "export", "--out", self.home / "out"]


@pytest.fixture(scope="module")
def exported(server: Server, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = Path(shutil.copytree(world, tmp_path_factory.mktemp("exported") / "home"))
    server.done("export", {"home": str(home)})
    return home


def cases(home: Path, doors: Doors) -> Iterator[tuple[str, bool, bytes, Callable[[bytes], list[str | Path]]]]:
    folder = last(home / "run")
    assert folder is not None
    for suffix, text in (
        ("csv", CSV), ("tsv", CSV.replace(",", "\t")), ("json", json.dumps(RECORDS)),
        ("jsonl", "".join(json.dumps(r) + "\n" for r in RECORDS)),
    ):  # fmt: skip
        yield f"table .{suffix}", True, text.encode(), lambda c, s=suffix: doors.table(s, c)
    yield "index", False, (home / "data" / INDEX).read_bytes(), doors.index
    yield "index, sealed anew", True, (home / "data" / INDEX).read_bytes(), doors.sealed_index
    yield "shard", False, (home / "data" / "train-00000.arrow").read_bytes(), doors.shard
    yield "shard, named anew", True, (home / "data" / "train-00000.arrow").read_bytes(), doors.named_shard
    for name in ("trainer.json", "config.yaml", "plain_state.pt", MANIFEST, "calibration.json"):
        yield (
            f"checkpoint {name}",
            name != MANIFEST,
            (folder / name).read_bytes(),
            lambda c, n=name: doors.checkpoint(n, c),
        )
    for name in ("config.json", "redheart.json", "model.safetensors", "calibration.json"):
        yield f"export {name}", True, (home / "export" / name).read_bytes(), lambda c, n=name: doors.export(n, c)


@pytest.mark.parametrize("part", range(4))
def test_random_and_mutated_files(server: Server, exported: Path, tmp_path: Path, part: int):
    print(f"seed {SEED}")
    chosen, wrong = random.Random(f"{SEED} files {part}"), []
    for name, may_be_whole, content, _ in cases(exported, Doors(server, exported)):
        for trial in range(5):
            home = Path(shutil.copytree(exported, tmp_path / "home"))
            door = next(put for other, _, _, put in cases(exported, Doors(server, home)) if other == name)
            changed = noise(chosen) if trial < 2 else mutated(content, chosen)
            end = refused(server.command(*door(changed)))
            if end == "accepted" and trial >= 2 and (may_be_whole or says_the_same(content, changed)):
                end = "still whole"
            if trial < 2 and name in ("table .csv", "table .tsv") and end == "accepted":
                end = "still whole"
            TABLE.add(f"a file at the door: {name}", end if end in ("refused", "still whole") else "wrong")
            if end not in ("refused", "still whole"):
                wrong.append((name, end, changed[:80]))
            shutil.rmtree(home)
    assert not wrong, "\n".join(map(str, wrong))


def test_hostfiles(tmp_path: Path):
    """A launcher of ours stands in for the real one, and says what it was called with."""
    print(f"seed {SEED}")
    stub = tmp_path / "bin" / "accelerate"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    copy = tmp_path / "checkout" / "launch"
    shutil.copytree(ROOT / "launch", copy)
    chosen, whole = random.Random(f"{SEED} hostfiles"), b"node-a slots=2\nnode-b slots=2\n"
    planted = [
        b"$(touch made) slots=2\n",
        b"a;touch${IFS}made slots=2\n",
        b"-oProxyCommand=x slots=1\n",
        b"`touch made` slots=1\n",
    ]
    for number in range(40):
        file = tmp_path / "hostfile"
        file.write_bytes(planted[number] if number < 4 else noise(chosen) if number < 20 else mutated(whole, chosen))
        done = subprocess.run(
            ["bash", str(copy / "multinode" / "run_node.sh"), "--hostfile", str(file), "--node-rank", "0", "--", "train"],
            capture_output=True, timeout=10, cwd=tmp_path, env={**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        said = done.stderr.decode(errors="replace")
        assert done.returncode in (0, 2), (file.read_bytes(), said)
        assert done.returncode == 0 or "run_node: " in said, (file.read_bytes(), said)
        assert not list(tmp_path.rglob("made"))
        if done.returncode == 0:
            for line in done.stdout.decode().splitlines():
                assert not any(c in line for c in "$;`|&<>"), line
        TABLE.add("a file at the door: hostfile", "refused" if done.returncode else "still whole")
