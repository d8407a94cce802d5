"""IMN: Multimodal Knowledge Learning for Named Entity Disambiguation (Zhang et al., EMNLP Findings 2022)."""

from .configuration_imn import ImnConfig
from .modeling_imn import ImnForKnowledgePreTraining, ImnModel
from .processing_imn import ImnProcessor

__all__ = ["ImnConfig", "ImnForKnowledgePreTraining", "ImnModel", "ImnProcessor"]
