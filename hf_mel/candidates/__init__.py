"""Candidates: the few entities each mention may mean, by name, by prior, from a retriever or from the release."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.candidates.lists import CandidateLists as CandidateLists
    from hf_mel.candidates.make import make_candidates as make_candidates
    from hf_mel.candidates.make import retriever_candidates as retriever_candidates
    from hf_mel.candidates.name_index import NameIndex as NameIndex
    from hf_mel.candidates.sources import document_candidates as document_candidates
    from hf_mel.candidates.sources import name_candidates as name_candidates
    from hf_mel.candidates.sources import prior_candidates as prior_candidates
    from hf_mel.candidates.sources import release_candidates as release_candidates
    from hf_mel.candidates.sources import union_candidates as union_candidates

#: Public name → its module, imported on first use of the name, because they import torch or datasets.
_EXPORTS = {
    "CandidateLists": "hf_mel.candidates.lists",
    "NameIndex": "hf_mel.candidates.name_index",
    "document_candidates": "hf_mel.candidates.sources",
    "make_candidates": "hf_mel.candidates.make",
    "name_candidates": "hf_mel.candidates.sources",
    "prior_candidates": "hf_mel.candidates.sources",
    "release_candidates": "hf_mel.candidates.sources",
    "retriever_candidates": "hf_mel.candidates.make",
    "union_candidates": "hf_mel.candidates.sources",
}

__all__ = [*_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)
