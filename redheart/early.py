"""Arguments looked at before anything heavy is imported: a mistake that files alone can tell costs no start of torch.

The command line asks here first. What passes is looked at again where it is used, since it may change until then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from redheart.console import emit, unheard
from redheart.files import check_name, verify_manifest
from redheart.owned import check_can_make, check_can_make_file
from redheart.ranks import launched_rank, launched_world_size
from redheart.reading import check_output, texts_of
from redheart.schema import RedHeartError

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of click, or of the copy of it that typer brings along
HELP = ("-h", "--help")
SMALL = 8 << 20  # bytes of sources that are read twice rather than found wrong late


def check(group: Any, arguments: Sequence[str]) -> list[str]:
    """The arguments as the parser takes them: with what may be left out, without an option that has `--help` in its value's place.

    Raises RedHeartError. What the parser itself refuses passes, and is refused by it.
    """
    context = typer.Context(group, info_name="redheart")
    command: Any = group
    words, begin = _with_optional_path(list(arguments), "--resume", "last"), 0
    for place, word in enumerate(words):
        if isinstance(command, TyperGroup) and word in command.commands:
            command, begin = command.commands[word], place + 1
            context = typer.Context(command, context, word)
    words = [*words[:begin], *_with_values(command, context, words[begin:])]
    if isinstance(command, TyperGroup) or any(word in HELP for word in words):
        return words
    try:
        given = command.make_context(context.info_name, list(words[begin:]), parent=context.parent).params
    except UsageError:
        return words
    except typer.Exit as end:  # an option that prints and ends, such as --help-config
        sys.exit(end.exit_code)
    if command.name == "train" and given["resume"] is None:
        _run(given)
    for name, look in CHECKS.items():
        if given.get(name) is not None:
            look(given, command.name or "")
    return words


def _with_optional_path(arguments: list[str], option: str, alone: str) -> list[str]:
    """`--resume` may stand without a path: then `alone` is put behind it."""
    if option in arguments:
        after = arguments.index(option) + 1
        if after == len(arguments) or arguments[after].startswith("-"):
            return [*arguments[:after], alone, *arguments[after:]]
    return arguments


def _with_values(command: TyperCommand | TyperGroup, context: typer.Context, words: list[str]) -> list[str]:
    """Raises where an option stands in the place of another one's value; one that is followed by --help goes."""
    options = [p for p in command.get_params(context) if isinstance(p, TyperOption)]
    names = {name for o in options for name in (*o.opts, *o.secondary_opts)} | set(HELP)
    with_value = {name for o in options if not o.is_flag and not o.count for name in o.opts}
    kept: list[str] = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == "--":
            break
        if word in with_value and following in names:
            if following in HELP:
                continue
            raise RedHeartError(f"{word} needs a value, and {following} is an option: `{context.command_path} -h`")
        kept.append(word)
    return [*kept, *words[words.index("--") :]] if "--" in words else kept


def _config(given: dict[str, Any], name: str = "preset") -> Any:
    from redheart.config import load_config

    return load_config(given.get(name) or "local", given.get("set_") or ())


def _settings(given: dict[str, Any], command: str) -> None:
    if command != "train":
        _config(given, "to" if command == "grow" else "preset")


def _sources(given: dict[str, Any], command: str) -> None:
    from redheart.data.gather import gather, look_at

    settings = _config(given).data
    look_at(given["source"], settings)
    paths = [Path(spec.partition("=")[2]) for spec in given["source"]]
    if all(p.is_file() and p.stat().st_size <= SMALL for p in paths):
        with unheard():
            gather(given["source"], settings, given["skip_invalid"])


def _data(given: dict[str, Any], command: str) -> None:
    from redheart.data.store import Store

    if command in ("evaluate", "calibrate", "dedup", "grow") and "://" not in str(given["data"]):
        Store(given["data"])


def _run(given: dict[str, Any]) -> None:
    """Of `train` without --resume."""
    from redheart.config import load_config
    from redheart.data.fingerprint import with_encoder
    from redheart.data.gather import gather
    from redheart.data.own import SOURCE, check_answers, meant
    from redheart.data.shards import INDEX
    from redheart.data.store import Store
    from redheart.origins import origins, shown

    preset, overrides, data = meant(
        given["file"], given["preset"], given["set_"] or (), given["data"], given["text"], given["label"] or ()
    )
    config = load_config(preset or "local", overrides)
    if given["show_config"]:
        on_data = config
        if data and (Path(data) / INDEX).is_file():
            on_data = with_encoder(config, Store(data).index["encoder"])
        values = origins(preset or "local", overrides, on_data) + _engine(config)
        if launched_rank() == 0:
            if not given["json_"]:
                print(shown(values))
            emit({v.key: {"value": v.value, "origin": v.origin} for v in values}, given["json_"])
        sys.exit(0)
    check_answers(config, data)
    if data is None:
        table = Path(str(config.data.file))
        if not table.is_file() or table.stat().st_size <= SMALL:
            with unheard():
                gather([f"{SOURCE}={table}"], config.data, skip_invalid=False)
    elif "://" not in data:
        Store(data)


def _engine(config: Any) -> list[Any]:
    """What Accelerate and DeepSpeed make of it: the only look here that starts torch, and only where they would run."""
    if config.memory.strategy == "plain":
        return []
    from redheart.train.engine.shown import engine_values
    from redheart.train.stages import split_global_batch

    training = config.training
    sizes = split_global_batch(training.global_batch_size, training.micro_batch_size, launched_world_size())
    with redirect_stdout(sys.stderr):  # DeepSpeed greets on stdout, which is kept for results
        return engine_values(config, *sizes)


def named_weights(path: Path) -> None:
    """Raises RedHeartError unless `path` is a directory that looks like an export, a checkpoint or a run."""
    if path.is_file():
        raise RedHeartError(f"checkpoint {path} is a file: name the export, checkpoint or run directory that holds it")
    if not path.is_dir():
        raise RedHeartError(f"checkpoint {path} does not exist")
    if not (path / "config.json").is_file() and not (path / "checkpoints").is_dir():
        verify_manifest(path, only=())


def _out(given: dict[str, Any], command: str) -> None:
    if command in ("prepare", "train", "export", "grow", "dedup"):
        directory_to_make(Path(given["out"]), "--out")


def _input(given: dict[str, Any], command: str) -> None:
    with unheard():
        texts_of(given["text"] or (), Path(given["input_"]), given["column"])


def directory_to_make(path: Path, option: str) -> None:
    if path.is_file():
        raise RedHeartError(f"{option} {path} is a file: name a directory")
    check_name(path, option)
    check_can_make(path, option)


CHECKS: dict[str, Callable[[dict[str, Any], str], None]] = {  # by parameter, in this order
    "checkpoint": lambda given, _: named_weights(Path(given["checkpoint"])),
    "preset": _settings,
    "set_": _settings,
    "to": _settings,
    "data": _data,
    "source": _sources,
    "out": _out,
    "report": lambda given, _: check_can_make_file(Path(given["report"]), "--report", "report.md"),
    "output": lambda given, _: check_output(Path(given["output"])),
    "input_": _input,
    "write_ds_configs": lambda given, _: directory_to_make(Path(given["write_ds_configs"]), "--write-ds-configs"),
}
