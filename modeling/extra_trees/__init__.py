"""ET: extremely randomised trees over features of a mention and a candidate, a baseline of IMN's paper."""

from .configuration_extra_trees import ExtraTreesConfig
from .modeling_extra_trees import ExtraTreesModel
from .processing_extra_trees import ExtraTreesProcessor

__all__ = ["ExtraTreesConfig", "ExtraTreesModel", "ExtraTreesProcessor"]
