"""What `redheart train --data texts.csv --text body --label sorry=regret` means, as settings; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redheart.config import RunConfig
from redheart.data.sources.tabular import SUFFIXES, target_of
from redheart.plain_yaml import setting
from redheart.schema import LABELS, RedHeartError

SOURCE = "own"


def is_table(data: str | Path) -> bool:
    """Whether `data` is a file, or named like one, and no prepared directory or URL."""
    return "://" not in str(data) and (Path(data).is_file() or Path(data).suffix.lower() in SUFFIXES)


def meant(
    file: str | None,
    preset: str | None,
    overrides: Sequence[str],
    data: str | None,
    text: str | None,
    labels: Sequence[str],
) -> tuple[str | None, list[str], str | None]:
    """(preset or file of settings, `--set` values, prepared data) that the arguments of `redheart train` name."""
    if file is not None:
        if not file.endswith((".yaml", ".yml")):
            hint = f": your own table is given as --data {file}" if is_table(file) else ""
            raise RedHeartError(f"{file} is no .yaml file of settings{hint}")
        if preset is not None:
            raise RedHeartError(f"{file} and --preset {preset} both say which settings hold: give one of them")
    columns = columns_of(labels)
    if data is not None and not is_table(data):
        if text or columns:
            raise RedHeartError(
                f"--text and --label name columns of a table, and {data} is none: give --data a file, or leave them out"
            )
        return file or preset, [*overrides], data
    own = [] if data is None else [f"data.file={setting(data)}"]
    if text or columns:
        mapping = {(text or "text"): "text", **columns}
        own.append(f"data.columns={setting({SOURCE: mapping})}")
    return file or preset, [*overrides, *own], None


def check_answers(config: RunConfig, data: str | None) -> None:
    """Raises RedHeartError where there is nothing to train on: no data, or a table without an answer."""
    if data is None and config.data.file is None:
        raise RedHeartError(
            "--data is missing: name a directory made by `redheart prepare`, its URL, or your own table"
        )
    columns = config.data.columns.get(SOURCE, {})
    says = [target_of(target, "data.columns").field in LABELS for target in columns.values()]
    if data is None and columns and not any(says) and config.data.labeler.max_texts == 0:
        raise RedHeartError(
            f"no column of {config.data.file} is an answer: name one with --label COLUMN=regret; the answers are {', '.join(LABELS)}"
        )


def columns_of(labels: Sequence[str]) -> dict[str, str]:
    """{column: our answer} of `COLUMN=ANSWER` texts."""
    columns = {}
    for label in labels:
        column, _, target = label.rpartition("=")
        if not column:
            raise RedHeartError(
                f"--label {label!r}: write it as COLUMN=ANSWER, for instance sorry=regret or happy=emotion.joy"
            )
        if column in columns:
            raise RedHeartError(f"--label {column} is given twice: a column is one answer")
        target_of(target, f"--label {label}")
        columns[column] = target
    return columns
