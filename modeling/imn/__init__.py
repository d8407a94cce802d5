"""IMN: Multimodal Knowledge Learning for Named Entity Disambiguation (Zhang et al., Findings of EMNLP 2022)."""

from .configuration_imn import ImnConfig
from .modeling_imn import ImnModel
from .pretraining_imn import ImnForKnowledgePreTraining
from .processing_imn import ImnProcessor

__all__ = ["ImnConfig", "ImnForKnowledgePreTraining", "ImnModel", "ImnProcessor"]
