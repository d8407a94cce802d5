"""Configuration of PFMEL (Li et al., Electronics 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class PfmelConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PfmelModel`] or [`PfmelForPreTraining`]. The defaults describe the paper's network, with BERT
    base and ResNet-50. The pre-training tasks and the form of the texts are options of the processor.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of an encoder like BERT, with two segments and, unless `text_pooling="mean"`, a pooler over
            the first token.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of any image encoder. Without it the model reads text only, which is NSP-BERT in the paper's
            tables. Without both configurations, the model is the paper's.
        text_pooling (`str`, *optional*, defaults to `"pooler"`):
            The state of a sequence that the next-sentence head reads: `"pooler"` (BERT's pooled first token, as in the
            paper) or `"mean"` (the mean state of all words and images), for an encoder whose pooler was never trained.
        list_weight (`int` or `float`, *optional*):
            With a weight, the score of a pair is that of the next-sentence head plus this weight times the score of the list
            that the model reranks, times a learned scale that starts at 1. The head then starts at zero, so that training
            starts from the order of the list. Rows need a `list_score`. `None`, as in the paper: not read.
        name_weight (`int` or `float`, *optional*):
            As `list_weight`, for a bit that says whether a name or alias of the entity has all words of the mention.
        image_weight (`int` or `float`, *optional*):
            With a weight, the score of a pair also has this weight times the cosine of the two images, less a learned midpoint,
            times a learned scale that starts at 1. The features are projected linearly first, and the projection starts as the
            identity, so images are compared by what the encoder knows from the first step. A pair without both images has 0
            here. As with `list_weight`, the head then starts at zero. `None`, as in the paper: not compared.
        pooled_sides (`bool`, *optional*, defaults to `False`):
            Whether a further linear layer reads how the two sentences compare: product and absolute difference of the means
            of their states, of which each has mean 0 and variance 1. It starts at zero.
        list_loss_weight (`int` or `float`, *optional*, defaults to 0):
            Weight of a further loss, the cross entropy of the gold among all candidates of its mention. 0, as in the paper,
            leaves it out.
        train_vision (`bool`, *optional*, defaults to `False`):
            Whether to train the image encoder. By default it is frozen, as in the paper, so each image is encoded
            once.
        nil_threshold (`int` or `float`, *optional*):
            Score below which the best candidate of a mention is rejected, so that the mention is NIL. `None` never
            predicts NIL.
    """

    model_type: ClassVar[str] = "pfmel"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    text_pooling: str = "pooler"
    list_weight: int | float | None = None
    name_weight: int | float | None = None
    image_weight: int | float | None = None
    pooled_sides: bool = False
    list_loss_weight: int | float = 0
    train_vision: bool = False
    nil_threshold: int | float | None = None

    def __post_init__(self, **kwargs):
        if self.text_config is None and self.vision_config is None:
            self.text_config, self.vision_config = {}, {}
        super().__post_init__(**kwargs)
        if self.text_config is None:
            raise ValueError("text_config is missing, but PFMEL reads text. Give the configuration of a text encoder.")
        segments = getattr(self.text_config, "type_vocab_size", 0)
        if segments < 2:
            raise ValueError(
                f"The text encoder {self.text_config.model_type!r} has {segments} segments, but next sentence "
                "prediction needs two. Use an encoder like BERT."
            )
        if self.text_pooling not in ("pooler", "mean"):
            raise ValueError(f"text_pooling={self.text_pooling!r} is not one of 'pooler', 'mean'.")
        for field in ("list_weight", "name_weight", "image_weight", "list_loss_weight"):
            if (getattr(self, field) or 0) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        if self.image_weight is not None and self.vision_config is None:
            raise ValueError(f"image_weight={self.image_weight} needs an image encoder. Give a vision_config.")
        if self.train_vision and self.vision_config is None:
            raise ValueError("train_vision=True needs an image encoder. Give a vision_config.")


__all__ = ["PfmelConfig"]
