"""Knowledge bases on disk: entities, their encodings, and indexes over them.

Names load on first use, so that the command line can import light modules of this package without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.kb.indexes import KINDS, build_index, open_index
    from hf_mel.kb.knowledge_base import KnowledgeBase

_EXPORTS = {
    "KINDS": "hf_mel.kb.indexes",
    "KnowledgeBase": "hf_mel.kb.knowledge_base",
    "build_index": "hf_mel.kb.indexes",
    "open_index": "hf_mel.kb.indexes",
}

__all__ = ["KINDS", "KnowledgeBase", "build_index", "open_index"]

__getattr__ = lazy_exports(__name__, _EXPORTS)
