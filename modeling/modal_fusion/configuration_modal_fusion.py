"""Configuration of DZMNED (Moon et al., ACL 2018), JMEL (Adjali et al., ECIR 2020) and VELML (Zheng et al., 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

#: Modalities of an entity that can be fused.
_ENTITY_MODALITIES = ("text", "image")


class ModalFusionConfig(PreTrainedConfig):
    r"""
    Configuration of a [`ModalFusionModel`]. The defaults are DZMNED on BERT.

    Rows of the papers' tables: DZMNED has word vectors (`vocab_size`, `word_dim`, no `text_config`), DZMNED(BERT) a
    `text_config`; JMEL is `fusion="concat"`, `loss="triplet"`, `char_hidden_size=None`; VELML is `image_regions="grid"`,
    `loss="softmax"`, `char_hidden_size=None`.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of a text encoder like BERT.
        vocab_size, word_dim (`int`, *optional*):
            Size of a table of word vectors, which a Bi-LSTM reads, in place of a text encoder.
        train_words (`bool`, *optional*, defaults to `False`):
            Whether to train the word vectors.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of an image encoder: a CNN or a model like ViT. `None` makes a model without images. Without
            `text_config`, `vocab_size` and `vision_config`, the model is DZMNED on BERT with ResNet-50.
        freeze_vision (`bool`, *optional*, defaults to `True`):
            Whether to freeze the image encoder. The published networks read fixed image features.
        image_regions (`str`, *optional*, defaults to `"global"`):
            `"global"` reads the pooled image, `"grid"` attends to the cells of its last map, guided by the text (VELML's
            objects).
        char_hidden_size (`int`, *optional*, defaults to 100):
            Width of each direction of a Bi-LSTM over the characters of the mention and of the entity's name. `None`
            makes a model without characters.
        char_dim, char_vocab_size (`int`, *optional*, defaults to 32 and 512):
            Width and size of the table of characters. A character's row is its code point modulo the size.
        fusion (`str`, *optional*, defaults to `"attention"`):
            `"attention"` is DZMNED's modality attention, `"concat"` one layer on all modalities joined (JMEL).
        hidden_size (`int`, *optional*, defaults to 512):
            Width of every modality and of the vectors of mentions and entities.
        entity_modalities (`list[str]`, *optional*):
            What is fused into the vector of an entity, out of `"text"` and `"image"`. Default: what the model reads.
        text_pooling (`str`, *optional*, defaults to `"cls"`):
            Pooling of the text encoder: `"cls"`, or `"mean"` over the tokens.
        aligned_start (`bool`, *optional*, defaults to `False`):
            Whether the linear maps of both sides start as the same orthogonal projections, so that before training a
            mention and an entity with the same features have the same vector. Not in the papers.
        dropout (`int` or `float`, *optional*, defaults to 0.1):
            Dropout of the modalities.
        loss (`str`, *optional*, defaults to `"adaptive_hinge"`):
            `"adaptive_hinge"` is DZMNED's, whose margin is the similarity of the wrong entity to the right one;
            `"triplet"` has a fixed `margin` (JMEL); `"softmax"` is the cross-entropy (VELML).
        margin (`int` or `float`, *optional*, defaults to 0.2):
            Margin of `"triplet"`.
        negatives (`str`, *optional*, defaults to `"mean"`):
            Whether the loss of a mention is the `"mean"` over the other entities of the batch, or that of the `"hardest"`.
            Not with `"softmax"`.
        temperature (`int` or `float`, *optional*, defaults to 0.05):
            Divides the scores inside `"softmax"`.
        edit_loss_weight (`int` or `float`, *optional*, defaults to 1):
            Weight of the loss that teaches the characters to tell how similar two strings are. With it, the other losses
            do not change the encoder of the characters, as in DZMNED, which trains it beforehand.
        nil_threshold (`int` or `float`, *optional*):
            A mention whose best score is below it is predicted NIL. Set by calibration on a validation split with NIL
            mentions. Default: never NIL.
        link_calibration (`dict`, *optional*):
            Risk–coverage curve of the links on a validation split. Set after training.
    """

    model_type: ClassVar[str] = "modal_fusion"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    vocab_size: int | None = None
    word_dim: int | None = None
    train_words: bool = False
    vision_config: PreTrainedConfig | dict | None = None
    freeze_vision: bool = True
    image_regions: str = "global"
    char_hidden_size: int | None = 100
    char_dim: int = 32
    char_vocab_size: int = 512
    fusion: str = "attention"
    hidden_size: int = 512
    entity_modalities: list[str] | None = None
    text_pooling: str = "cls"
    aligned_start: bool = False
    dropout: int | float = 0.1
    loss: str = "adaptive_hinge"
    margin: int | float = 0.2
    negatives: str = "mean"
    temperature: int | float = 0.05
    edit_loss_weight: int | float = 1
    nil_threshold: int | float | None = None
    link_calibration: dict | None = None

    def __post_init__(self, **kwargs):
        if self.text_config is None and self.vocab_size is None and self.vision_config is None:
            self.text_config, self.vision_config = {}, {}
        super().__post_init__(**kwargs)
        if self.entity_modalities is None:
            self.entity_modalities = ["text"] if self.vision_config is None else ["text", "image"]
        self._check()

    def _check(self) -> None:
        if (self.text_config is None) == (self.vocab_size is None):
            raise ValueError("The model reads text. Give either text_config, or vocab_size and word_dim.")
        if (self.vocab_size is None) != (self.word_dim is None):
            raise ValueError("vocab_size and word_dim describe the word vectors. Give both or none.")
        for field, allowed in (
            ("image_regions", ("global", "grid")),
            ("fusion", ("attention", "concat")),
            ("text_pooling", ("cls", "mean")),
            ("loss", ("adaptive_hinge", "triplet", "softmax")),
            ("negatives", ("mean", "hardest")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(repr, allowed))}.")
        modalities = self.entity_modalities or []
        if "text" not in modalities or set(modalities) - set(_ENTITY_MODALITIES):
            raise ValueError(f"entity_modalities={modalities!r} must be ['text'] or ['text', 'image'].")
        if "image" in modalities and self.vision_config is None:
            raise ValueError(
                "entity_modalities has 'image', but the model has no image encoder. Give a vision_config."
            )
        for field in ("vocab_size", "word_dim", "char_hidden_size", "char_dim", "char_vocab_size", "hidden_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value} must be at least 1.")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} is odd, but a Bi-LSTM has half of it in each direction.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        for field in ("margin", "edit_loss_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")


__all__ = ["ModalFusionConfig"]
