"""The cross-encoder: one text encoder reads a mention together with a candidate (BLINK's second stage, CHOLAN)."""

from .configuration_cross_encoder import CrossEncoderConfig
from .modeling_cross_encoder import CrossEncoderModel
from .processing_cross_encoder import CrossEncoderProcessor

__all__ = ["CrossEncoderConfig", "CrossEncoderModel", "CrossEncoderProcessor"]
