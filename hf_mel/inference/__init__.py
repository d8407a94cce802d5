"""Inference: turning rows into model input, encoding them, and scoring and ranking entities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

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
    "EncodedEntities": "hf_mel.inference.entity_sources",
    "EntitySource": "hf_mel.inference.entity_sources",
    "ModelInputs": "hf_mel.inference.inputs",
    "PairScores": "hf_mel.inference.reranking",
    "RankingResult": "hf_mel.inference.ranking",
    "encode_batches": "hf_mel.inference.encode",
    "encode_rows": "hf_mel.inference.encode",
    "load_reranker": "hf_mel.inference.checkpoints",
    "load_retriever": "hf_mel.inference.checkpoints",
    "rank": "hf_mel.inference.ranking",
    "score_pairs": "hf_mel.inference.reranking",
}

__all__ = [*_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)
