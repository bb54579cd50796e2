"""Files are whole or absent, and damage is found and named."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from redheart import files
from redheart.config import DataConfig
from redheart.data.gather import gather
from redheart.data.store import Store
from redheart.early import directory_to_make
from redheart.files import (
    MANIFEST,
    committed_directory,
    no_room,
    read_json,
    read_pointer,
    read_sealed_json,
    read_sealed_lines,
    seal,
    sealed_line,
    unseal,
    verify_manifest,
    write_json,
    write_manifest,
    write_pointer,
    write_sealed_json,
    write_text,
)
from redheart.owned import check_new, make_directory
from redheart.schema import RedHeartError


class PowerCutError(Exception):
    """Stands for the machine going down."""


def interrupted(final, name):
    """An attempt to commit a directory with one file that dies half-way."""
    with committed_directory(final) as directory:
        (directory / name).write_text("half")
        raise PowerCutError


def crash(*_):
    raise PowerCutError


@pytest.fixture
def committed(tmp_path):
    final = tmp_path / "step-1"
    with committed_directory(final) as directory:
        (directory / "weights.bin").write_bytes(bytes(range(256)))
        (directory / "deep").mkdir()
        (directory / "deep" / "state.json").write_text("{}")
    return final


def test_a_text_is_written_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "note.txt"
    write_text(path, "정 한\n")
    assert path.read_bytes() == "정 한\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["note.txt"]


def test_a_crash_before_the_rename_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "note.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(PowerCutError):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_the_bytes_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_text(tmp_path / "note.txt", "x")
    assert events == ["sync", "rename", "sync"]  # the file, then its new name, then the folder's list of names


def test_json_round_trips_with_hangul_readable(tmp_path):
    value = {"jeong": "정", "shares": [0.1, None, 1e-9], "deep": {"b": 1, "a": 2}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", "-") == value
    assert "정" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_a_missing_or_broken_json_names_the_file_and_the_remedy(tmp_path):
    with pytest.raises(RedHeartError, match=r"x\.json does not exist: do this"):
        read_json(tmp_path / "x.json", "do this")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(RedHeartError, match=r"x\.json is not valid JSON .*: do that"):
        read_json(tmp_path / "x.json", "do that")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RedHeartError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json", "do that")


def test_the_manifest_lists_every_file_but_itself(committed):
    entries = json.loads((committed / MANIFEST).read_text())["files"]
    assert set(entries) == {"weights.bin", "deep/state.json"}
    assert entries["weights.bin"]["bytes"] == 256
    # sha256 of the bytes 0 … 255, a known value
    assert entries["weights.bin"]["sha256"] == "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"


def test_an_untouched_directory_verifies(committed):
    verify_manifest(committed)
    write_manifest(committed)  # writing it again changes nothing
    verify_manifest(committed)


@pytest.mark.parametrize("position", [0, 100, 255])
def test_one_flipped_bit_is_found_and_named(committed, position):
    content = bytearray((committed / "weights.bin").read_bytes())
    content[position] ^= 0b100
    (committed / "weights.bin").write_bytes(content)
    with pytest.raises(RedHeartError, match=re.escape(f"{committed / 'weights.bin'} is damaged")):
        verify_manifest(committed)


def test_a_missing_file_is_named(committed):
    (committed / "deep" / "state.json").unlink()
    with pytest.raises(RedHeartError, match=r"deep/state\.json is missing"):
        verify_manifest(committed)


def test_a_directory_without_a_manifest_was_never_committed(tmp_path):
    with pytest.raises(RedHeartError, match="never committed"):
        verify_manifest(tmp_path)


def test_a_committed_directory_appears_at_the_end_alone(tmp_path):
    final = tmp_path / "step-1"
    with committed_directory(final) as directory:
        (directory / "a").write_text("1")
        assert not final.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_an_error_inside_leaves_nothing_under_the_final_name(tmp_path):
    with pytest.raises(PowerCutError):
        interrupted(tmp_path / "step-1", "a")
    assert not (tmp_path / "step-1").exists()
    assert not list(tmp_path.rglob(MANIFEST))


def test_an_error_inside_leaves_the_committed_one_untouched(committed):
    with pytest.raises(PowerCutError):
        interrupted(committed, "weights.bin")
    verify_manifest(committed)
    assert (committed / "weights.bin").read_bytes() == bytes(range(256))


def test_what_an_interrupted_attempt_left_is_not_taken_over(tmp_path):
    final = tmp_path / "step-1"
    with pytest.raises(PowerCutError):
        interrupted(final, "stale")
    with committed_directory(final) as directory:
        (directory / "fresh").write_text("1")
    assert {p.name for p in final.iterdir()} == {"fresh", MANIFEST}
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_neighbours_that_look_like_ours_are_left_alone(tmp_path):
    for name in ("model.old", "model.tmp", ".model.tmp", "model.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "note").write_text("mine")
    for name in ("card.tmp", "card.old", ".card.tmp"):
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        with committed_directory(tmp_path / "model", replace=True) as directory:
            (directory / "a").write_text("1")
        write_text(tmp_path / "card", "x")
    new = {tmp_path / "model", tmp_path / "model" / "a", tmp_path / "model" / MANIFEST, tmp_path / "card"}
    assert set(tmp_path.rglob("*")) == {*before, *new}
    assert all(p.read_text() == "mine" for p in before if p.is_file())


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_fills_is_not(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from redheart.files import committed_directory\n"
        "with committed_directory(Path(sys.argv[1])) as d: (d / 'a').write_text('1'); print('there', flush=True); sys.stdin.read()"
    )
    final = tmp_path / "model"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(final)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "there\n"
        (theirs,) = tmp_path.iterdir()
        with committed_directory(final, replace=True):
            assert theirs.exists()
        assert {theirs, final} == set(tmp_path.iterdir())
        other.kill()
    with committed_directory(final, replace=True):
        assert not theirs.exists()
    assert [final] == list(tmp_path.iterdir())


def test_what_came_to_exist_meanwhile_is_not_replaced(tmp_path):
    final = tmp_path / "model"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note").write_text("mine")
    with pytest.raises(RedHeartError, match="come to exist"), committed_directory(final):
        os.rename(tmp_path / "other", final)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "note"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_write_that_finds_no_room_is_known_by_its_error(number):
    assert no_room(OSError(number, "x", "weights.bin")) == f"{os.strerror(number)}: weights.bin"
    assert no_room(SafetensorError(f"Error while serializing: I/O error: x (os error {number})")) == os.strerror(number)
    assert no_room(OSError(errno.EACCES, "x")) is None
    assert no_room(RuntimeError("file not found")) is None


def test_torch_s_own_error_of_a_write_that_finds_no_room_is_known(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises((OSError, RuntimeError)) as caught:
            torch.save({"a": torch.zeros(10_000)}, tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert no_room(caught.value)


def test_a_text_that_finds_no_room_leaves_the_old_one_and_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [path] == list(tmp_path.iterdir())


def test_a_directory_is_replaced_as_a_whole(committed):
    with committed_directory(committed, replace=True) as directory:
        (directory / "other").write_text("1")
    assert {p.name for p in committed.iterdir()} == {"other", MANIFEST}
    verify_manifest(committed)


def test_a_crash_while_replacing_loses_nothing_committed(committed, monkeypatch):
    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(PowerCutError), committed_directory(committed, replace=True) as directory:
        (directory / "other").write_text("1")
    verify_manifest(committed)


def test_a_directory_has_its_name_only_once_it_has_its_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "write_manifest", crash)
    final = tmp_path / "step-1"
    with pytest.raises(PowerCutError), committed_directory(final) as directory:
        (directory / "a").write_text("1")
    assert not final.exists()


def test_a_pointer_names_a_sibling(tmp_path):
    assert read_pointer(tmp_path / "last") is None
    write_pointer(tmp_path / "last", "step-00000010")
    write_pointer(tmp_path / "last", "step-00000020")
    assert read_pointer(tmp_path / "last") == tmp_path / "step-00000020"


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"../elsewhere\n", b"/etc\n"])
def test_a_damaged_pointer_names_nothing(tmp_path, content):
    (tmp_path / "last").write_bytes(content)
    assert read_pointer(tmp_path / "last") is None


def flipped(content, bit):
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def test_every_flipped_bit_of_a_sealed_json_is_refused_or_changes_nothing(tmp_path):
    value = {"rows": 12, "share": 0.1, "names": ["정", "a"], "deep": {"x": None, "y": [1, 2.5]}}
    path = tmp_path / "index.json"
    write_sealed_json(path, value)
    content = path.read_bytes()
    assert read_sealed_json(path, "again") == value
    for bit in range(len(content) * 8):
        path.write_bytes(flipped(content, bit))
        with suppress(RedHeartError):
            assert read_sealed_json(path, "again") == value


def test_every_flipped_bit_of_a_sealed_text_is_refused_or_leaves_no_seal(tmp_path):
    body = "a: 1\nb: [한, 2]\n"
    content = seal(body).encode()
    path = tmp_path / "config.yaml"
    assert unseal(content.decode(), path, "again") == body
    assert unseal(body, path, "again") == body
    for bit in range(len(content) * 8):
        try:
            text = flipped(content, bit).decode()
        except UnicodeDecodeError:
            continue
        try:
            found = unseal(text, path, "again")
        except RedHeartError:
            continue
        assert found.startswith(body)  # the seal's own words were hit: what it sealed is untouched


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"{", b""])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "trainer.json").write_bytes(content)
    with pytest.raises(RedHeartError, match=r"trainer\.json .*again"):
        read_json(tmp_path / "trainer.json", "again")
    with pytest.raises(RedHeartError, match="cannot be read"):
        read_json(tmp_path, "again")


def test_every_flipped_bit_of_a_manifest_is_refused_or_changes_nothing(committed):
    path = committed / MANIFEST
    content = path.read_bytes()
    value = json.loads(content)
    for bit in range(0, len(content) * 8, 7):
        path.write_bytes(flipped(content, bit))
        with suppress(RedHeartError):
            verify_manifest(committed)
            assert json.loads(path.read_bytes()) == value


@pytest.mark.parametrize(
    "content", [{}, {"files": []}, {"files": {"a": "b"}}, {"files": {"a": {"sha256": 1}}}, {"files": {}, "x": 1}]
)
def test_a_sealed_manifest_of_another_form_is_named(tmp_path, content):
    write_sealed_json(tmp_path / MANIFEST, content)
    with pytest.raises(RedHeartError, match=r"manifest\.json is no manifest"):
        verify_manifest(tmp_path)


def test_a_manifest_without_its_own_sum_is_refused_and_a_free_file_may_change(committed):
    (committed / "deep" / "state.json").write_text("mine")
    verify_manifest(committed, free={"deep/state.json"})
    (committed / "deep" / "state.json").unlink()
    verify_manifest(committed, free={"deep/state.json"})
    write_json(committed / MANIFEST, {"files": json.loads((committed / MANIFEST).read_text())["files"]})
    with pytest.raises(RedHeartError, match=r"manifest\.json has no sha256 of its own"):
        verify_manifest(committed)


def test_sealed_lines_come_back_and_a_damaged_one_is_named_by_its_number(tmp_path):
    values = [{"step": n, "text": "정\u2028"} for n in range(3)]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(map(sealed_line, values)) + '{"half', encoding="utf-8")
    assert read_sealed_lines(path, "again") == values
    content = "".join(map(sealed_line, values)).encode()
    middle = content.index(b"\n") + 1
    for bit in range(middle * 8, content.index(b"\n", middle) * 8, 3):
        path.write_bytes(flipped(content, bit))
        with suppress(RedHeartError):
            assert read_sealed_lines(path, "again") == values
    path.write_bytes(content[:-1] + b"\x0b")
    with pytest.raises(RedHeartError, match=r"line 3 of .*lines\.jsonl is damaged"):
        read_sealed_lines(path, "again")
    path.write_text("".join(map(sealed_line, values)).replace(": 1", ": 2"), encoding="utf-8")
    with pytest.raises(RedHeartError, match=r"line 2 of .*lines\.jsonl is damaged"):
        read_sealed_lines(path, "again")


def test_a_name_that_is_not_utf8_is_refused_before_it_is_written_down(tmp_path):
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    (bad / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(bad)
    table = bad / "texts.csv"
    table.write_text("text,regret\nOne.,0.5\n")
    for refused in (
        lambda: make_directory(bad / "run", "--out"),
        lambda: check_new(tmp_path / "link" / "model"),
        lambda: Store(bad),
        lambda: gather([f"own={table}"], DataConfig(), skip_invalid=False),
        lambda: directory_to_make(bad, "--out"),
    ):
        with pytest.raises(RedHeartError, match="is not UTF-8: rename it"):
            refused()
    for name in ("a\udcff", "a\nb", "a\x1b[31m"):
        with pytest.raises(RedHeartError, match="nothing in it that cannot be shown"):
            gather([f"{name}={table}"], DataConfig(), skip_invalid=False)
