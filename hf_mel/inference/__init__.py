"""Inference: turning rows into model input, encoding them, and scoring and ranking entities."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_mel.inference.checkpoints import load_reranker as load_reranker
    from hf_mel.inference.checkpoints import load_retriever as load_retriever
    from hf_mel.inference.encode import encode_batches as encode_batches
    from hf_mel.inference.encode import encode_rows as encode_rows
    from hf_mel.inference.entity_sources import EncodedEntities as EncodedEntities
    from hf_mel.inference.entity_sources import EntitySource as EntitySource
    from hf_mel.inference.inputs import ModelInputs as ModelInputs
    from hf_mel.inference.ranking import RankingResult as RankingResult
    from hf_mel.inference.ranking import rank as rank
    from hf_mel.inference.reranking import PairScores as PairScores
    from hf_mel.inference.reranking import score_pairs as score_pairs

#: Public name → its module, imported on first use of the name, because all of them import torch.
_EXPORTS = {
    "EncodedEntities": "entity_sources",
    "EntitySource": "entity_sources",
    "ModelInputs": "inputs",
    "PairScores": "reranking",
    "RankingResult": "ranking",
    "encode_batches": "encode",
    "encode_rows": "encode",
    "load_reranker": "checkpoints",
    "load_retriever": "checkpoints",
    "rank": "ranking",
    "score_pairs": "reranking",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
