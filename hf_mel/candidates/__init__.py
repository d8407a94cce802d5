"""Candidates: the few entities each mention may mean, by name, by prior, from a retriever or from the release."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_mel.candidates.lists import CandidateLists as CandidateLists
    from hf_mel.candidates.make import make_candidates as make_candidates
    from hf_mel.candidates.make import retriever_candidates as retriever_candidates
    from hf_mel.candidates.sources import document_candidates as document_candidates
    from hf_mel.candidates.sources import name_candidates as name_candidates
    from hf_mel.candidates.sources import prior_candidates as prior_candidates
    from hf_mel.candidates.sources import release_candidates as release_candidates
    from hf_mel.candidates.sources import union_candidates as union_candidates

#: Public name → its module, imported on first use of the name, because they import torch or datasets.
_EXPORTS = {
    "CandidateLists": "lists",
    "document_candidates": "sources",
    "make_candidates": "make",
    "name_candidates": "sources",
    "prior_candidates": "sources",
    "release_candidates": "sources",
    "retriever_candidates": "make",
    "union_candidates": "sources",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
