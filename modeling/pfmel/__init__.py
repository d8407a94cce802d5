"""PFMEL: Pre-Training and Fine-Tuning with Next Sentence Prediction for MEL (Li et al., Electronics 2022)."""

from .configuration_pfmel import PfmelConfig
from .modeling_pfmel import PfmelForPreTraining, PfmelModel
from .processing_pfmel import PfmelProcessor

__all__ = ["PfmelConfig", "PfmelForPreTraining", "PfmelModel", "PfmelProcessor"]
