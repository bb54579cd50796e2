"""`redheart init`: five questions (your table, its columns, the card, the time, the language) and a file of settings for `train`.

Every answer may be given as an option; what is not given is asked, where there is a terminal. The table is read and checked before
anything is written, so that the file can be trained with.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from redheart.config import DataConfig, load_config, parse_section
from redheart.console import console
from redheart.data.gather import Gathered, gather
from redheart.data.own import SOURCE, columns_of
from redheart.data.pretrained import OPTIONAL
from redheart.data.sources.tabular import header
from redheart.files import write_text
from redheart.memory.budget import gib
from redheart.owned import check_can_make
from redheart.schema import LABELS, PACKAGED, RedHeartError
from redheart.train.length import steps_of

LARGE = 2000  # rows from which on the network of 330M parameters has something to learn from
SAMPLES_PER_S = {"local": 88, "330m": 43}  # on two CPU cores; with its own strategy on an H100 (figures)
MULTILINGUAL = "package:e5-small-ko"  # as wide as the default


def init(
    data: str | None,
    text: str | None,
    labels: Sequence[str],
    card: str | None,
    minutes: float | None,
    language: str | None,
    out: Path,
) -> Path:
    """Asks what is None or empty, writes `out`, and returns it."""
    if out.exists():
        raise RedHeartError(f"{out} exists already: name another --out, or remove it")
    if out.suffix not in (".yaml", ".yml"):
        raise RedHeartError(f"--out {out}: name a file that ends in .yaml")
    check_can_make(out, "--out")
    data = data or _ask("Your texts (a .csv, .tsv, .json, .jsonl or .parquet file)", "--data")
    if not Path(data).is_file():
        raise RedHeartError(
            f"{data} {'is a directory' if Path(data).is_dir() else 'does not exist'}: name the file of your table"
        )
    names = header(Path(data), SOURCE, [text] if text else ())
    console.print(f"its columns: {', '.join(names)}")
    text = text or _ask("Which column holds the texts", "--text", names[0])
    if text not in names:
        raise RedHeartError(f"{data} has no column {text!r}; there are {', '.join(names)}")
    if not labels:
        console.print(
            f"answers: {', '.join(LABELS)}; entries such as emotion.joy; vad.valence:1..5 where the column runs from 1 to 5"
        )
        question = "Which columns are answers, as COLUMN=ANSWER, with spaces between"
        labels = _words(_ask(f"{question} (quote a name that has some)", "--label"))
    columns = columns_of(labels)
    card = card or _ask("Memory of your GPU, such as 8GiB, or none", "--gpu-memory", "none")
    memory = None if card.casefold() == "none" else gib(card, "--gpu-memory")
    minutes = minutes or _minutes(_ask("How many minutes may training take", "--minutes", "10"))
    language = language or _ask("Language of the texts (en, ko, de …)", "--language", "en")
    if language not in (known := PACKAGED[MULTILINGUAL].languages):
        raise RedHeartError(
            f"--language {language!r}: {MULTILINGUAL} reads {', '.join(sorted(known))}; for another, take the file made with "
            "--language en and name an encoder that reads it (data.encoder.name, data.encoder.languages)"
        )
    encoder = {} if language == "en" else {"encoder": {"name": MULTILINGUAL, "languages": [language]}}
    if encoder:
        console.print(
            f"the default encoder reads English alone: for {language!r} it is {MULTILINGUAL}, which reads many languages; "
            f"`{OPTIONAL[MULTILINGUAL]}` adds it to the environment (data.encoder)",
            markup=False,
        )
    values = {"file": data, "columns": {SOURCE: {text: "text", **columns}}, **encoder}
    gathered = gather([f"{SOURCE}={data}"], parse_section(DataConfig, values), False)
    write_text(out, _written(values, gathered, memory, minutes, out))
    try:
        load_config(str(out))  # what it says can be read
    except RedHeartError:
        out.unlink()
        raise
    return out


def _written(data: dict[str, Any], gathered: Gathered, memory: float | None, minutes: float, out: Path) -> str:
    rows = max(1, gathered.sources[SOURCE]["splits"]["train"])
    preset = "330m" if memory is not None and rows >= LARGE else "local"
    config = load_config(preset)
    usual = steps_of(config, rows) * config.training.global_batch_size / rows
    epochs = max(1.0, round(minutes * 60 * SAMPLES_PER_S[preset] / rows, 1))
    lines = [
        f"# Settings of a run on {data['file']}: redheart train {shlex.quote(str(out))}",
        "# Only what differs from the preset stands here; `redheart train --help-config` explains every key.",
        f"extends: {preset}  # " + ("no GPU" if memory is None else f"{rows} training rows"),
        "data:",
        *_indented(_dumped({"file": data["file"]}), "where you call redheart from"),
        "  columns:  # your column: what it says; field:LOW..HIGH where it runs from LOW to HIGH",
        f"    {SOURCE}:",
        *("    " + line for line in _indented(_dumped(data["columns"][SOURCE]))),
    ]
    if "encoder" in data:
        lines.append(f"  encoder:  # reads many languages; {OPTIONAL[MULTILINGUAL]} installs it")
        lines += ["  " + line for line in _indented(_dumped(data["encoder"], default_flow_style=None))]
    if epochs < usual:
        rate = SAMPLES_PER_S[preset]
        lines += [
            "training:",
            f"  epochs: {epochs:g}  # about {minutes:g} minutes at {rate} texts a second; usual: {usual:g}",
        ]
    if memory is not None:
        lines += ["memory:", f"  gpu_memory_gib: {memory:g}"]
    return "\n".join(lines) + "\n"


def _dumped(values: dict[str, Any], **style: Any) -> str:
    """As YAML, an entry a line however long it is: a comment behind a folded line would end its value."""
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=math.inf, **style)


def _indented(text: str, comment: str = "") -> list[str]:
    return [f"  {line}" + (f"  # {comment}" if comment else "") for line in text.splitlines()]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quote without its other half, such as an apostrophe
        return text.split()


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not minutes > 0:  # so is NaN refused
        raise RedHeartError(f"--minutes {text!r}: give a number above 0")
    return minutes


def _ask(question: str, option: str, usual: str = "") -> str:
    if sys.stdin is None or not sys.stdin.isatty():
        raise RedHeartError(f"{option} is missing, and there is no terminal to ask on: {question}?")
    print(f"{question}{f' [{usual}]' if usual else ''}: ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not (answer.strip() or usual):
        raise RedHeartError(f"no answer was given: name it with {option}")
    return answer.strip() or usual
