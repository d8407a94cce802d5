"""DZMNED, JMEL and VELML: retrievers that fuse the modalities of a mention into one vector."""

from .configuration_modal_fusion import ModalFusionConfig
from .modeling_modal_fusion import ModalFusionModel
from .processing_modal_fusion import ModalFusionProcessor

__all__ = ["ModalFusionConfig", "ModalFusionModel", "ModalFusionProcessor"]
