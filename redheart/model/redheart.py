"""The assembled network: token features of a text (and of its contrast) -> the answers of every task.

`RedHeartModel` is a Transformers `PreTrainedModel`: `save_pretrained` / `from_pretrained` work as usual.
Built so far: backbone and the four heads. The analyzers and the auxiliary modules of the design are not built yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from redheart.model.backbone import Backbone
from redheart.model.heads.bentham import BenthamHead
from redheart.model.heads.emotion import EmotionHead
from redheart.model.heads.regret import RegretHead
from redheart.model.heads.surd import SurdHead
from redheart.model.layers import full_precision, number_dropout_sites

MODULES = ("backbone", "heads.emotion", "heads.bentham", "heads.regret", "heads.surd")
NOT_BUILT = (
    *("analyzers.emotion", "analyzers.bentham", "analyzers.regret", "analyzers.surd"),
    *("aux.dsp", "aux.kalman", "aux.utility"),
)


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
        encoder: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.encoder_width, self.width, self.heads, self.layers = encoder_width, width, heads, layers
        self.task_width, self.task_heads, self.num_experts = task_width, task_heads, num_experts
        self.dropout = dropout
        self.encoder = encoder


@dataclass
class RedHeartOutput(ModelOutput):
    """Answers (logits where the name says so) and latents of one batch; shapes as in schema's legend."""

    emotion_logits: torch.Tensor | None = None  # [B, 7]
    culture_logits: torch.Tensor | None = None  # [B, 3]
    bentham_logits: torch.Tensor | None = None  # [B, 7]
    utility: torch.Tensor | None = None  # [B, 1], unbounded
    utility_difference: torch.Tensor | None = None  # [B, 1], text minus contrast; 0 where there is no contrast
    acceptability_logits: torch.Tensor | None = None  # [B, 1]
    ethics_logits: torch.Tensor | None = None  # [B, 4]
    regret_logits: torch.Tensor | None = None  # [B, 1]
    regret_views: torch.Tensor | None = None  # [B, 3] in [0, 1), ascending
    surd: torch.Tensor | None = None  # [B, 4]: three shares that sum to one, and the leak
    expert_gate_logits: torch.Tensor | None = None  # [B, experts], latent
    theory_gate_logits: torch.Tensor | None = None  # [B, 4], latent


class RedHeartModel(PreTrainedModel):
    """features [B, T, E], attention_mask [B, T] (bool) -> RedHeartOutput.

    contrast_features [C, T', E] with contrast_rows [C] give the alternatives of some rows; `sample_keys` [B] (int64
    positions in the run) are needed in training mode with dropout.
    """

    config_class = RedHeartConfig
    base_model_prefix = "redheart"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: RedHeartConfig):
        super().__init__(config)
        c = config
        self.backbone = Backbone(c.encoder_width, c.width, c.heads, c.layers, c.task_width, c.task_heads, c.dropout)
        self.heads = nn.ModuleDict(
            {
                "emotion": EmotionHead(c.task_width, c.task_heads, c.num_experts, c.dropout),
                "bentham": BenthamHead(c.task_width, c.task_heads, c.dropout),
                "regret": RegretHead(c.task_width, c.task_heads, c.dropout),
                "surd": SurdHead(c.task_width, c.task_heads, c.dropout),
            }
        )
        number_dropout_sites(self)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every layer initialises itself where it is built; nothing is drawn a second time."""

    def forward(
        self,
        features: torch.Tensor,
        attention_mask: torch.Tensor,
        contrast_features: torch.Tensor | None = None,
        contrast_mask: torch.Tensor | None = None,
        contrast_rows: torch.Tensor | None = None,
        sample_keys: torch.Tensor | None = None,
    ) -> RedHeartOutput:
        _, tasks = self.backbone(features, attention_mask, sample_keys)
        emotion = self.heads["emotion"](tasks[:, 0], sample_keys)
        bentham = self.heads["bentham"](tasks[:, 1], sample_keys)
        regret = self.heads["regret"](tasks[:, 2], sample_keys)
        surd = self.heads["surd"](tasks[:, 3], (emotion.state, bentham.state, regret.state), sample_keys)
        difference = torch.zeros_like(bentham.utility)
        if contrast_features is not None and contrast_rows is not None and len(contrast_rows):
            keys = None if sample_keys is None else sample_keys[contrast_rows] + (1 << 31)
            _, contrast_tasks = self.backbone(contrast_features, contrast_mask, keys)
            contrast = self.heads["bentham"](contrast_tasks[:, 1], keys)
            gap = bentham.utility[contrast_rows] - contrast.utility
            difference = difference.index_copy(0, contrast_rows, gap.to(difference.dtype))
        return RedHeartOutput(
            emotion_logits=emotion.emotion_logits,
            culture_logits=emotion.culture_logits,
            bentham_logits=bentham.bentham_logits,
            utility=bentham.utility,
            utility_difference=difference + 0.0 * bentham.utility,  # keeps the graph alike on ranks without a pair
            acceptability_logits=bentham.acceptability_logits,
            ethics_logits=bentham.ethics_logits,
            regret_logits=regret.regret_logits,
            regret_views=regret.regret_views,
            surd=torch.cat(
                [full_precision(surd.share_logits).softmax(-1), full_precision(surd.leak_logits).sigmoid()], -1
            ),
            expert_gate_logits=emotion.gate_logits,
            theory_gate_logits=bentham.gate_logits,
        )


def parameter_counts(model: RedHeartModel) -> dict[str, int]:
    """Parameters of every module, keyed as in DESIGN §4; their sum is all there is."""
    counts = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in MODULES}
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    return counts


def module_of(parameter_name: str) -> str:
    """The module (one of MODULES) that owns a parameter."""
    return next(m for m in MODULES if parameter_name.startswith(m + "."))
