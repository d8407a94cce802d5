"""Linking: from a mention in a text to an entity of a knowledge base, or NIL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_mel.linking.explaining import Explanation as Explanation
    from hf_mel.linking.explaining import explain as explain
    from hf_mel.linking.linker import Candidate as Candidate
    from hf_mel.linking.linker import EntityLinker as EntityLinker
    from hf_mel.linking.linker import LinkResult as LinkResult

#: Public name → its module, imported on first use of the name, because both modules import torch.
_EXPORTS = {
    "Candidate": "linker",
    "EntityLinker": "linker",
    "Explanation": "explaining",
    "LinkResult": "linker",
    "explain": "explaining",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
