"""Sections of a configuration about the frozen encoder and the run itself: the optimizer, the steps, what watches over them, what is kept,
what it may take.

config.py puts them together with those about the network and the data.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from redheart.schema import GOOD_LAYERS, MAX_POSITIONS, PACKAGED

Strategy = Literal[
    "plain", "gpu_8bit", "zero1", "zero2", "zero2_offload", "zero2_offload_8bit", "zero3", "zero3_offload_8bit"
]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Settings that belong together; each key says what it means (`redheart train --help-config`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BesideConfig(Section):
    """One more encoder, beside the first."""

    name: str = Field(description="as of data.encoder.name")
    layers: tuple[int, ...] = Field(min_length=1, description="its hidden layers concatenated")

    @model_validator(mode="before")
    @classmethod
    def _of_its_package(cls, value: Any) -> Any:
        return with_layers(value)


def with_layers(encoder: Any) -> Any:
    """A packaged encoder named without layers, with the layers that are best of it."""
    known = (
        PACKAGED.get(encoder["name"]) if isinstance(encoder, dict) and isinstance(encoder.get("name"), str) else None
    )
    return {"layers": known.layers, **encoder} if known else encoder


def as_section(encoder: Any) -> Any:
    """`data.encoder` as a list of encoders in the form of a section: the first, with the others `beside` it."""
    if isinstance(encoder, list) and encoder and isinstance(encoder[0], dict):
        return {**encoder[0], "beside": [*encoder[0].get("beside", ()), *encoder[1:]]}
    return encoder


class EncoderConfig(Section):
    """The frozen encoder whose token states are the network's input, or several of them: then also written as a list."""

    name: str = Field("package:minilm", description=f"{', '.join(PACKAGED)}, a directory, or a hub id")
    layers: tuple[int, ...] = Field(
        (4, 6),
        min_length=1,
        description=f"hidden layers concatenated, 0 is the embedding; of a package named without them the best by dev: {GOOD_LAYERS}",
    )
    max_tokens: int = Field(64, ge=4, le=MAX_POSITIONS, description="longer texts are cut here; prepare says how many")
    batch_size: int = Field(32, gt=0, description="texts the encoder reads at once")
    device: str = Field("auto", description="where it computes: `auto` (a GPU where there is one), cpu, cuda or cuda:1")
    languages: tuple[str, ...] | None = Field(
        None, description="languages it was made for; others are refused; null: those a package is known for, else en"
    )
    beside: tuple[BesideConfig, ...] = Field(
        (),
        description="encoders beside it, a list of {name, layers}; data.encoder may be the list of all: "
        "[{name: package:minilm, layers: [4, 6]}, {name: package:smollm2, layers: [20]}]",
    )

    @model_validator(mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return with_layers(as_section(value))

    @model_validator(mode="after")
    def _fits(self) -> EncoderConfig:
        if self.most_tokens > MAX_POSITIONS:
            raise ValueError(
                f"{len(self.each)} encoders of {self.max_tokens} tokens exceed the {MAX_POSITIONS} a text may have: lower max_tokens"
            )
        return self

    @property
    def each(self) -> tuple[EncoderConfig, ...]:
        """Every encoder as one of its own, in order."""
        alone = self.model_copy(update={"beside": ()})
        return (alone, *(alone.model_copy(update={"name": b.name, "layers": b.layers}) for b in self.beside))

    @property
    def reads(self) -> tuple[str, ...]:
        """The languages that all of them read; a text that names none is taken to be in the first."""
        if self.languages is not None:
            return self.languages
        first, *others = (PACKAGED[e.name].languages if e.name in PACKAGED else ("en",) for e in self.each)
        return tuple(language for language in first if all(language in other for other in others))

    @property
    def width(self) -> int | None:
        """Of the token features, where every encoder comes as a package; of others it is known when they are loaded."""
        if not all(one.name in PACKAGED for one in self.each):
            return None
        widths = [PACKAGED[one.name].width * len(one.layers) for one in self.each]
        return sum(widths) + (len(widths) if self.beside else 0)  # of several each has a column that marks its tokens

    @property
    def names(self) -> str:
        return " + ".join(encoder.name for encoder in self.each)

    @property
    def most_tokens(self) -> int:
        """Most tokens of a text: `max_tokens` of each encoder."""
        return self.max_tokens * (1 + len(self.beside))


class OptimizerConfig(Section):
    """AdamW, with warm-up and then a cosine to the final learning rate."""

    name: Literal["adamw", "adamw_8bit"] | None = Field(
        None,
        description="fp32 or 8-bit states; null: what memory.strategy says. What is asked for is what runs, or an error",
    )
    master: Literal["split", "fp32"] = Field(
        "split",
        description="weights that 8-bit Adam keeps on the host of a bf16 run: split (bfloat16 and a byte, gradients in "
        "bfloat16: 7 bytes a parameter with the states) or fp32 (12 bytes)",
    )
    learning_rate: float = Field(1e-4, gt=0, description="the highest one, reached at the end of the warm-up")
    final_learning_rate: float = Field(
        1e-6, ge=0, description="what the cosine falls to: the last step is one short of it"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decay of the first and of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.01, ge=0, description="none on biases and norms")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    max_grad_norm: float = Field(1.0, gt=0, description="a longer gradient is scaled down to this norm")


class TrainingConfig(Section):
    """How long, how much at once, and what is written down on the way."""

    seed: int = Field(0, ge=0, lt=2**63, description="of the weights, the order of samples, dropout and rounding")
    epochs: float | None = Field(None, gt=0, description="passes over the training split; null: 4, at least 100 steps")
    max_steps: int | None = Field(None, gt=0, description="optimizer steps of the run, whatever epochs says")
    global_batch_size: int = Field(gt=0, description="samples of one optimizer step over all ranks and micro-steps")
    micro_batch_size: int = Field(gt=0, description="most samples a rank runs at once")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="of matrix products and of the weights they read")
    # YAML 1.1 reads off as false
    compile: Annotated[Literal["off", "regional"], BeforeValidator(lambda x: "off" if x is False else x)] = Field(
        "off",
        description="regional: torch.compile for the layers of stacks, each shape when it first comes. On a CPU at most "
        "15 % (`local`) for a minute or two of compilation of each of some 15 shapes; on a GPU unmeasured: `bench gpu` times both",
    )
    log_every: int = Field(10, gt=0, description="steps between two lines of the log and of TensorBoard")
    evaluate_every: int = Field(100, ge=0, description="steps between two looks at the dev loss; 0: ten looks in all")
    evaluate_rows: int = Field(
        2048, gt=0, description="dev rows, evenly spread over the split, that are looked at during training"
    )
    patience: int | None = Field(
        None,
        gt=0,
        description="looks at dev in a row without a new best that end the run; null: none. Much of what is learned comes "
        "as the rate falls: a run that ends before has less, and the best checkpoint is kept either way",
    )
    synergy_every: int = Field(
        100, gt=0, description="steps between two looks at gradients' angles and regret's causes"
    )
    checkpoint_every: int = Field(100, gt=0, description="steps between two checkpoints")
    best_metric: str = Field(
        "loss",
        description="what the best checkpoint has least of on dev: `loss` (the weighted one), one output's, or `unexplained`: the share "
        "of labels' variance that final answers leave open (1 - R²), in which a few answers that are too sure weigh less than in `loss`",
    )
    log_samples: bool = Field(False, description="write every step's sample ids to samples-rankN.jsonl")
    max_bad_steps: int = Field(3, gt=0, description="non-finite steps in a row that end the run")
    collective_timeout_s: int = Field(
        600, gt=0, description="how long ranks wait in a step for one that does not answer, before the run ends"
    )


class GuardConfig(Section):
    """What becomes of a loss that leaps: z = (loss - median) / (1.4826 MAD) over the losses before it."""

    on_spike: Literal["warn", "rewind"] = Field(
        "warn",
        description="of a leaping loss: tell it, or go back to the checkpoint before it and leave its samples out",
    )
    window: int = Field(32, ge=8, description="steps whose losses say what is usual; no spike before there are so many")
    threshold: float = Field(20.0, gt=0, description="robust standard deviations above the median that make a spike")
    skip_steps: int = Field(
        4, gt=0, description="steps whose samples a rewind leaves out, the spike's the last of them"
    )
    max_rewinds: int = Field(3, gt=0, description="rewinds of a run; one more spike ends it")


class CheckpointConfig(Section):
    """When checkpoints are written beside training.checkpoint_every, how, and which of them stay."""

    minutes: float | None = Field(
        None, gt=0, description="minutes after which one is due, whatever the steps; null: none"
    )
    keep_last: int = Field(2, gt=0, description="newest checkpoints that stay")
    keep_best: int = Field(
        1, gt=0, description="checkpoints that are best on dev (training.best_metric) and stay beside them"
    )
    keep_every: int | None = Field(None, gt=0, description="those of steps that are multiples of it stay; null: none")
    background: bool = Field(
        False, description="training goes on while a copy of weights and states in host memory is written"
    )
    on_error: Literal["end", "go_on"] = Field(
        "end",
        description="of a save that failed (disk full, quota) but for the last: end the run, or tell it and go on",
    )


class MemoryConfig(Section):
    """What the run may take, and how weights, gradients and optimizer states are spread over GPU, host and ranks."""

    strategy: Strategy = Field(
        "zero2_offload", description="where states live: `redheart plan` compares all of them and names the fastest"
    )
    gpu_memory_gib: float = Field(8.0, gt=0, description="most memory taken on each GPU, the CUDA context included")
    host_memory_gib: float = Field(16.0, gt=0, description="most memory taken on the host by all processes of a node")
    swap: tuple[str, ...] = Field(
        (),
        description="modules that stay on the host and visit the device for their turn; training: strategy plain only",
    )
