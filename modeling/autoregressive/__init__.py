"""GENRE and "Autoregressive": entities scored by the probability of generating their names."""

from .configuration_autoregressive import AutoregressiveConfig
from .modeling_autoregressive import AutoregressiveModel
from .processing_autoregressive import AutoregressiveProcessor
from .trie_autoregressive import NameTrie

__all__ = ["AutoregressiveConfig", "AutoregressiveModel", "AutoregressiveProcessor", "NameTrie"]
