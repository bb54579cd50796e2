"""Every kind of file with bits flipped, cut short, taken away, and with another run's in its place: refused by its name, or no matter."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redheart.schema import RedHeartError
from tests.faults.kinds import Kind, every_kind, make_kinds, stand_ins  # noqa: F401
from tests.faults.test_kills import SEED
from tests.faults.trials import TABLE

SAMPLE: set[str] = set()  # tests/train/test_flipped_bits.py has one
# whole files that belong to no run: what another run's says is as true
OF_NOBODY = {
    "run config.yaml",
    "run marker",
    "activations",
    "sample log",
    "LLM answers",
    "LLM facts",
    "LLM texts",
    "encoded part",
}
# whose calibration it is, is asked where weights are loaded; without its manifest a checkpoint was never committed, and the one before
# is taken; without its last line, the seal, a config.yaml is the user's; an index of other data is refused by the first of its shards
EXPECTED = {
    ("calibration", "swapped"),
    ("checkpoint manifest.json", "removed"),
    ("run config.yaml", "cut"),
    ("remote index", "swapped"),
}
REPLACEABLE = {  # made again where they are gone
    "pointer last", "pointer best", "calibration", "cached shard", "LLM answers", "LLM facts", "LLM texts", "encoded part", "activations",
    "sample log", "run marker", "export calibration.json", "export redheart.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, stubs: pytest.MonkeyPatch) -> dict[str, Kind]:
    return make_kinds(tmp_path_factory.mktemp("others"), stubs, seed=1)


def end_of(kind: Kind, root: Path, change: Callable[[Path], object], whole: Any) -> str:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(kind.root, root)
    change(root / kind.file)
    torch.manual_seed(0)
    try:
        result = kind.door(root)
    except RedHeartError as error:
        return "refused by name" if Path(kind.file).name in str(error) else f"refused without its name: {error}"
    except Exception as error:
        return f"traceback: {error!r}"
    return "no matter" if result == whole else "another result"


def test_damage_of_every_kind(kinds: dict[str, Kind], others: dict[str, Kind], tmp_path: Path):
    wrong, counted = [], Counter[str]()
    print(f"seed {SEED}")
    for number, (name, kind) in enumerate(kinds.items()):
        root, chosen = tmp_path / f"kind-{number}" / "root", random.Random(f"{SEED} {name}")
        content, other = (kind.root / kind.file).read_bytes(), (others[name].root / others[name].file).read_bytes()
        shutil.copytree(kind.root, root)
        torch.manual_seed(0)
        whole = kind.door(root)
        for damage in ("flipped", "flipped", "flipped", "cut", "cut", "empty", "removed", "swapped"):
            changed: bytes | None = content
            if damage == "flipped":
                place = chosen.randrange(len(content))
                changed = content[:place] + bytes([content[place] ^ 1 << chosen.randrange(8)]) + content[place + 1 :]
            elif damage == "swapped":
                changed = other
            else:
                changed = {"cut": content[: chosen.randrange(1, len(content))], "empty": b"", "removed": None}[damage]
            end = end_of(kind, root, lambda p, c=changed: p.unlink() if c is None else p.write_bytes(c), whole)
            excused = (damage == "swapped" and (name in OF_NOBODY or content == other)) or (
                damage in ("removed", "cut", "empty") and name in REPLACEABLE
            )
            if end == "another result" and excused:
                end = "is nobody's or made again"
            if (name, damage) in EXPECTED and not end.startswith("traceback"):
                end = "as expected"
            TABLE.add(f"a file {damage}", end)
            counted[damage] += 1
            if end not in ("refused by name", "no matter", "is nobody's or made again", "as expected"):
                wrong.append((name, damage, end))
        shutil.rmtree(root.parent)
    assert not wrong, "\n".join(map(str, wrong))
    assert sum(counted.values()) >= 200
