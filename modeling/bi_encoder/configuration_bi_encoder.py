"""Configuration of the bi-encoder, which covers BERT, RoBERTa, BLINK's first stage, CLIP, ViLT, METER, ALBEF and LXMERT."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

#: Encoders that read a text and an image together.
JOINT_ENCODERS = ("bridgetower", "lxmert", "vilt")


class BiEncoderConfig(PreTrainedConfig):
    r"""
    Configuration of a [`BiEncoderModel`]. The defaults are one BERT for both sides, its first state, and cosines.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            A BERT-like text encoder, or a CLIP text model. Without any of the three configurations it is BERT base.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            An image encoder: a ViT-like model, a CLIP vision model, or a CNN, whose cells are then the patches.
        joint_config (`PreTrainedConfig` or `dict`, *optional*):
            An encoder that reads text and image together: `"vilt"`, `"lxmert"` or `"bridgetower"`, instead of the other two.
            LXMERT also needs a CNN as `vision_config`, whose cells take the place of its detected objects.
        shared (`bool`, *optional*, defaults to `True`):
            Whether mentions and entities have the same encoder. `False` gives each side its own, as BLINK does.
        fusion (`str`, *optional*, defaults to `"late"`):
            How the text and the image of one side meet. `"late"`: not at all; a score is the mean over the modalities, as
            with CLIP. `"text_stream"`: layers on top of the text encoder read the image (ALBEF). `"two_streams"`: as many
            layers for each modality, which read each other (METER).
        num_fusion_layers, fusion_heads (`int`, *optional*, default to 6 and 12):
            Layers of a stream, and their heads.
        fusion_size (`int`, *optional*, defaults to 768):
            Width of two streams. One text stream has the width of the text encoder.
        fusion_dropout (`int` or `float`, *optional*, defaults to 0.1):
            Dropout in the layers of the streams.
        pooling (`str`, *optional*, defaults to `"cls"`):
            The vector of a text: `"cls"` (first state), `"pooler"` (output of the encoder's pooler), `"mean"` (mean of all
            states), or `"mention"`, which is the mean of the mention's own tokens, and for an entity the first state or, of
            a joint encoder, its pooler.
        interaction (`str`, *optional*, defaults to `"pooled"`):
            `"pooled"` compares one vector with one. `"maxsim"` keeps a vector for every token: the score is the sum over
            the tokens of the mention of their best similarity with a token of the entity (ColBERT). Only for text.
        projection_dim (`int`, *optional*):
            Width of a linear map after pooling: 512 in CLIP, 256 in ALBEF, 128 in ColBERT. Default: no map.
        cross_modal (`bool`, *optional*, defaults to `False`):
            Whether late fusion also compares the text of one side with the image of the other.
        similarity (`str`, *optional*, defaults to `"cosine"`):
            `"cosine"`, or `"dot"` for the inner product, as in BLINK.
        temperature (`int` or `float`, *optional*, defaults to 0.05):
            Divides all scores inside the loss. It changes no rank.
        learn_temperature (`bool`, *optional*, defaults to `False`):
            Whether the temperature is learned, starting from `temperature` and kept at 0.01 or above, as in CLIP.
        missing_images (`str`, *optional*, defaults to `"zeros"`):
            Treatment of a missing image. `"zeros"` encodes a picture of zeros. `"absent"` leaves it out: streams read the
            text alone; with late fusion, a mention without an image is scored by its text, and an entity without one has
            a learned vector. `"absent"` also leaves out the text of a mention that has none, needs the masks of a
            processor with `modality_masks=True`, and does not work with a joint encoder.
        image_dropout (`int` or `float`, *optional*, defaults to 0.0):
            Probability that training treats the image of an entity as missing. Only with `missing_images="absent"`.
        nil_threshold (`int` or `float`, *optional*):
            A mention whose best score is below it is predicted NIL. Set by calibration. Default: never NIL.
        link_calibration (`dict`, *optional*):
            Risk–coverage curve of the links on a validation split. Set after training.
    """

    model_type: ClassVar[str] = "bi_encoder"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit", optional=True),
        "joint_config": SubConfigSpec(config_class=AutoConfig, model_type="vilt", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    joint_config: PreTrainedConfig | dict | None = None
    shared: bool = True
    fusion: str = "late"
    num_fusion_layers: int = 6
    fusion_heads: int = 12
    fusion_size: int = 768
    fusion_dropout: int | float = 0.1
    pooling: str = "cls"
    interaction: str = "pooled"
    projection_dim: int | None = None
    cross_modal: bool = False
    similarity: str = "cosine"
    temperature: int | float = 0.05
    learn_temperature: bool = False
    missing_images: str = "zeros"
    image_dropout: int | float = 0.0
    nil_threshold: int | float | None = None
    link_calibration: dict | None = None

    def __post_init__(self, **kwargs):
        if self.text_config is None and self.vision_config is None and self.joint_config is None:
            self.text_config = {}
        super().__post_init__(**kwargs)
        self._check()

    @property
    def fuses(self) -> bool:
        """Whether one vector stands for the text and the image of a side."""
        return self.joint_config is not None or self.fusion != "late"

    def _check(self) -> None:
        for field, allowed in (
            ("fusion", ("late", "text_stream", "two_streams")),
            ("pooling", ("cls", "pooler", "mean", "mention")),
            ("interaction", ("pooled", "maxsim")),
            ("similarity", ("cosine", "dot")),
            ("missing_images", ("zeros", "absent")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(repr, allowed))}.")
        if self.joint_config is not None:
            kind = self.joint_config.model_type  # type: ignore[union-attr]
            if kind not in JOINT_ENCODERS:
                raise ValueError(
                    f"joint_config has the type {kind!r}, which is not one of {', '.join(JOINT_ENCODERS)}."
                )
            if self.text_config is not None or self.fusion != "late":
                raise ValueError("joint_config reads the text and fuses it. Remove text_config and fusion.")
            if (kind == "lxmert") != (self.vision_config is not None):
                raise ValueError("A joint_config needs a vision_config for LXMERT, and for no other type.")
            if self.missing_images == "absent":
                raise ValueError("A joint encoder needs an image. Set missing_images='zeros'.")
        elif self.fusion != "late" and (self.text_config is None or self.vision_config is None):
            raise ValueError(f"fusion={self.fusion!r} needs text_config and vision_config.")
        if self.fusion != "late" and self.pooling == "pooler":
            raise ValueError(
                f"fusion={self.fusion!r} has no trained pooler. Set pooling to 'cls', 'mean' or 'mention'."
            )
        if self.interaction == "maxsim" and (self.text_config is None or self.vision_config is not None):
            raise ValueError("interaction='maxsim' compares tokens of texts. Give a text_config alone.")
        if self.cross_modal:
            if self.fuses or self.text_config is None or self.vision_config is None:
                raise ValueError("cross_modal=True needs fusion='late', a text_config and a vision_config.")
            if self.projection_dim is None:
                raise ValueError("cross_modal=True compares texts with images. Set projection_dim.")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        if not 0 <= self.image_dropout < 1:
            raise ValueError(f"image_dropout={self.image_dropout} must be at least 0 and below 1.")
        if self.image_dropout and self.missing_images != "absent":
            raise ValueError(f"image_dropout={self.image_dropout} needs missing_images='absent'.")


__all__ = ["JOINT_ENCODERS", "BiEncoderConfig"]
