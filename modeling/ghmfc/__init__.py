"""GHMFC: Multimodal Entity Linking with Gated Hierarchical Fusion and Contrastive Training (Wang et al., SIGIR 2022)."""

from .configuration_ghmfc import GhmfcConfig
from .modeling_ghmfc import GhmfcModel
from .processing_ghmfc import GhmfcProcessor

__all__ = ["GhmfcConfig", "GhmfcModel", "GhmfcProcessor"]
