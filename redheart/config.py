"""One frozen configuration per run: a preset (or a YAML file), then `--set a.b=c`; unknown keys are refused.

The resolved configuration is written into every run directory, so a run can be repeated from its own files.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from redheart import plain_yaml
from redheart.files import read_text, seal, unseal, write_text
from redheart.ranks import launch_file, launched_world_size
from redheart.schema import RedHeartError
from redheart.sections import (
    BesideConfig,
    CheckpointConfig,
    EncoderConfig,
    GuardConfig,
    MemoryConfig,
    OptimizerConfig,
    Section,
    TrainingConfig,
    as_section,
)

Factor = Annotated[float, Field(ge=0)]
S = TypeVar("S", bound=BaseModel)
SEALED = "restore it, or remove its last line if the change is yours"


class ModelConfig(Section):
    """Sizes of the network. Everything else is a fixed ratio of these, so that ×2 in width is ×4 in parameters."""

    encoder_width: int = Field(768, gt=0, description="E: width of the frozen encoder's token features")
    width: int = Field(gt=0, description="D: width of the backbone")
    heads: int = Field(gt=0, description="attention heads of the backbone; D / heads is one head's width")
    layers: int = Field(6, gt=0, description="encoder layers")
    task_width: int = Field(gt=0, description="K: width of a task's feature")
    task_heads: int = Field(gt=0, description="attention heads over K")
    num_experts: int = Field(8, gt=0, description="experts of the emotion head, as wide in sum; 1: a single network")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of channels dropped; none in encoder layers")
    activation_checkpointing: bool = Field(False, description="recompute the layers of all stacks in the backward pass")
    ablate: tuple[str, ...] = Field((), description="modules left out, for instance analyzers.surd: an ablation run")

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.width % self.heads or self.task_width % self.task_heads:
            raise ValueError("width must be divisible by heads, and task_width by task_heads")
        return self


class LabelerConfig(Section):
    """The causal LM that scores what no corpus labels, and the gates its answers must pass."""

    name: str = Field("package:smollm2", description="`package:smollm2`, a directory, or a hub id of a causal LM")
    quantization: Literal["nf4", "none"] = Field("nf4", description="4-bit weights through bitsandbytes, or none")
    weight: float = Field(0.3, gt=0, le=1, description="weight of an LLM or derived label beside a human one")
    max_texts: int | None = Field(None, ge=0, description="most texts the LLM reads, spread over the sources; 0: none")
    batch_size: int = Field(8, gt=0, description="texts the LLM reads at once")
    unpack: bool = Field(True, description="4-bit weights' values held in bf16: twice as fast, four times the memory")
    min_mass: float = Field(0.05, ge=0, lt=1, description="least mean probability of the answer words of a question")
    min_spread: float = Field(0.01, ge=0, lt=1, description="least deviation of the scores of a question")
    min_agreement: float = Field(0.55, ge=0, le=1, description="least agreement of it with people; 0.5: chance")


class RemoteConfig(Section):
    """Reading shards from a remote store."""

    attempts: int = Field(5, gt=0, description="tries of a read from a remote store, with growing pauses between")
    timeout_s: float = Field(30.0, gt=0, description="silence after which a transfer counts as stalled (http)")
    cache_gib: float = Field(20.0, gt=0, description="shards of remote stores kept on this machine")


class AugmentConfig(Section):
    """Texts that the labelling LLM writes beside those of the corpora, and the gates they must pass."""

    kind: Literal["paraphrase", "counterfactual"] | None = Field(
        None, description="what the labelling LLM writes about training texts; nothing where null"
    )
    max_texts: int | None = Field(None, gt=0, description="most texts it writes about, spread over the sources")
    min_similarity: float = Field(0.8, ge=-1, le=1, description="least cosine of the mean token states")
    max_shift: float = Field(0.05, gt=0, le=1, description="paraphrase: most mean movement of the LLM's own answers")
    min_gain: float = Field(0.05, ge=0, le=1, description="counterfactual: least gain of act and effect, to the LLM")


class _OrAList:
    """In the JSON Schema `data.encoder` may be a list."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        one, beside = handler(schema), handler(BesideConfig.__pydantic_core_schema__)
        return {"anyOf": [one, {"type": "array", "minItems": 1, "prefixItems": [one], "items": beside}]}


class DataConfig(Section):
    """What `redheart prepare` makes of raw records."""

    encoder: Annotated[EncoderConfig, _OrAList] = EncoderConfig()
    labeler: LabelerConfig = LabelerConfig()
    augment: AugmentConfig = AugmentConfig()
    remote: RemoteConfig = RemoteConfig()
    features_from: tuple[str, ...] = Field(
        (), description="prepared directories or URLs of the same encoder: texts that stand there are not encoded anew"
    )
    rows_per_shard: int = Field(2048, gt=0, description="most rows of a shard, the unit that is fetched and drawn")
    dedup: bool = Field(
        False, description="drop train rows that nearly repeat dev or test rows, and dev rows test rows"
    )
    dedup_threshold: float = Field(
        0.95,
        gt=0,
        le=1,
        description="cosine of mean token states from which texts repeat each other; for the default encoder",
    )
    columns: dict[str, dict[str, str]] = Field(
        {}, description="per source: {their column: our field}, or our field:LOW..HIGH where LOW and HIGH are its ends"
    )
    file: str | None = Field(
        None, description="your own table, prepared by `train` as source `own`; beneath what else is said: config.OWN"
    )
    mixture: dict[str, float] = Field(
        {},
        description="per source: below 1 the share of its training rows that stays, else how often an epoch shows each",
    )

    @model_validator(mode="after")
    def _weights(self) -> DataConfig:
        for name, weight in self.mixture.items():
            if not (0 < weight < 1 or (weight >= 1 and weight == int(weight))):
                raise ValueError(f"mixture.{name} = {weight:g} must lie between 0 and 1, or be a whole number")
        return self


class LossShares(Section):
    """How much the losses of each room weigh, after each is divided by its constant predictor's."""

    heads: float = Field(0.7, ge=0, description="what the heads say by themselves")
    analyzers: float = Field(0.3, ge=0, description="what the analyzers say by themselves")
    aux: float = Field(1.0, ge=0, description="the final answers, and the Kalman filter's")


THIRDS = (1 / 3, 2 / 3)  # of regret's range: the levels of a network that has seen no data


class LossConfig(Section):
    """How the answers' losses are computed and combined."""

    weights: dict[str, Factor] = Field(default_factory=dict, description="factor per output, 1.0 where not named")
    shares: LossShares = LossShares()
    focal_gamma: float = Field(2.0, ge=0, description="focus of the emotion loss on what is answered badly; 0: none")
    huber_delta: float = Field(0.25, gt=0, description="error of regret beyond which its loss grows linearly")
    extreme_penalty: float = Field(0.1, ge=0, description="of Bentham values pushed beyond 0.02 or 0.98")
    balance: float = Field(0.001, ge=0, description="load balance of a sample's gate")
    router_z: float = Field(0.001, ge=0, description="squared log-partition of the gate's logits")
    regret_edges: tuple[float, ...] = Field(
        THIRDS, max_length=2, description="between regret's levels; train writes here what the data's index says"
    )
    constant_floor: float = Field(0.01, gt=0, description="least constant-predictor loss a loss is divided by")


def _for_files(schema: dict[str, Any]) -> None:
    del schema["required"]
    schema["properties"]["extends"] = {"type": "string", "description": "a preset that says what this file does not"}


class RunConfig(Section):
    """A complete run. `redheart train` writes the resolved one to `config.yaml` in the run directory."""

    # a file that leaves out `preset` takes its own name, and one that `extends` a preset takes the rest from it
    model_config = ConfigDict(json_schema_extra=_for_files)

    preset: str = Field(description="a name for these settings; a file that gives none is called as the file is")
    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    memory: MemoryConfig = MemoryConfig()

    @property
    def optimizer_name(self) -> Literal["adamw", "adamw_8bit"]:
        """`optimizer.name`, or what `memory.strategy` says where that is null."""
        implied: Literal["adamw", "adamw_8bit"] = "adamw_8bit" if self.memory.strategy.endswith("8bit") else "adamw"
        return self.optimizer.name or implied

    @property
    def has_split_master(self) -> bool:
        """Whether the host keeps master weights as bfloat16 and a byte: 8-bit Adam on the host of a bf16 run."""
        on_host = self.optimizer_name == "adamw_8bit" and "offload" in self.memory.strategy
        return on_host and self.training.precision == "bf16" and self.optimizer.master == "split"

    @model_validator(mode="after")
    def _one_optimizer(self) -> RunConfig:
        if self.memory.strategy.endswith("8bit") and self.optimizer.name == "adamw":
            raise ValueError(
                f"optimizer.name = adamw contradicts memory.strategy = {self.memory.strategy}: leave one of them out"
            )
        return self


def leaves(config: Section) -> dict[str, Any]:
    """Every leaf key of a configuration by its dotted path, as plain values."""
    values = config.model_dump()
    return {key: functools.reduce(dict.__getitem__, key.split("."), values) for key in config_keys(type(config))}


def config_keys(section: type[BaseModel] = RunConfig, path: str = "") -> dict[str, FieldInfo]:
    """Every leaf key of a section by its dotted path: default, bounds and description."""
    keys: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys |= config_keys(kind, f"{path}{name}.")
        else:
            keys[f"{path}{name}"] = field
    return keys


def preset_names() -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in resources.files("redheart").joinpath("presets").iterdir())


# of a run on a table of one's own, beneath what a file or --set says: its labels are the task
OWN: dict[str, Any] = {"data": {"labeler": {"max_texts": 0}}, "training": {"evaluate_every": 0}}
OWN_UNDER = {"memory": {"strategy": "plain"}}  # beneath the preset: one process on one's own machine needs no DeepSpeed
OWN_KEYS = frozenset({"data.labeler.max_texts", "training.evaluate_every", "memory.strategy"})  # of the two


def load_config(preset: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a preset's name or of a YAML file (one that says `extends: PRESET` holds what differs from that preset),
    with `a.b=c` overrides, whose values are read as YAML."""
    shipped, said = {}, {}
    if preset.endswith((".yaml", ".yml")):
        plain_yaml.check_size(path := Path(preset))
        text = read_text(path, f"give a YAML file, or one of {', '.join(preset_names())}")
        said = _yaml(unseal(text, path, SEALED), preset)
        if "extends" in said:
            shipped = _shipped(said.pop("extends"), "")
    else:
        shipped = _shipped(preset, ", or give a .yaml file")
    said.setdefault("preset", Path(preset).stem)
    values = _resolved([shipped, said], overrides)
    if isinstance(data := values.get("data"), dict) and data.get("file"):
        under = OWN_UNDER if launched_world_size() == 1 and launch_file() is None else {}
        values = _resolved([under, shipped, OWN, said], overrides)
    return _as_wide_as_its_encoder(parse_config(values))


def _as_wide_as_its_encoder(config: RunConfig) -> RunConfig:
    """With the width of the encoder's features where that is known and model.encoder_width was not given. It stays one that nobody
    stated, which data may change."""
    if "encoder_width" in config.model.model_fields_set or config.data.encoder.width is None:
        return config
    model = config.model.model_copy(update={"encoder_width": config.data.encoder.width})
    model.model_fields_set.discard("encoder_width")
    return config.model_copy(update={"model": model})


def _resolved(layers: Sequence[dict[str, Any]], overrides: Sequence[str]) -> dict[str, Any]:
    values = functools.reduce(_over, (_in_sections(moved(layer)) for layer in copy.deepcopy(layers)))
    for override in overrides:
        _apply(values, override)
        _in_sections(values)
    return values


def _in_sections(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, so that `data.encoder.KEY` can be set and laid over where it was written as a list."""
    if isinstance(data := values.get("data"), dict) and "encoder" in data:
        data["encoder"] = as_section(data["encoder"])
    return values


def _shipped(preset: Any, otherwise: str) -> dict[str, Any]:
    """The values of a preset of the package."""
    if preset not in preset_names():
        close = difflib.get_close_matches(str(preset), preset_names(), 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise RedHeartError(f"unknown preset {preset!r}{hint}: choose one of {', '.join(preset_names())}{otherwise}")
    text = resources.files("redheart").joinpath("presets", f"{preset}.yaml").read_text(encoding="utf-8")
    return _yaml(text, str(preset))


def _over(under: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` laid over `under`, section by section."""
    both = {k: _over(under[k], v) for k, v in values.items() if isinstance(v, dict) and isinstance(under.get(k), dict)}
    return {**under, **values, **both}


def parse_config(values: Any) -> RunConfig:
    """RunConfig from plain values; every wrong key or value is named with its dotted path."""
    return parse_section(RunConfig, moved(copy.deepcopy(values)) if isinstance(values, dict) else values)


def read_config(path: Path, remedy: str) -> RunConfig:
    """The complete configuration that `redheart train` left in a YAML file; one that was changed since is an error."""
    return parse_config(_yaml(unseal(read_text(path, remedy, "YAML"), path, remedy), str(path)))


def parse_section(section: type[S], values: Any) -> S:
    """One section from plain values, as `parse_config`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise RedHeartError("; ".join(_explain(e) for e in error.errors())) from None


def _yaml(text: str, name: str) -> dict[str, Any]:
    try:
        values = plain_yaml.parse(text)
    except yaml.YAMLError as error:
        raise RedHeartError(f"configuration {name} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RedHeartError(f"configuration {name} must be a mapping of sections")
    return values


def write_config(path: Path, config: RunConfig) -> None:
    """The resolved configuration of a run, sealed: `load_config` and `read_config` notice a change."""
    write_text(path, seal(dump_config(config)))


def dump_config(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RedHeartError(f"--set {override!r}: write it as section.key=value, for instance training.epochs=3")
    *sections, key = MOVED.get(path, path).split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RedHeartError(f"--set {override!r}: {section} is a value, not a section")
    try:
        values[key] = plain_yaml.parse(text)
    except yaml.YAMLError:
        raise RedHeartError(f"--set {override!r}: {text!r} is not a YAML value") from None
    if isinstance(values[key], str):  # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            values[key] = float(text)


# keys that have another name or place by now, and are read under the old one too
MOVED = {"training.keep_checkpoints": "checkpoint.keep_last"}


def moved(values: dict[str, Any]) -> dict[str, Any]:
    """What was written for an earlier version, under the names of now: of one file, before another is laid over it."""
    for old, new in MOVED.items():
        (section, key), (other, name) = old.split("."), new.split(".")
        found, place = values.get(section), values.get(other, {})
        if isinstance(found, dict) and isinstance(place, dict) and key in found:
            if name in place:
                raise RedHeartError(f"{old} is called {new} now, and both are given: leave {old} out")
            values[other] = {**place, name: found.pop(key)}
    return values


ELSEWHERE = {"lr": "learning_rate", "wd": "weight_decay", "batch_size": "global_batch_size", "steps": "max_steps"}


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        names, last = {name for key in config_keys() for name in key.split(".")}, str(error["loc"][-1])
        close = [ELSEWHERE[last]] if last in ELSEWHERE else difflib.get_close_matches(last, sorted(names), 1)
        return f"unknown config key {path}" + (f" (did you mean {close[0]}?)" if close else "")
    if error["type"] == "missing":
        return f"config key {path} is missing"
    if not path:  # of keys that do not go together: the input is all of them
        return str(error["msg"]).removeprefix("Value error, ")
    return f"config key {path} = {error['input']!r}: {error['msg']}"
