"""Configuration of ET, extremely randomised trees over features of a mention and a candidate."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class ExtraTreesConfig(PreTrainedConfig):
    r"""
    Configuration of an [`ExtraTreesModel`]. The options of the forest have scikit-learn's names and defaults.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of a frozen text encoder. With it, the cosine of the mean states of both texts is a feature.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of a frozen image encoder. With it, the cosine of both images is a feature; 0 if one is missing.
        list_scores (`bool`, *optional*, defaults to `False`):
            Whether the score of the list that the model reranks is a feature. The original has the score of JMEL.
        n_estimators (`int`, *optional*, defaults to 100):
            Number of trees.
        max_depth (`int`, *optional*):
            Largest depth of a tree. `None` does not limit it.
        min_samples_leaf (`int`, *optional*, defaults to 1):
            Smallest number of pairs in a leaf.
        max_features (`str`, `float` or `int`, *optional*, defaults to `"sqrt"`):
            Number of features that a split chooses from; `None` means all.
        num_nodes (`int`, *optional*, defaults to 1):
            Number of nodes of all trees together. Fitting sets it. An unfitted forest is one leaf with probability 1/2.
        num_features (`int`, *optional*):
            Number of features that the forest was fitted on. Fitting sets it.
        nil_threshold (`int` or `float`, *optional*):
            Score below which the best candidate of a mention is rejected, so that the mention is NIL. `None` never
            predicts NIL.
    """

    model_type: ClassVar[str] = "extra_trees"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    list_scores: bool = False
    n_estimators: int = 100
    max_depth: int | None = None
    min_samples_leaf: int = 1
    max_features: str | int | float | None = "sqrt"
    num_nodes: int = 1
    num_features: int | None = None
    nil_threshold: int | float | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for field in ("n_estimators", "max_depth", "min_samples_leaf", "num_nodes"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value} must be at least 1.")
        if isinstance(self.max_features, str) and self.max_features not in ("sqrt", "log2"):
            raise ValueError(f"max_features={self.max_features!r} is not 'sqrt', 'log2', a number or null.")


__all__ = ["ExtraTreesConfig"]
