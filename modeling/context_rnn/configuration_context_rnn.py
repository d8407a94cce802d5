"""Configuration of ARNN (Eshel et al., CoNLL 2017), of IMN's "BERT", and of Att (Zhang et al., DASFAA 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class ContextRnnConfig(PreTrainedConfig):
    r"""
    Configuration of a [`ContextRnnModel`]. The defaults are ARNN.

    Rows of the papers' tables: IMN's "BERT" is `encoder="text"`, `rnn=None`; Att is `encoder="text"`, `train_text=False`,
    `rnn="lstm"`, `mention_in_states=True`, `head="cosine"`, `images="filtered"`, `loss="triplet"`.

    Args:
        encoder (`str`, *optional*, defaults to `"words"`):
            `"words"` reads a table of word vectors, `"text"` a text encoder like BERT.
        vocab_size, word_dim (`int`, *optional*, defaults to 30522 and 300):
            Size of the table. Not with `encoder="text"`.
        train_words (`bool`, *optional*, defaults to `True`):
            Whether to train the table.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the text encoder.
        train_text (`bool`, *optional*, defaults to `True`):
            Whether to train the text encoder.
        text_pooling (`str`, *optional*, defaults to `"cls"`):
            Pooling of the text of an entity, and of a mention's text for the image filter: `"cls"`, or `"mean"` over the
            tokens.
        rnn (`str`, *optional*, defaults to `"gru"`):
            What reads the states of either context: `"gru"`, `"lstm"`, or `None` for the states as they are.
        hidden_size (`int`, *optional*, defaults to 300):
            Width of the RNNs, and of the hidden layer of the head `"mlp"`.
        context_attention (`bool`, *optional*, defaults to `True`):
            Whether the candidate attends to the states of the contexts. Otherwise a context is the last state of its RNN, or
            without an RNN the mean of its states.
        use_mention (`bool`, *optional*, defaults to `False`):
            Whether the head also reads the mean state of the mention.
        mention_in_states (`bool`, *optional*, defaults to `False`):
            Whether the mean state of the mention is joined to every state of the contexts, as in Att.
        head (`str`, *optional*, defaults to `"mlp"`):
            `"mlp"` scores entity and contexts by a hidden layer and two classes, `"cosine"` by the cosine of linear maps of
            both.
        output_size (`int`, *optional*, defaults to 768):
            Width of these linear maps.
        dropout (`int` or `float`, *optional*, defaults to 0.5):
            Dropout before the last layer of the head.
        images (`str`, *optional*, defaults to `"none"`):
            `"none"` reads no images. `"filtered"` reads those of a mention and its candidates if the mention's passes Att's
            filter; needs a text encoder and a `vision_config`.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of an image encoder: a CNN or a model like ViT.
        freeze_vision (`bool`, *optional*, defaults to `True`):
            Whether to freeze the image encoder. Each image is then encoded only once.
        text_image_threshold (`int` or `float`, *optional*, defaults to 0.3):
            Least cosine of a mention's text and its mapped image. -1 lets every image pass.
        candidate_image_threshold (`int` or `float`, *optional*, defaults to 0.3):
            Least cosine of a mention's image and that of its most similar candidate.
        loss (`str`, *optional*, defaults to `"binary"`):
            `"binary"` is the cross-entropy of right and wrong for every candidate, with the head `"mlp"`; `"triplet"` has a
            `margin`.
        margin (`int` or `float`, *optional*, defaults to 0.25):
            Margin of `"triplet"`.
    """

    model_type: ClassVar[str] = "context_rnn"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet", optional=True),
    }

    encoder: str = "words"
    vocab_size: int = 30522
    word_dim: int = 300
    train_words: bool = True
    text_config: PreTrainedConfig | dict | None = None
    train_text: bool = True
    text_pooling: str = "cls"
    rnn: str | None = "gru"
    hidden_size: int = 300
    context_attention: bool = True
    use_mention: bool = False
    mention_in_states: bool = False
    head: str = "mlp"
    output_size: int = 768
    dropout: int | float = 0.5
    images: str = "none"
    vision_config: PreTrainedConfig | dict | None = None
    freeze_vision: bool = True
    text_image_threshold: int | float = 0.3
    candidate_image_threshold: int | float = 0.3
    loss: str = "binary"
    margin: int | float = 0.25

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for field, allowed in (
            ("encoder", ("words", "text")),
            ("text_pooling", ("cls", "mean")),
            ("rnn", ("gru", "lstm", None)),
            ("head", ("mlp", "cosine")),
            ("images", ("none", "filtered")),
            ("loss", ("binary", "triplet")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(repr, allowed))}.")
        if (self.encoder == "text") != (self.text_config is not None):
            raise ValueError("encoder='text' needs a text_config, and encoder='words' has none.")
        if self.images == "filtered" and (self.vision_config is None or self.encoder != "text"):
            raise ValueError("images='filtered' needs a vision_config and encoder='text'.")
        if self.images == "none" and self.vision_config is not None:
            raise ValueError("vision_config is given, but images='none' reads no images. Set images='filtered'.")
        if self.loss == "binary" and self.head != "mlp":
            raise ValueError("loss='binary' needs head='mlp', whose two classes it trains.")
        for field in ("vocab_size", "word_dim", "hidden_size", "output_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.margin < 0:
            raise ValueError(f"margin={self.margin} must not be negative.")


__all__ = ["ContextRnnConfig"]
