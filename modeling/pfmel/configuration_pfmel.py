"""Configuration of PFMEL (Li et al., Electronics 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class PfmelConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PfmelModel`] or [`PfmelForPreTraining`]. The defaults describe the paper's network: BERT base
    and ResNet-50. Which pre-training tasks there are, and how texts are formed, are options of the processor.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            A BERT-like encoder: with a pooler over the first token and two kinds of segments.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Any image encoder. Without it the model reads text only, which is NSP-BERT in the paper's tables. With neither
            config given, both are the paper's.
        train_vision (`bool`, *optional*, defaults to `False`):
            Whether the image encoder learns too. The paper takes its features as they are, so each image is encoded once.
        nil_threshold (`int` or `float`, *optional*):
            A mention whose best score is below it is NIL. `None`: never NIL.
    """

    model_type: ClassVar[str] = "pfmel"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    train_vision: bool = False
    nil_threshold: int | float | None = None

    def __post_init__(self, **kwargs):
        if self.text_config is None and self.vision_config is None:
            self.text_config, self.vision_config = {}, {}
        super().__post_init__(**kwargs)
        if self.text_config is None:
            raise ValueError("PFMEL reads text; give text_config beside vision_config.")
        segments = getattr(self.text_config, "type_vocab_size", 0)
        if segments < 2:
            raise ValueError(
                f"text_config: {self.text_config.model_type!r} has {segments} kinds of segments; next sentence prediction "
                "needs two. Take a BERT-like encoder."
            )
        if self.train_vision and self.vision_config is None:
            raise ValueError("train_vision=True needs a vision_config.")


__all__ = ["PfmelConfig"]
