"""The bi-encoder: one vector a side, from any encoder of transformers."""

from .configuration_bi_encoder import BiEncoderConfig
from .modeling_bi_encoder import BiEncoderModel
from .processing_bi_encoder import BiEncoderProcessor

__all__ = ["BiEncoderConfig", "BiEncoderModel", "BiEncoderProcessor"]
