"""Configuration of GHMFC (Wang et al., SIGIR 2022) and of HieCoATT-Alter (Lu et al., NeurIPS 2016)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

#: Levels of the text, from fine to coarse.
LEVELS = ("word", "phrase", "sentence")


class GhmfcConfig(PreTrainedConfig):
    r"""
    Configuration of a [`GhmfcModel`]. The defaults are the published GHMFC with the image encoder ResNet-50 in place of
    ResNet-200.

    Rows of the papers' tables: GHMFC-onlytext has no `vision_config`; HieCoATT-Alter is `attention="alternating"`,
    `fusion="recursive"`, `levels=["word", "phrase", "sentence"]`.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of a text encoder like BERT.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of an image encoder: a CNN, whose last map gives the cells, or a model like ViT, whose states do.
            `None` makes a model without images. Without both configurations, the model is the published one.
        levels (`list[str]`, *optional*, defaults to `["word", "phrase"]`):
            Levels of the text that are fused with the image, out of `"word"`, `"phrase"` and `"sentence"`.
        attention (`str`, *optional*, defaults to `"transformer"`):
            `"transformer"` is GHMFC's: per level, a stack in which image cells attend to the text, and one in which the
            text attends to its result. `"alternating"` is HieCoATT's: text, cells and text again are summed up in turn,
            each guided by the sum before.
        fusion (`str`, *optional*, defaults to `"gated"`):
            `"gated"` is GHMFC's, `"recursive"` is HieCoATT's.
        num_layers, num_heads, hidden_size, intermediate_size (`int`, *optional*, defaults to 2, 8, 512 and 2048):
            Sizes of the stacks. `hidden_size` is the width of both modalities.
        lstm_layers (`int`, *optional*, defaults to 2):
            Number of layers of the LSTM of the level `"sentence"`.
        output_size (`int`, *optional*):
            Width of the vectors of mentions and entities. Default: that of the text encoder.
        dropout (`int` or `float`, *optional*, defaults to 0.4):
            Dropout outside the encoders.
        residual (`str`, *optional*, defaults to `"state"`):
            What the cross-attention of a layer is added to: the self-attended `"state"`, or the layer's `"input"` as in the
            published code.
        entity_network (`str`, *optional*, defaults to `"text_encoder"`):
            `"text_encoder"` is the published one: an entity's vector is the pooled output of a text encoder of its own.
            With `"shared"`, entities run through the network of the mentions, text and image.
        entity_pooling (`str`, *optional*, defaults to `"cls"`):
            Pooling of the entities' text encoder: `"cls"` as published, or `"mean"` over the tokens.
        train_entity_text (`bool`, *optional*, defaults to `False`):
            Whether to train the entities' text encoder.
        freeze_vision (`bool`, *optional*, defaults to `True`):
            Whether to freeze the image encoder. The published network reads fixed image features.
        margin (`int` or `float`, *optional*, defaults to 0.5):
            Margin of the ranking loss.
        negatives (`str`, *optional*, defaults to `"mean"`):
            Whether the ranking loss of a mention is the `"mean"` over the other entities of the batch, or that of the
            `"hardest"`.
        contrastive_weight (`int` or `float`, *optional*, defaults to 1):
            Weight of the contrastive loss between text and image of a mention. A model without images has none.
        contrastive_temperature (`int` or `float`, *optional*, defaults to 0.6):
            Temperature of the contrastive loss.
        contrastive_includes_positive (`bool`, *optional*, defaults to `True`):
            Whether the denominator of the contrastive loss has the positive pair. The published code leaves it out.
        nil_threshold (`int` or `float`, *optional*):
            A mention whose best score is below it is predicted NIL. Set by calibration on a validation split with NIL
            mentions. Default: never NIL.
        link_calibration (`dict`, *optional*):
            Risk–coverage curve of the links on a validation split. Set after training.
    """

    model_type: ClassVar[str] = "ghmfc"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    levels: list[str] | None = None
    attention: str = "transformer"
    fusion: str = "gated"
    num_layers: int = 2
    num_heads: int = 8
    hidden_size: int = 512
    intermediate_size: int = 2048
    lstm_layers: int = 2
    output_size: int | None = None
    dropout: int | float = 0.4
    residual: str = "state"
    entity_network: str = "text_encoder"
    entity_pooling: str = "cls"
    train_entity_text: bool = False
    freeze_vision: bool = True
    margin: int | float = 0.5
    negatives: str = "mean"
    contrastive_weight: int | float = 1
    contrastive_temperature: int | float = 0.6
    contrastive_includes_positive: bool = True
    nil_threshold: int | float | None = None
    link_calibration: dict | None = None

    def __post_init__(self, **kwargs):
        if self.text_config is None and self.vision_config is None:
            self.text_config, self.vision_config = {}, {}
        super().__post_init__(**kwargs)
        if self.levels is None:
            self.levels = ["word", "phrase"]
        self._check()

    def _check(self) -> None:
        if self.text_config is None:
            raise ValueError("text_config is missing, but GHMFC reads text. Give the configuration of a text encoder.")
        for field, allowed in (
            ("attention", ("transformer", "alternating")),
            ("fusion", ("gated", "recursive")),
            ("residual", ("state", "input")),
            ("entity_network", ("text_encoder", "shared")),
            ("entity_pooling", ("cls", "mean")),
            ("negatives", ("mean", "hardest")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(repr, allowed))}.")
        levels = self.levels or []
        if not levels or levels != [level for level in LEVELS if level in levels]:
            raise ValueError(
                f"levels={levels!r} must be one or more of {', '.join(map(repr, LEVELS))}, in this order, without repetition."
            )
        for field in ("num_layers", "num_heads", "hidden_size", "intermediate_size", "lstm_layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        if self.attention == "transformer" and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}.")
        width: int = self.text_config.hidden_size  # type: ignore[union-attr]
        if self.output_size is None:
            self.output_size = width
        if self.entity_network == "text_encoder" and self.output_size != width:
            raise ValueError(
                f"output_size={self.output_size} differs from the width {width} of the text encoder, whose output is the "
                "vector of an entity. Leave output_size out, or set entity_network='shared'."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.contrastive_temperature <= 0:
            raise ValueError(f"contrastive_temperature={self.contrastive_temperature} must be positive.")
        for field in ("margin", "contrastive_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")


__all__ = ["GhmfcConfig"]
