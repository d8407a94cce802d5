"""ARNN, IMN's "BERT" and Att (MEL-HI): rerankers that read the contexts left and right of a mention."""

from .configuration_context_rnn import ContextRnnConfig
from .modeling_context_rnn import ContextRnnModel
from .processing_context_rnn import ContextRnnProcessor

__all__ = ["ContextRnnConfig", "ContextRnnModel", "ContextRnnProcessor"]
