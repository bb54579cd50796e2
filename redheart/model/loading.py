"""What is asked of weights before they become a network: whole files, and exactly the tensors that the network has.

Transformers builds a network on `meta`, so a tensor that its file lacks would otherwise be memory that nobody wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from redheart.files import MANIFEST, verify_manifest
from redheart.schema import RedHeartError

Shape = tuple[int, ...]
# of the network's tensors; 1 had one for each of its equal parts, 2 no norm of the tokens and no fine emotions in their head,
# 3 biases in attention and at the end of residual branches, 4 corrections of answers that knew no unit, 5 verdicts that heard the
# text through their experts alone
LAYOUT = 6
# what names of these layouts begin with
OLD_TENSORS = {
    "backbone.layers.0.": 1,
    "backbone.layers.attention_bias": 3,
    "aux.utility.correction.": 4,
    "heads.bentham.verdicts.": 5,
}
LOADED = "_is_hf_initialized"  # how Transformers marks a tensor that needs no initialisation
ALIGNMENT = 64  # bytes; torch allocates at its multiples
CARD = "README.md"  # the only file of an export that is the user's to change


def verify_export(directory: Path) -> None:
    """Raises RedHeartError where a file of an export is not what its manifest says. Without a manifest there is nothing to compare."""
    if (directory / MANIFEST).exists():
        remedy = f"export the checkpoint again, or remove {directory / MANIFEST} if the change is yours"
        verify_manifest(directory, remedy, free={CARD})


def is_run_or_checkpoint(path: Path, subfolder: str | None = None) -> bool:
    """Whether a directory is no export of Transformers' layout but something that `redheart train` wrote."""
    return not subfolder and not (path / "config.json").is_file() and (path / "config.yaml").is_file()


def load_whole(load: Callable[..., Any], path: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """`load` (a `from_pretrained` of Transformers) with every tensor accounted for; RedHeartError otherwise.

    With `ignore_mismatched_sizes=True` what fits is taken and the rest is drawn as in a fresh network (`draw_missing`); so is
    what `state_dict` lacks where there is no path.
    """
    told, allowed = options.pop("output_loading_info", False), options.pop("ignore_mismatched_sizes", False)
    if path is not None and (directory := Path(path, options.get("subfolder") or "")).is_dir():
        verify_export(directory)
    try:
        model, info = load(path, *arguments, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    except SafetensorError as error:
        raise RedHeartError(f"{path} has no whole safetensors file ({error}): export the checkpoint again") from None
    if not allowed and path is not None:
        other = {name: (tuple(theirs), tuple(ours)) for name, theirs, ours in info["mismatched_keys"]}
        refuse_other_tensors(
            path,
            dict.fromkeys(info["missing_keys"], ()) | {name: ours for name, (_, ours) in other.items()},
            dict.fromkeys(info["unexpected_keys"], ()) | {name: theirs for name, (theirs, _) in other.items()},
            "; with ignore_mismatched_sizes=True what fits is taken and the rest drawn as in a fresh network",
        )
    if path is not None and (directory := Path(path, options.get("subfolder") or "")).is_dir():
        refuse_integers(directory, model.state_dict())
    align(model)
    return (model, info) if told else model


@torch.no_grad()
def align(model: torch.nn.Module) -> None:
    """Moves tensors that lie anywhere, as those of a mapped safetensors file do, to memory of their own, as torch allocates it.

    Matrix products sum in an order that depends on where their operands begin, so that the same weights would answer differently in
    the last digit when they come from an export and when from a checkpoint.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


@torch.no_grad()
def draw_missing(model: torch.nn.Module, asked: torch.nn.Module, fresh: Callable[[], torch.nn.Module]) -> None:
    """Gives every tensor of `model` that was not loaded its value in a `fresh` network: how a layer begins is said once, in its
    constructor. Nothing happens where the module `asked` lacks none: Transformers asks for one after the other.
    """
    own = [*asked.parameters(recurse=False), *asked.buffers(recurse=False)]
    if all(getattr(tensor, LOADED, False) for tensor in own):
        return
    with torch.device("cpu"):
        drawn = fresh().state_dict()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not getattr(tensor, LOADED, False):
            tensor.copy_(drawn[name])
            setattr(tensor, LOADED, True)


def refuse_layout(layout: int, where: object) -> None:
    """Raises RedHeartError where the tensors at `where` have another layout than this version's."""
    if layout != LAYOUT:
        raise RedHeartError(
            f"{where} was made by {'an earlier' if layout < LAYOUT else 'a later'} version of this program, whose network has another "
            "layout of its weights: use that version for it, or train again"
        )


def refuse_packing(options: Mapping[str, Any]) -> None:
    """Raises RedHeartError where options of `from_pretrained` ask for quantised weights, by bitsandbytes or by anybody else."""
    asked = [name for name in ("load_in_8bit", "load_in_4bit", "quantization_config") if options.get(name)]
    if asked:
        raise RedHeartError(
            f"{asked[0]}: what quantises weights looks for Linear layers, and most weights of this network are those of equal parts, "
            "stacked in one parameter: load it with dtype=torch.bfloat16"
        )


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_other_tensors(
    where: object, wanted: Mapping[str, Shape], found: Mapping[str, Shape], hint: str = ""
) -> None:
    """Raises RedHeartError, with the first few names, unless `found` has the tensors of the network, each in its shape."""
    for beginning, layout in OLD_TENSORS.items():
        if any(name.startswith(beginning) for name in found):
            refuse_layout(layout, where)
    lacks = wanted.keys() - found.keys()
    strange = found.keys() - wanted.keys()
    other = [n for n in wanted.keys() & found.keys() if wanted[n] != found[n]]
    faults = [
        *_names("lacks", lacks),
        *_names("has, unknown to this network,", strange),
        *_names("has in another shape", other, lambda n: f"{n} {list(found[n])} instead of {list(wanted[n])}"),
    ]
    if faults:
        raise RedHeartError(f"{where} {', and '.join(faults)}: export the checkpoint again{hint}")


def refuse_integers(directory: Path, network: Mapping[str, torch.Tensor]) -> None:
    """Raises RedHeartError where an export holds integers, such as quantised weights, for a float of the network: torch casts them."""
    remedy = "export the checkpoint again"
    for path in sorted(directory.glob("model*.safetensors")):
        file = open_safetensors(path, remedy)
        for name in file.keys():  # noqa: SIM118 (no mapping)
            kind = file.get_slice(name).get_dtype()
            if name in network and network[name].is_floating_point() and "F" not in kind:
                raise RedHeartError(f"{path} holds {name} as {kind}, and the network has floats there: {remedy}")


def refuse_not_finite(where: object, name: str, values: torch.Tensor) -> None:
    """Raises RedHeartError where a weight, or an answer, of a network is a NaN or an infinity."""
    if bad := int((~values.isfinite()).sum()):
        raise RedHeartError(
            f"{where}: {bad} of {values.numel()} values of {name} are not finite: its training went astray; choose an earlier checkpoint"
        )


def _names(what: str, names: Iterable[str], show: Any = str) -> list[str]:
    names = sorted(names)
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    word = "tensor" if len(names) == 1 else "tensors"
    return [f"{what} {len(names)} {word} ({', '.join(map(show, names[:3]))}{rest})"] if names else []


def open_safetensors(path: Path, remedy: str) -> Any:
    """A safetensors file, mapped; one that is missing or not whole is an error that names it and `remedy`."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise RedHeartError(f"{path} does not exist: {remedy}") from None
    except (OSError, SafetensorError) as error:
        raise RedHeartError(f"{path} is no whole safetensors file ({error}): {remedy}") from None


def read_tensor(path: Path, name: str, remedy: str) -> torch.Tensor:
    """One tensor of a safetensors file, mapped for itself: its pages are resident as long as it lives, not as long as the file is open."""
    return open_safetensors(path, remedy).get_tensor(name)
