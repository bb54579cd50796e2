"""The assembled network: token features of a text (and of its contrast) -> the answers of every task.

`RedHeartModel` is a Transformers `PreTrainedModel`: `save_pretrained` / `from_pretrained`, `AutoModel` and
`gradient_checkpointing_enable()` work as usual.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from redheart.config import ModelConfig, parse_section
from redheart.model.backbone import Backbone
from redheart.model.dropout import DropoutMasks
from redheart.model.fusion import Readings, Utility, plain_mean
from redheart.model.layers import Masks, attention_bias, full_precision, mean_of_tokens
from redheart.model.loading import draw_missing, is_run_or_checkpoint, load_whole, refuse_packing
from redheart.model.outputs import ANSWER_FIELDS, RedHeartOutput
from redheart.model.padding import check_rows, checked_mask, real_tokens_first, rows_of, stacked
from redheart.model.parts import BACKBONE, FUSION, FUSION_LAYERS, MODULES, PARTS, sizes_of, sources, units, utilities
from redheart.model.readout import with_readout
from redheart.model.select import ExecutionMode, Selection, select
from redheart.model.stacks import Recomputed
from redheart.schema import TASKS4, RedHeartError

__all__ = ["RedHeartConfig", "RedHeartModel", "RedHeartOutput", "module_of", "parameter_counts"]


class RedHeartConfig(PretrainedConfig):
    """Sizes of the network (the fields of config.ModelConfig) and the fingerprint of the encoder it was trained on."""

    model_type = "redheart"

    def __init__(
        self,
        encoder_width: int = 768,
        width: int = 96,
        heads: int = 3,
        layers: int = 6,
        task_width: int = 64,
        task_heads: int = 2,
        num_experts: int = 8,
        dropout: float = 0.1,
        ablate: Sequence[str] = (),
        encoder: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        sizes = {
            "encoder_width": encoder_width, "width": width, "heads": heads, "layers": layers, "task_width": task_width,
            "task_heads": task_heads, "num_experts": num_experts, "dropout": dropout, "ablate": tuple(ablate),
        }  # fmt: skip
        checked = parse_section(ModelConfig, sizes)
        for name in sizes:
            setattr(self, name, getattr(checked, name))
        self.ablate, self.encoder = list(checked.ablate), encoder


class RedHeartModel(PreTrainedModel):
    """features [B, T, E], attention_mask [B, T] -> RedHeartOutput.

    The mask is bool or of integers, true or not 0 where a token is real; padding may stand on either side, and where there is no
    mask every token is real. contrast_features [C, T', E] (with a mask likewise) and contrast_rows [C] (int64, no row twice) give
    the alternatives of some rows; `sample_keys` [B] (int64 positions in the run) are needed in training mode with dropout;
    `without` names modules to do without, for this call. `output_hidden_states` and `return_dict` are Transformers'; attention
    maps are never formed.
    """

    config_class = RedHeartConfig
    base_model_prefix = "redheart"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    config: RedHeartConfig
    # given by train/export.py, which knows what a run is
    read_run: ClassVar[Callable[[Path], Any] | None] = None
    # what has a residual connection, or owns what others read, stays on one device
    _no_split_modules = {"EncoderStack", "QueryStack", "TaskPooling", "Residual", "BranchAttention"}  # noqa: RUF012

    def __init__(self, config: RedHeartConfig, place: Callable[[str, nn.Module], None] = lambda name, module: None):
        """`place` is called with every module, its name first, as soon as it is built: ZeRO-3 takes its partition and frees the rest."""
        super().__init__(config)
        sizes = sizes_of(config)
        self.built = select(ExecutionMode.EVALUATION, config.ablate).built
        self.parts = [part for part in PARTS if part.name in self.built]
        width, heads, task_width, task_heads, _, dropout = sizes
        self.backbone = Backbone(config.encoder_width, width, heads, config.layers, task_width, task_heads, dropout)
        place(BACKBONE, self.backbone)
        for room in dict.fromkeys(name.split(".")[0] for name in MODULES if name != BACKBONE):
            setattr(self, room, nn.ModuleDict())
        for part in self.parts:
            self._add(part.name, with_readout(part, part.build(sizes), part.state(sizes)), place)
        if FUSION in self.built:
            states = {part.name: part.state(sizes) for part in self.parts}
            fused, mixed = sources(self.built), utilities(self.built)
            self._add(
                FUSION, Utility(task_width, task_heads, FUSION_LAYERS, states, fused, mixed, units(), dropout), place
            )
        self.idle: frozenset[str] = frozenset()  # modules that set_mode has put aside
        self.dropout_masks = DropoutMasks(self)
        self._assembled = False
        self.post_init()  # asks _init_weights, which has nothing to do: all is drawn
        self._assembled = True

    def _add(self, name: str, module: nn.Module, place: Callable[[str, nn.Module], None]) -> None:
        place(name, module)
        room, _, key = name.partition(".")
        getattr(self, room)[key] = module

    def set_mode(self, mode: ExecutionMode, wanted: Collection[str] = MODULES) -> Selection:
        """Applies model/select.py: which modules get gradients, and in INFERENCE which are left idle for the `wanted` readings."""
        selection = select(mode, self.config.ablate, wanted)
        self.train(mode is ExecutionMode.TRAINING)
        for name in self.built:
            self.get_submodule(name).requires_grad_(name in selection.trained)
        self.idle = frozenset(self.built) - frozenset(selection.resident)
        return selection

    def checkpoint_activations(self, wanted: bool) -> None:
        """Whether the backward pass recomputes the layers of all stacks."""
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.gradient_checkpointing = wanted

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As of Transformers, but files that are not what the export's manifest says, and tensors that are missing, unexpected
        or of another shape, raise RedHeartError: see model/loading.py. So do weights that bitsandbytes is to pack.

        A checkpoint or a run directory (its best checkpoint) is read too, with no option but `dtype`.
        """
        refuse_packing(kwargs)
        path = pretrained_model_name_or_path
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
        if path is not None and is_run_or_checkpoint(Path(path), kwargs.get("subfolder")):
            return cls._from_run(Path(path), kwargs)
        return load_whole(super().from_pretrained, path, model_args, kwargs)

    @classmethod
    def _from_run(cls, path: Path, options: dict[str, Any]) -> RedHeartModel:
        dtype = options.pop("dtype", None)
        if options or cls.read_run is None:
            reason = f"a run takes no {', '.join(options)}" if options else "only `redheart.RedHeartModel` reads runs"
            raise RedHeartError(
                f"{path} is no export, and {reason}: `redheart export --checkpoint {shlex.quote(str(path))} --out DIR` first"
            )
        model = cls.read_run(path)
        return model if dtype is None else model.to(dtype)

    def _init_weights(self, module: nn.Module) -> None:
        """Layers draw themselves where they are built; Transformers asks again for those whose tensors were missing."""
        if self._assembled:
            draw_missing(self, module, lambda: type(self)(self.config))

    def forward(
        self,
        features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        contrast_features: torch.Tensor | None = None,
        contrast_mask: torch.Tensor | None = None,
        contrast_rows: torch.Tensor | None = None,
        sample_keys: torch.Tensor | None = None,
        without: Collection[str] = (),
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> RedHeartOutput | tuple[Any, ...]:
        options = {
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
            "return_dict": return_dict,
        }
        options = {name: getattr(self.config, name) if value is None else value for name, value in options.items()}
        if options["output_attentions"]:
            raise ValueError(
                "output_attentions: attention maps are never formed here (scaled_dot_product_attention is fused)"
            )
        mask = checked_mask("features", features, attention_mask, self.config.encoder_width)
        if not mask.numel():
            raise ValueError(f"features must hold a text and a token of it: got {list(features.shape)}")
        (num_texts, num_tokens), keys = mask.shape, sample_keys
        if (contrast_features is None) != (contrast_rows is None):
            raise ValueError("contrast_features and contrast_rows belong together: which row each contrast is of")
        if contrast_features is not None and contrast_rows is not None:
            # one pass for texts and contrasts: ranks with and without a pair then call the same modules in the same order
            of_contrasts = checked_mask(
                "contrast_features", contrast_features, contrast_mask, self.config.encoder_width
            )
            check_rows(contrast_rows, len(of_contrasts))
            features, mask = stacked(features, contrast_features), stacked(mask, of_contrasts)
            keys = None if keys is None else torch.cat([keys, keys[contrast_rows] + (1 << 31)])
        features, mask, places = real_tokens_first(features, mask)
        states: list[torch.Tensor] | None = [] if options["output_hidden_states"] else None
        masks = self.dropout_masks.draw(keys, features.dtype) if self.training else None
        tokens, tasks = self.backbone(features, attention_bias(mask, features.dtype), masks, states)
        outputs = self.answer(tokens, tasks, mask, contrast_rows, masks, without)
        places = places[:num_texts, :num_tokens]
        for name in ("trajectory", "signals"):
            if outputs.get(name) is not None:
                outputs[name] = rows_of(outputs[name], places)
        if states is not None:
            moved = not torch.equal(places, torch.arange(num_tokens, device=places.device).expand_as(places))
            # where nothing was moved these are the very tensors of the graph, which users ask for gradients
            outputs["hidden_states"] = tuple(rows_of(x[:num_texts], places) if moved else x for x in states)
        return outputs if options["return_dict"] else outputs.to_tuple()

    def answer(
        self,
        tokens: torch.Tensor,
        tasks: torch.Tensor,
        mask: torch.Tensor,
        contrast_rows: torch.Tensor | None = None,
        masks: Masks = None,
        without: Collection[str] = (),
    ) -> RedHeartOutput:
        """All that follows the backbone: tokens [B + C, T, D], tasks [B + C, 4, K]; the last C rows are the contrasts of
        `contrast_rows` [C]; dropout masks [B + C, columns]. Every part in its turn reads features by name, and adds its own."""
        num_texts = len(mask) - (0 if contrast_rows is None else len(contrast_rows))
        of_all = {"tokens": tokens, "tasks": tasks, "mask": mask, "bias": attention_bias(mask, tokens.dtype)}
        of_texts: dict[str, Any] = {name: x[:num_texts] for name, x in of_all.items()}
        for features in (of_all, of_texts):
            features |= {f"task.{name}": x for name, x in zip(TASKS4, features["tasks"].unbind(1), strict=True)}
        of_texts["pooled"] = mean_of_tokens(of_texts["tokens"], of_texts["bias"])
        text_masks = None if masks is None else masks[:num_texts]
        answers: dict[str, Any] = {"task_features": of_texts["tasks"]}
        states: dict[str, Any] = {}
        readings: dict[str, dict[str, Any]] = {"utility": {}, "preference": {}}
        utilities: dict[str, torch.Tensor] = {}  # of contrasts too
        for part in self.parts:
            if (module := self._present(part.name, without)) is None:
                continue
            features, own_masks = (of_all, masks) if part.contrasts else (of_texts, text_masks)
            of_module = module(*(features.get(name) for name in part.reads), own_masks)._asdict()
            reading = of_module
            if part.contrasts:
                reading = {name: None if x is None else x[:num_texts] for name, x in of_module.items()}
            of_texts |= {f"{part.name}.{name}": x for name, x in reading.items()}
            states[part.name] = reading["state"]
            answers |= {output: reading[latent] for latent, output in part.latents.items()}
            for answer in part.answers:
                raw = reading[answer.read or answer.label]
                if answer.pair:
                    readings["utility"][part.name] = raw
                    utilities[part.name] = of_module[answer.read]
                elif answer.fused:
                    readings.setdefault(answer.label, {})[part.name] = raw
                else:
                    answers[answer.output_name] = raw
        if utilities:
            gaps = _gaps(torch.cat([*utilities.values()], 1), num_texts, contrast_rows)
            readings["preference"] = dict(zip(utilities, gaps.split(1, 1), strict=True))
        fields = ANSWER_FIELDS | {"utility": "utility"}
        final = self._fused(states, of_texts["tasks"], readings, text_masks, without)
        return RedHeartOutput(**answers, **{fields[label]: raw for label, raw in final.items()}, readings=readings)

    def _fused(
        self,
        states: dict[str, torch.Tensor],
        tasks: torch.Tensor,
        readings: Readings,
        masks: Masks,
        without: Collection[str],
    ) -> dict[str, torch.Tensor]:
        """The final raw answers by label, and the utility."""
        if (fusion := self._present(FUSION, without)) is not None:
            return fusion(states, tasks, readings, masks)
        if not states:
            return plain_mean(readings)
        silent = 0.0 * torch.stack([s.float().sum() for s in states.values()]).sum()  # keeps every state in the graph
        return {label: answer + silent for label, answer in plain_mean(readings).items()}

    def _present(self, name: str, without: Collection[str]) -> Any:
        """The module, or None where it is not built, left out of this call, or put aside."""
        if name not in self.built or name in without or name in self.idle:
            return None
        room, _, key = name.partition(".")
        return getattr(self, room)[key]


def _gaps(utilities: torch.Tensor, num_texts: int, rows: torch.Tensor | None) -> torch.Tensor:
    """Utilities [B + C, n] -> text minus contrast, [B, n]; 0 where there is no contrast (and all in the graph, alike on all ranks)."""
    of_texts, of_contrasts = full_precision(utilities).split([num_texts, len(utilities) - num_texts])
    if rows is None:
        return 0.0 * of_texts
    return torch.zeros_like(of_texts).index_copy(0, rows, of_texts.index_select(0, rows) - of_contrasts)


def parameter_counts(model: RedHeartModel) -> dict[str, int]:
    """Parameters of every module that is built, keyed as in DESIGN §4; their sum is all there is."""
    counts = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in model.built}
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    return counts


def module_of(parameter_name: str) -> str:
    """The module (one of MODULES) that owns a parameter."""
    return next(m for m in MODULES if parameter_name.startswith(m + "."))


AutoConfig.register("redheart", RedHeartConfig)
AutoModel.register(RedHeartConfig, RedHeartModel)
