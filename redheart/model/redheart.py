"""The assembled network: token features of a text (and of its contrast) -> the answers of every task.

`RedHeartModel` is a Transformers `PreTrainedModel`: `save_pretrained` / `from_pretrained`, `AutoModel` and
`gradient_checkpointing_enable()` work as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from redheart.config import ModelConfig, parse_section
from redheart.model.analyzers import BenthamCalculator, EmotionAnalyzer, RegretAnalyzer, SurdAnalyzer, masked_mean
from redheart.model.backbone import Backbone
from redheart.model.dynamics import DspSimulator, KalmanFusion, posterior_sd
from redheart.model.fusion import UTILITY, Readings, Utility, plain_mean
from redheart.model.heads.bentham import BenthamHead
from redheart.model.heads.emotion import EmotionHead
from redheart.model.heads.regret import RegretHead
from redheart.model.heads.surd import SurdHead
from redheart.model.layers import full_precision, number_dropout_sites
from redheart.model.loading import draw_missing, load_whole, unpackable_layers
from redheart.model.padding import checked_mask, real_tokens_first, stacked
from redheart.model.select import MODULES, ExecutionMode, Selection, select
from redheart.schema import EMOTIONS

LAYERS = {"analyzers.emotion": 5, "analyzers.bentham": 4, "analyzers.regret": 5, "aux.utility": 3}


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


@dataclass
class RedHeartOutput(ModelOutput):
    """Final answers (logits where the name says so), the readings they were fused from, and latents; schema's shapes.

    A field is None where every module that could give it is left out. Answers are fp32 (fp64 in an fp64 network).
    """

    emotion_logits: torch.Tensor | None = None  # [B, 7]
    emotion_fine_logits: torch.Tensor | None = None  # [B, 28]
    vad_raw: torch.Tensor | None = None  # [B, 3]; tanh gives valence, arousal, dominance
    culture_logits: torch.Tensor | None = None  # [B, 3]
    bentham_logits: torch.Tensor | None = None  # [B, 7]
    utility: torch.Tensor | None = None  # [B, 1], unbounded
    utility_difference: torch.Tensor | None = None  # [B, 1], text minus contrast; 0 where there is no contrast
    acceptability_logits: torch.Tensor | None = None  # [B, 1]
    ethics_logits: torch.Tensor | None = None  # [B, 4]
    regret_logits: torch.Tensor | None = None  # [B, 1]
    regret_views: torch.Tensor | None = None  # [B, 3] in [0, 1), ascending
    counterfactual_logits: torch.Tensor | None = None  # [B, 1]
    surd_logits: torch.Tensor | None = (
        None  # [B, 4]: softmax of the first three gives the shares, sigmoid of the last the leak
    )
    emotion_covariance: torch.Tensor | None = None  # [B, 7, 7] of the Kalman filter's emotion logits, latent
    trajectory: torch.Tensor | None = None  # [B, T, 7] logits of each emotion at each token, latent
    signals: torch.Tensor | None = None  # [B, T, 7] of the DSP simulator, latent
    density_logits: torch.Tensor | None = None  # [B, 8, 3] regret's level given each subset of sources
    expert_gate_logits: torch.Tensor | None = None  # [B, experts], latent
    theory_gate_logits: torch.Tensor | None = None  # [B, 4], latent
    task_features: torch.Tensor | None = None  # [B, 4, K], the backbone's, latent
    hidden_states: tuple[torch.Tensor, ...] | None = (
        None  # [B, T, D] each: what enters the backbone's layers, and each one's output
    )
    readings: Readings | None = None  # label -> module -> that module's own answer [B, size]


class RedHeartModel(PreTrainedModel):
    """features [B, T, E], attention_mask [B, T] -> RedHeartOutput.

    The mask is bool or of integers, true or not 0 where a token is real; padding may stand on either side, and where there is no
    mask every token is real. contrast_features [C, T', E] (with a mask likewise) and contrast_rows [C] give the alternatives of
    some rows; `sample_keys` [B] (int64 positions in the run) are needed in training mode with dropout; `without` names modules to
    do without, for this call. `output_hidden_states` and `return_dict` are Transformers'; attention maps are never formed.
    """

    config_class = RedHeartConfig
    base_model_prefix = "redheart"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    config: RedHeartConfig
    # what has a residual connection stays on one device
    _no_split_modules = {"EncoderLayer", "QueryLayer", "TaskPooling", "Residual", "BranchAttention"}  # noqa: RUF012

    def __init__(self, config: RedHeartConfig, place: Callable[[str, nn.Module], None] = lambda name, module: None):
        """`place` is called with every module, its name first, as soon as it is built: ZeRO-3 takes its partition and frees the rest."""
        super().__init__(config)
        c = config
        d, h, k, kh, p = c.width, c.heads, c.task_width, c.task_heads, c.dropout
        self.built = select(ExecutionMode.EVALUATION, c.ablate).built
        states = {"heads": k, "analyzers": d, "aux": 2 * len(EMOTIONS)}
        widths = {m: states[m.split(".")[0]] for m in self.built if m not in ("backbone", "aux.utility")}
        builders = {
            "heads.emotion": lambda: EmotionHead(k, kh, c.num_experts, p),
            "heads.bentham": lambda: BenthamHead(k, kh, p),
            "heads.regret": lambda: RegretHead(k, kh, p),
            "heads.surd": lambda: SurdHead(k, kh, p),
            "analyzers.emotion": lambda: EmotionAnalyzer(d, h, LAYERS["analyzers.emotion"], p),
            "analyzers.bentham": lambda: BenthamCalculator(d, h, LAYERS["analyzers.bentham"], p),
            "analyzers.regret": lambda: RegretAnalyzer(d, h, LAYERS["analyzers.regret"], p),
            "analyzers.surd": lambda: SurdAnalyzer(d, p),
            "aux.dsp": lambda: DspSimulator(d, k, p),
            "aux.kalman": lambda: KalmanFusion(d, k, p),
            "aux.utility": lambda: Utility(k, kh, LAYERS["aux.utility"], widths, p),
        }
        self.backbone = Backbone(c.encoder_width, d, h, c.layers, k, kh, p)
        place("backbone", self.backbone)
        for room in ("heads", "analyzers", "aux"):
            setattr(self, room, nn.ModuleDict())
            for name in (m for m in self.built if m.startswith(room + ".")):
                module = builders[name]()
                place(name, module)
                getattr(self, room)[name.split(".")[1]] = module
        self.idle: frozenset[str] = frozenset()  # modules that set_mode has put aside
        number_dropout_sites(self)
        self._assembled = False
        self.post_init()  # asks _init_weights, which has nothing to do: all is drawn
        self._assembled = True

    def set_mode(self, mode: ExecutionMode, wanted: Collection[str] = MODULES) -> Selection:
        """Applies model/select.py: which modules get gradients, and in INFERENCE which are left idle for the `wanted` readings."""
        selection = select(mode, self.config.ablate, wanted)
        self.train(mode is ExecutionMode.TRAINING)
        for name in self.built:
            self.get_submodule(name).requires_grad_(name in selection.trained)
        self.idle = frozenset(self.built) - frozenset(selection.resident)
        return selection

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As of Transformers, but files that are not what the export's manifest says, and tensors that are missing, unexpected
        or of another shape, raise RedHeartError: see model/loading.py. In 4 bits, layers that cannot be packed stay as they are.
        """
        quantisation: Any = kwargs.get("quantization_config")
        if getattr(quantisation, "load_in_4bit", False) and quantisation.llm_int8_skip_modules is None:
            config = kwargs.get("config") or cls.config_class.from_pretrained(pretrained_model_name_or_path)
            with torch.device("meta"):
                quantisation.llm_int8_skip_modules = unpackable_layers(cls(config))
        return load_whole(super().from_pretrained, pretrained_model_name_or_path, model_args, kwargs)

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
        wanted = {
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
            "return_dict": return_dict,
        }
        wanted = {name: getattr(self.config, name) if value is None else value for name, value in wanted.items()}
        if wanted["output_attentions"]:
            raise ValueError(
                "output_attentions: attention maps are never formed here (scaled_dot_product_attention is fused)"
            )
        mask = checked_mask("features", features, attention_mask, self.config.encoder_width)
        (num_texts, num_tokens), keys = mask.shape, sample_keys
        if (contrast_features is None) != (contrast_rows is None):
            raise ValueError("contrast_features and contrast_rows belong together: which row each contrast is of")
        if contrast_features is not None and contrast_rows is not None:
            # one pass for texts and contrasts: ranks with and without a pair then call the same modules in the same order
            theirs = checked_mask("contrast_features", contrast_features, contrast_mask, self.config.encoder_width)
            features, mask = stacked(features, contrast_features), stacked(mask, theirs)
            keys = None if keys is None else torch.cat([keys, keys[contrast_rows] + (1 << 31)])
        features, mask, places = real_tokens_first(features, mask)
        states: list[torch.Tensor] | None = [] if wanted["output_hidden_states"] else None
        tokens, tasks = self.backbone(features, mask, keys, states)
        outputs = self.answer(tokens, tasks, mask, contrast_rows, keys, without)
        places = places[:num_texts, :num_tokens, None]
        for name in ("trajectory", "signals"):
            if outputs.get(name) is not None:
                outputs[name] = outputs[name].take_along_dim(places, 1)
        if states is not None:
            moved = not torch.equal(places, torch.arange(num_tokens, device=places.device)[:, None].expand_as(places))
            # where nothing was moved these are the very tensors of the graph, which users ask for gradients
            outputs["hidden_states"] = tuple(x[:num_texts].take_along_dim(places, 1) if moved else x for x in states)
        return outputs if wanted["return_dict"] else outputs.to_tuple()

    def answer(
        self,
        tokens: torch.Tensor,
        tasks: torch.Tensor,
        mask: torch.Tensor,
        contrast_rows: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        without: Collection[str] = (),
    ) -> RedHeartOutput:
        """All that follows the backbone: tokens [B + C, T, D], tasks [B + C, 4, K]; the last C rows are the contrasts of
        `contrast_rows` [C]."""
        num_texts = len(mask) - (0 if contrast_rows is None else len(contrast_rows))
        ask = _Asker(self, without, keys, num_texts)
        bentham = ask.with_contrasts("heads.bentham", tasks[:, 1])
        calculus = ask.with_contrasts("analyzers.bentham", tokens, mask)
        tokens, tasks, mask = tokens[:num_texts], tasks[:num_texts], mask[:num_texts]
        own = tasks.unbind(1)
        emotion, regret = ask("heads.emotion", own[0]), ask("heads.regret", own[2])
        states = tuple(own[3] * 0 if r is None else r.state for r in (emotion, bentham, regret))
        ask("heads.surd", own[3], states)
        feelings = ask("analyzers.emotion", tokens, mask)
        ask("analyzers.regret", tokens, mask)
        sources = (_of(feelings, "state"), _of(calculus, "state"), masked_mean(tokens, mask))
        causes = ask("analyzers.surd", sources)
        trajectory = _of(feelings, "trajectory")
        signals = ask("aux.dsp", tokens, mask, own[0], trajectory)
        fused = ask("aux.kalman", tokens, mask, own[0], (_of(emotion, "emotion_logits"), trajectory, signals))
        ask.states |= (
            {} if signals is None else {"aux.dsp": torch.cat([_last(signals, mask), signals.abs().amax(1)], -1)}
        )
        ask.states |= {} if fused is None else {"aux.kalman": torch.cat([fused[0], posterior_sd(fused[1])], -1)}
        readings = ask.readings()
        readings["preference"] = ask.gaps(readings["utility"], contrast_rows)
        utility_modules = ask.module("aux.utility")
        if utility_modules is None:
            silent = (
                0.0 * torch.stack([s.float().sum() for s in ask.states.values()]).sum()
            )  # keeps every state in the graph
            final = {label: answer + silent for label, answer in plain_mean(readings).items()}
        else:
            final = utility_modules(ask.states, tasks, readings, ask.keys)
        return RedHeartOutput(
            **{field: final.get(label) for label, field in ANSWERS.items()},  # type: ignore[arg-type]
            utility=final.get("utility"),
            utility_difference=final.get("preference"),
            regret_views=_of(regret, "regret_views"),
            emotion_covariance=_of(fused, "covariance"),
            trajectory=trajectory,
            signals=signals,
            density_logits=_of(causes, "density_logits"),
            expert_gate_logits=_of(emotion, "gate_logits"),
            theory_gate_logits=_of(bentham, "gate_logits"),
            task_features=tasks,
            readings=readings,
        )


ANSWERS = {  # label -> field of RedHeartOutput with its fused raw answer
    "emotion": "emotion_logits",
    "emotion_fine": "emotion_fine_logits",
    "vad": "vad_raw",
    "culture": "culture_logits",
    "bentham": "bentham_logits",
    "acceptability": "acceptability_logits",
    "ethics": "ethics_logits",
    "regret": "regret_logits",
    "counterfactual": "counterfactual_logits",
    "surd": "surd_logits",
}
FIELDS: dict[str, dict[str, str]] = {  # module -> label -> field of its reading
    "heads.emotion": {"emotion": "emotion_logits", "culture": "culture_logits"},
    "heads.bentham": {
        "bentham": "bentham_logits",
        "utility": "utility",
        "acceptability": "acceptability_logits",
        "ethics": "ethics_logits",
    },
    "heads.regret": {"regret": "regret_logits"},
    "heads.surd": {"surd": "surd_logits"},
    "analyzers.emotion": {"emotion": "emotion_logits", "emotion_fine": "fine_logits", "vad": "vad_raw"},
    "analyzers.bentham": {
        "bentham": "bentham_logits",
        "utility": "utility",
        "acceptability": "acceptability_logits",
    },
    "analyzers.regret": {"regret": "regret_logits", "counterfactual": "counterfactual_logits"},
    "analyzers.surd": {"surd": "surd_logits"},
    "aux.kalman": {"emotion": "emotion_logits"},
}
assert all("utility" in FIELDS[module] for module in UTILITY)


class _Asker:
    """Asks the modules of one forward pass, skips those that are not there, and keeps what they said.

    `keys` [B + C], of which the first `num_texts` are the texts'; afterwards `keys` are those alone.
    """

    def __init__(self, model: RedHeartModel, without: Collection[str], keys: torch.Tensor | None, num_texts: int):
        self._model, self._without, self._all_keys, self._num_texts = model, without, keys, num_texts
        self.keys = None if keys is None else keys[:num_texts]
        self._said: dict[str, Any] = {}
        self._of_contrasts: dict[str, Any] = {}
        self.states: dict[str, torch.Tensor] = {}

    def module(self, name: str) -> Any:
        """The module, or None."""
        present = name in self._model.built and name not in self._without and name not in self._model.idle
        room, _, key = name.partition(".")
        return getattr(self._model, room)[key] if present else None

    def __call__(self, name: str, *inputs: Any) -> Any:
        """What a module says of the texts, or None."""
        module = self.module(name)
        return None if module is None else self._note(name, module(*inputs, self.keys))

    def with_contrasts(self, name: str, *inputs: Any) -> Any:
        """The same for a module that reads the contrasts too, which stand behind the texts in `inputs`."""
        module = self.module(name)
        if module is None:
            return None
        said = module(*inputs, self._all_keys)
        self._of_contrasts[name] = type(said)(*(x[self._num_texts :] for x in said))
        return self._note(name, type(said)(*(x[: self._num_texts] for x in said)))

    def _note(self, name: str, said: Any) -> Any:
        self._said[name] = said
        if name not in ("aux.dsp", "aux.kalman"):
            self.states[name] = said.state
        return said

    def gaps(self, mine: dict[str, torch.Tensor], rows: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Text minus contrast by module, [B, 1] each; 0 where there is no contrast (0·u keeps the graph alike on all ranks)."""
        gaps = {module: 0.0 * u for module, u in mine.items()}
        if rows is not None:
            for module, said in self._of_contrasts.items():
                theirs = getattr(said, FIELDS[module]["utility"])
                gap = full_precision(mine[module][rows]) - full_precision(theirs)
                gaps[module] = full_precision(gaps[module]).index_copy(0, rows, gap)
        return gaps

    def readings(self) -> dict[str, dict[str, torch.Tensor]]:
        """label -> module -> reading; an empty mapping for a utility that nobody reads."""
        found: dict[str, dict[str, torch.Tensor]] = {"utility": {}}
        for module, said in self._said.items():
            for label, field in FIELDS.get(module, {}).items():
                found.setdefault(label, {})[module] = getattr(said, field)
        return found


def _of(reading: Any, field: str) -> Any:
    return None if reading is None else getattr(reading, field)


def _last(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last real token of [B, T, n]; padding stands behind."""
    last = mask.sum(1).sub(1).clamp(min=0)
    return x[torch.arange(len(x), device=x.device), last]


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
