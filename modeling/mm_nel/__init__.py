"""MM-nel: Multimodal Entity Linking: A New Dataset and A Baseline (Gan et al., MM 2021)."""

from .configuration_mm_nel import MmNelConfig
from .modeling_mm_nel import MmNelModel
from .processing_mm_nel import MmNelProcessor

__all__ = ["MmNelConfig", "MmNelModel", "MmNelProcessor"]
