"""MMEL: A Joint Learning Framework for Multi-Mention Entity Linking (Yang et al., UAI 2023)."""

from .configuration_mmel import MmelConfig
from .modeling_mmel import MmelModel
from .processing_mmel import MmelProcessor

__all__ = ["MmelConfig", "MmelModel", "MmelProcessor"]
