"""MIMIC: Multi-Grained Multimodal Interaction Network for Entity Linking (Luo et al., KDD 2023)."""

from .configuration_mimic import MimicConfig
from .modeling_mimic import MimicModel
from .processing_mimic import MimicProcessor

__all__ = ["MimicConfig", "MimicModel", "MimicProcessor"]
