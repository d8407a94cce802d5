"""Linking: from a mention in a text to an entity of a knowledge base, or NIL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.linking.annotating import AnnotatedMention as AnnotatedMention
    from hf_mel.linking.annotating import AnnotatedText as AnnotatedText
    from hf_mel.linking.explaining import Explanation as Explanation
    from hf_mel.linking.explaining import explain as explain
    from hf_mel.linking.linker import EntityLinker as EntityLinker
    from hf_mel.linking.results import Candidate as Candidate
    from hf_mel.linking.results import LinkResult as LinkResult

#: Public name → its module, imported on first use of the name, because both modules import torch.
_EXPORTS = {
    "AnnotatedMention": "hf_mel.linking.annotating",
    "AnnotatedText": "hf_mel.linking.annotating",
    "Candidate": "hf_mel.linking.results",
    "EntityLinker": "hf_mel.linking.linker",
    "Explanation": "hf_mel.linking.explaining",
    "LinkResult": "hf_mel.linking.results",
    "explain": "hf_mel.linking.explaining",
}

__all__ = [*_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)
