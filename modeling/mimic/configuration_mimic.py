"""Configuration of MIMIC (Luo et al., KDD 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

logger = logging.get_logger(__name__)

#: Interaction units in the order of Figure 3: TGLU, VDLU, CMFU.
UNITS = ("text", "vision", "cross_modal")


class MimicConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MimicModel`]. The defaults are the published network: CLIP ViT-B/32 and all three units.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            A BERT-like text encoder or a CLIP text model. Needed by the units `"text"` and `"cross_modal"`.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            An image encoder: a ViT-like model, a CLIP vision model, or a CNN, whose feature map provides the patches.
            Needed by the units `"vision"` and `"cross_modal"`. Without both configs and without `units`, both encoders
            are those of CLIP ViT-B/32.
        projection_dim (`int`, *optional*):
            Width of a joint space into which both global features are projected and L2-normalised, as in CLIP (512 for
            ViT-B/32). Default: the global features are the encoders' outputs.
        units (`list[str]`, *optional*):
            The model's units, out of `"text"` (TGLU), `"vision"` (VDLU) and `"cross_modal"` (CMFU). The score is the
            mean of theirs (eq. 7). Default: all that the encoders allow. Leaving one out is the paper's "w/o unit +
            loss" (Table 2).
        unit_losses (`list[str]`, *optional*):
            The units whose loss (eq. 21) is added to the overall one (eq. 22). Default: all of `units`.
        unit_weights (`list[float]`, *optional*):
            Weights of `units`, in their order, in the mean of eq. 7. The units' scores have scales of their own, which their
            losses decide, and a unit that learns the training texts by heart has large scores. Default: all equal, as in the
            paper.
        loss_unit_weights (`list[float]`, *optional*):
            The same weights inside the overall loss (eq. 22). A unit that needs weight in training to learn may deserve less
            afterwards, because it knows its training mentions better than others. Default: `unit_weights`.
        text_pooling (`str`, *optional*, defaults to `"pooler"`):
            The global text feature: `"pooler"` (CLIP's end-of-text state), `"cls"` (as the paper says) or `"mean"`
            over the tokens that are not padding.
        global_norm (`str`, *optional*, defaults to `"layer_norm"`):
            Normalisation of the global text features in eq. 8: `"layer_norm"` as in the published network, or `"l2"`,
            which makes S_T^G2G a cosine. With `"l2"`, FC(t_E^G) is normalised too, so that S_T^G2L (eq. 10) is also a
            cosine. The scores of the other units are not: they are sums over features and grow with training. In the mean
            of eq. 7 a cosine counts for little beside them (a warning says so), so `"l2"` is meant for the text unit alone, or
            with `unit_weights`.
        local_scale (`int` or `float`, *optional*, defaults to 1.0):
            Weight of S_T^G2L relative to S_T^G2G. Only with `global_norm="l2"`, where neither of them can grow.
        temperature (`int` or `float`, *optional*, defaults to 1.0):
            Divides all scores inside the losses of eq. 20–21. It does not change the ranking. The paper has none.
        text_dim, vision_dim, fusion_dim (`int`, *optional*, defaults to 96):
            d_t, d_v, d_c of the paper: the widths inside TGLU, VDLU and CMFU.
        text_local (`bool`, *optional*, defaults to `True`):
            Whether TGLU has its global-to-local half (eq. 9–10). Without it, the text unit is a plain bi-encoder (eq. 8).
        gate (`str`, *optional*, defaults to `"scalar"`):
            CMFU's gate (eq. 17): one `"scalar"` per item as in the published network, or a `"vector"` as printed.
        query_norm (`bool`, *optional*, defaults to `True`):
            Whether VDLU normalises the query before the dot product of eq. 14. The published network does, the paper
            does not.
        mask_padding (`bool`, *optional*, defaults to `False`):
            Whether TGLU masks padding in the softmax (eq. 9) and the mean (eq. 10). The published network does not, so
            its scores depend on how far a text was padded.
        local_init (`str`, *optional*, defaults to `"default"`):
            Initialisation of TGLU's query, key, value and global map: `"default"` is random, as in the published
            network. `"aligned"` is one shared orthogonal projection, so that eq. 9–10 start as a soft token match; it
            needs local and global features of the same width.
        missing_images (`str`, *optional*, defaults to `"zeros"`):
            Treatment of a missing image. `"zeros"` encodes a picture of zeros, as the published network does, and its
            scores count. `"absent"` leaves it out: a mention without an image is scored by its text unit alone, and an
            entity without one has learned image features in the two other units, so that its scores can be compared with
            those of entities that have one. `"absent"` also leaves out the text of a mention that has none, and needs
            the masks of a processor with `modality_masks=True`.
        image_dropout (`int` or `float`, *optional*, defaults to 0.0):
            Probability that training treats the image of an entity as missing, which teaches the learned image features.
            Only with `missing_images="absent"`.
        nil_score (`bool`, *optional*, defaults to `False`):
            Whether the model learns a NIL score of every mention, which is subtracted from the scores of all its entities.
            NIL mentions then take part in training. The paper has no NIL.
        nil_threshold (`int` or `float`, *optional*):
            A mention whose best score is below it is predicted NIL. Set by calibration on a validation split with NIL
            mentions. Default: never NIL.
        link_calibration (`dict`, *optional*):
            Risk–coverage curve of the links on a validation split ([`hf_mel.inference.selective.RiskCoverage`]), from which
            the linker takes the threshold of a stated precision. Set after training.
    """

    model_type: ClassVar[str] = "mimic"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    projection_dim: int | None = None
    units: list[str] | None = None
    unit_losses: list[str] | None = None
    unit_weights: list[int | float] | None = None
    loss_unit_weights: list[int | float] | None = None
    text_pooling: str = "pooler"
    global_norm: str = "layer_norm"
    local_scale: int | float = 1.0
    temperature: int | float = 1.0
    text_dim: int = 96
    vision_dim: int = 96
    fusion_dim: int = 96
    text_local: bool = True
    gate: str = "scalar"
    query_norm: bool = True
    mask_padding: bool = False
    local_init: str = "default"
    missing_images: str = "zeros"
    image_dropout: int | float = 0.0
    nil_score: bool = False
    nil_threshold: int | float | None = None
    link_calibration: dict | None = None

    def __post_init__(self, **kwargs):
        if self.text_config is None and self.vision_config is None and self.units is None:
            self.text_config, self.vision_config, self.projection_dim = {}, {}, 512
        super().__post_init__(**kwargs)
        if self.units is None:
            available = {"text": self.text_config, "vision": self.vision_config}
            available["cross_modal"] = self.text_config and self.vision_config
            self.units = [unit for unit in UNITS if available[unit]]
        if self.unit_losses is None:
            self.unit_losses = list(self.units)
        self._check()

    def _check(self) -> None:
        def choose(field: str, *allowed: str) -> None:
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(repr, allowed))}.")

        choose("text_pooling", "pooler", "cls", "mean")
        choose("global_norm", "layer_norm", "l2")
        choose("gate", "scalar", "vector")
        choose("local_init", "default", "aligned")
        choose("missing_images", "zeros", "absent")
        if not self.units or set(self.units) - set(UNITS) or len(set(self.units)) != len(self.units):
            raise ValueError(
                f"units={self.units!r} must be one or more of {', '.join(map(repr, UNITS))}, without repetition."
            )
        if set(self.unit_losses or ()) - set(self.units):
            raise ValueError(f"unit_losses={self.unit_losses!r} names a unit that is not in units={self.units!r}.")
        for field in ("unit_weights", "loss_unit_weights"):
            weights = getattr(self, field)
            if weights is not None and (len(weights) != len(self.units) or not all(weight > 0 for weight in weights)):
                raise ValueError(
                    f"{field}={weights!r} must be one positive number for each of units={self.units!r}. Leave a unit out of "
                    "units to give it no weight."
                )
        if self.global_norm == "l2" and len(self.units) > 1 and "text" in self.units and self.unit_weights is None:
            logger.warning(
                "global_norm='l2' makes the text unit's scores cosines, which count for little in the mean with the other "
                "units. Give unit_weights, or use 'layer_norm'."
            )
        for unit in self.units:
            missing = [
                name
                for name, units in (
                    ("text_config", ("text", "cross_modal")),
                    ("vision_config", ("vision", "cross_modal")),
                )
                if unit in units and getattr(self, name) is None
            ]
            if missing:
                raise ValueError(
                    f"The unit {unit!r} needs {' and '.join(missing)}. Set it, or leave the unit out of units."
                )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        if not 0 <= self.image_dropout < 1:
            raise ValueError(f"image_dropout={self.image_dropout} must be at least 0 and below 1.")
        if self.image_dropout and self.missing_images != "absent":
            raise ValueError(f"image_dropout={self.image_dropout} needs missing_images='absent'.")
        if self.local_scale != 1 and self.global_norm != "l2":
            raise ValueError(f"local_scale={self.local_scale} needs global_norm='l2'.")


__all__ = ["MimicConfig"]
