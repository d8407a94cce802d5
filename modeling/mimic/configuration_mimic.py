"""Configuration of MIMIC (Luo et al., KDD 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

#: The interaction units of the paper, in the order of Figure 3: TGLU, VDLU, CMFU.
UNITS = ("text", "vision", "cross_modal")


class MimicConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MimicModel`]. The defaults describe the published network: CLIP ViT-B/32 and all three units.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Any BERT-like text encoder, or a CLIP text model. Needed by the units `"text"` and `"cross_modal"`.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Any image encoder: a ViT-like model, a CLIP vision model, or a CNN whose feature map stands for the patches.
            Needed by the units `"vision"` and `"cross_modal"`. With neither config nor `units` given, both are those of
            CLIP ViT-B/32.
        projection_dim (`int`, *optional*):
            Width of a joint space that both global features are projected and L2-normalised into, as CLIP does
            (512 for ViT-B/32). `None`: global features are the encoders' own.
        units (`list[str]`, *optional*):
            Which of `"text"` (TGLU), `"vision"` (VDLU), `"cross_modal"` (CMFU) the model has; the score is the mean of
            theirs (eq. 7). Default: all that the given encoders allow. Leaving one out is the paper's "w/o unit + loss".
        unit_losses (`list[str]`, *optional*):
            The units whose own loss (eq. 21) joins the overall one in eq. 22. Default: all of `units`.
        text_pooling (`str`, *optional*, defaults to `"pooler"`):
            The global text feature: `"pooler"` (CLIP's end-of-text state), `"cls"` (the paper's text) or `"mean"` over
            the tokens that are not padding.
        global_norm (`str`, *optional*, defaults to `"layer_norm"`):
            How eq. 8 normalises global text features: `"layer_norm"` as the published network, or `"l2"`, which makes
            S_T^G2G a cosine, and S_T^G2L (eq. 10) one too: FC(t_E^G) is normalised as well.
        local_scale (`int` or `float`, *optional*, defaults to 1.0):
            Weight of S_T^G2L beside S_T^G2G; only with `global_norm="l2"`, where neither can grow on its own.
        temperature (`int` or `float`, *optional*, defaults to 1.0):
            Divides every score inside the losses of eq. 20–21; ranking does not see it. The paper has none.
        text_dim, vision_dim, fusion_dim (`int`, *optional*, defaults to 96):
            d_t, d_v, d_c of the paper: the widths inside TGLU, VDLU and CMFU.
        text_local (`bool`, *optional*, defaults to `True`):
            Whether TGLU has its global-to-local half (eq. 9–10). Without it the text unit is a plain bi-encoder, eq. 8.
        gate (`str`, *optional*, defaults to `"scalar"`):
            CMFU's gate (eq. 17): one `"scalar"` per item as the published network, or a `"vector"` as the paper prints.
        query_norm (`bool`, *optional*, defaults to `True`):
            Whether VDLU normalises the query before the dot product of eq. 14, as the published network; the paper does
            not.
        mask_padding (`bool`, *optional*, defaults to `False`):
            Whether TGLU leaves padding out of the softmax (eq. 9) and the mean (eq. 10). The published network does not,
            so its scores depend on how far a text was padded.
        local_init (`str`, *optional*, defaults to `"default"`):
            `"default"`: TGLU's maps start random, as published. `"aligned"`: query, key, value and global map start as
            one shared orthogonal projection, so that eq. 9–10 start as a soft token match instead of noise. Needs equal
            widths of local and global features.
        nil_threshold (`int` or `float`, *optional*):
            A mention whose best score is below it is NIL. Set by calibration on a validation split that has NIL mentions;
            `None`: never NIL.
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
    nil_threshold: int | float | None = None

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
        if not self.units or set(self.units) - set(UNITS) or len(set(self.units)) != len(self.units):
            raise ValueError(f"units={self.units!r} must be one or more of {', '.join(map(repr, UNITS))}, each once.")
        if set(self.unit_losses or ()) - set(self.units):
            raise ValueError(f"unit_losses={self.unit_losses!r} names a unit that is not in units={self.units!r}.")
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
                    f"The unit {unit!r} needs {' and '.join(missing)}; give it, or leave the unit out of units."
                )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        if self.local_scale != 1 and self.global_norm != "l2":
            raise ValueError(f"local_scale={self.local_scale} needs global_norm='l2'.")


__all__ = ["MimicConfig"]
