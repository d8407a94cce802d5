"""Configuration of IMN (Zhang et al., Findings of EMNLP 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

#: Modalities of §3.3: m_t, m_v, m_o of a mention and e_t, e_v, e_o of an entity.
MODALITIES = ("text", "image", "joint")


class ImnConfig(PreTrainedConfig):
    r"""
    Configuration of an [`ImnModel`] or [`ImnForKnowledgePreTraining`]. Without any encoder, the encoders are the paper's:
    BERT base and DETR with a ResNet-50. The paper gives no widths and no numbers of layers, so those defaults are ours.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            A BERT-like encoder, the feature extractor of text.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            The feature extractor of images: DETR, of which the output of the decoder is used, or any image encoder whose
            output is a sequence or a feature map. Default: no images.
        joint_config (`PreTrainedConfig` or `dict`, *optional*):
            The Transformer of §3.2 over text tokens, mention embedding and patch tokens. Default: `text_config`.
        mention_modalities, entity_modalities (`list[str]`, *optional*):
            The modalities of a side, out of `"text"`, `"image"`, `"joint"` (the rows of Table 3). Default: all if
            `vision_config` is given, otherwise text alone.
        spaces (`list[int]`, *optional*):
            The auxiliary spaces (1, 2, 3) whose loss is part of eq. 14 (the rows of Table 4). Default: all. The fused
            space is computed from all three in any case.
        co_attention (`bool`, *optional*, defaults to `True`):
            Whether the fused space is made by co-attention (§3.4.2). Without it, u is the mean of the auxiliary spaces of
            its side, an ablation that is not in the paper.
        num_prototypes (`int`, *optional*, defaults to 10):
            k, the maximal number of prototypes of an entity in one modality (§3.3).
        prototype_selection (`str`, *optional*, defaults to `"pagerank"`):
            How prototypes are chosen: by `"pagerank"`, or at `"random"` (Figure 4).
        entity_prototype (`bool`, *optional*, defaults to `False`):
            Whether the first prototype is always the entity itself (name, description, attributes, first image). Not in
            the paper, whose entities are accounts.
        encoder_init (`str`, *optional*, defaults to `"default"`):
            Initialisation of the encoding networks. `"default"` is random. With `"aligned"`, both networks start as the
            same map of single tokens, the Transformer as a LayerNorm of each token, and co-attention nearly uniform, so
            that the auxiliary spaces start as projections of the extractors' features. ReLU cuts half of each projection
            off. With `"paired"`, the first convolution starts as x → [Wx; −Wx] and eq. 3, 5 and 8 as differences of
            these pairs, one block of outputs for each modality, so nothing is cut off. Pooling starts as the mean, and
            the third space, where the maximum replaces the mean, starts with a tenth of the weight. It needs even
            `hidden_dim` and `conv_dim`. Neither is in the paper. Both need the same modalities on both sides.
        hidden_dim (`int`, *optional*, defaults to 256):
            Width of the outputs of the Dilated CNN and the Transformer (eq. 1, 4).
        aux_dim (`int`, *optional*, defaults to 128):
            d, the width of the auxiliary spaces (eq. 3, 5, 8). Scoring takes 18 d multiplications per pair.
        dilations (`list[int]`, *optional*):
            Dilation rates of the Dilated CNN, one layer each. Default: 1, 2, 4.
        num_layers, num_heads (`int`, *optional*, defaults to 1 and 4):
            Layers and attention heads of the Transformer of eq. 4.
        conv_dim (`int`, *optional*, defaults to 128):
            Channels of each of the four Conv1D blocks (eq. 6).
        dropout (`int` or `float`, *optional*, defaults to 0.2):
            Dropout rate (§4.2), before the linear maps of eq. 3, 5 and 8 and in the Transformer.
        margin (`int` or `float`, *optional*, defaults to 0.2):
            γ of eq. 13.
        loss_weights (`list[float]`, *optional*):
            τ_1, τ_2, τ_3, τ_4 of eq. 14. Default: 0.5, 0.5, 0.5, 1.
        patch_mask_probability (`int` or `float`, *optional*, defaults to 0.15):
            Share of the patches that pre-training masks.
        nil_threshold (`int` or `float`, *optional*):
            A mention whose best score is below it is predicted NIL. Default: never NIL.
        link_calibration (`dict`, *optional*):
            Risk–coverage curve of the links on a validation split ([`hf_mel.inference.selective.RiskCoverage`]), from which
            the linker takes the threshold of a stated precision. Set after training.
    """

    model_type: ClassVar[str] = "imn"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="detr", optional=True),
        "joint_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    joint_config: PreTrainedConfig | dict | None = None
    mention_modalities: list[str] | None = None
    entity_modalities: list[str] | None = None
    spaces: list[int] | None = None
    co_attention: bool = True
    num_prototypes: int = 10
    prototype_selection: str = "pagerank"
    entity_prototype: bool = False
    encoder_init: str = "default"
    hidden_dim: int = 256
    aux_dim: int = 128
    dilations: list[int] | None = None
    num_layers: int = 1
    num_heads: int = 4
    conv_dim: int = 128
    dropout: int | float = 0.2
    margin: int | float = 0.2
    loss_weights: list[int | float] | None = None
    patch_mask_probability: int | float = 0.15
    nil_threshold: int | float | None = None
    link_calibration: dict | None = None

    def __post_init__(self, **kwargs):
        if self.text_config is None and self.vision_config is None and self.joint_config is None:
            self.text_config = {}
            if not self._all_modalities() or "image" in self._all_modalities():
                self.vision_config = {}
        default = list(MODALITIES) if self.vision_config is not None else ["text"]
        if self.mention_modalities is None:
            self.mention_modalities = list(default)
        if self.entity_modalities is None:
            self.entity_modalities = list(default)
        if self.joint_config is None and "joint" in self._all_modalities() and self.text_config is not None:
            text = self.text_config
            self.joint_config = dict(text) if isinstance(text, dict) else text.to_dict()
        super().__post_init__(**kwargs)
        if self.spaces is None:
            self.spaces = [1, 2, 3]
        if self.dilations is None:
            self.dilations = [1, 2, 4]
        if self.loss_weights is None:
            self.loss_weights = [0.5, 0.5, 0.5, 1.0]
        self._check()

    def _all_modalities(self) -> list[str]:
        return [*(self.mention_modalities or ()), *(self.entity_modalities or ())]

    @property
    def modalities(self) -> list[str]:
        """Modalities of either side, in the order of `MODALITIES`."""
        return [modality for modality in MODALITIES if modality in self._all_modalities()]

    def _check(self) -> None:
        for field in ("mention_modalities", "entity_modalities"):
            values = getattr(self, field)
            if not values or set(values) - set(MODALITIES) or len(set(values)) != len(values):
                raise ValueError(
                    f"{field}={values!r} must be one or more of {', '.join(map(repr, MODALITIES))}, without repetition."
                )
        needs = {"text": "text_config", "image": "vision_config", "joint": "joint_config"}
        for modality in self.modalities:
            if getattr(self, needs[modality]) is None:
                raise ValueError(
                    f"The modality {modality!r} needs {needs[modality]}. Set it, or leave the modality out of "
                    "mention_modalities and entity_modalities."
                )
        if self.encoder_init not in ("default", "aligned", "paired"):
            raise ValueError(f"encoder_init={self.encoder_init!r} is not one of 'default', 'aligned', 'paired'.")
        if self.encoder_init != "default" and self.mention_modalities != self.entity_modalities:
            raise ValueError(
                f"encoder_init={self.encoder_init!r} needs mention_modalities={self.mention_modalities!r} and "
                f"entity_modalities={self.entity_modalities!r} to be the same."
            )
        if self.encoder_init == "paired" and (self.hidden_dim % 2 or self.conv_dim % 2):
            raise ValueError(
                f"encoder_init='paired' needs hidden_dim={self.hidden_dim} and conv_dim={self.conv_dim} to be even."
            )
        if set(self.spaces or ()) - {1, 2, 3}:
            raise ValueError(f"spaces={self.spaces!r} may contain only 1, 2 and 3.")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations={self.dilations!r} must be one or more numbers of at least 1.")
        if len(self.loss_weights or ()) != 4:
            raise ValueError(f"loss_weights={self.loss_weights!r} must be four numbers: τ_1, τ_2, τ_3, τ_4.")
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim={self.hidden_dim} must be a multiple of num_heads={self.num_heads}.")
        if self.prototype_selection not in ("pagerank", "random"):
            raise ValueError(f"prototype_selection={self.prototype_selection!r} is not one of 'pagerank', 'random'.")
        if self.num_prototypes < 1:
            raise ValueError(f"num_prototypes={self.num_prototypes} must be at least 1.")
        for field in ("dropout", "patch_mask_probability"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and below 1.")


__all__ = ["ImnConfig"]
