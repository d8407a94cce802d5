"""What finds the entities of mentions in a knowledge base, by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_mel.errors import KnowledgeBaseError
from hf_mel.kb.indexes.base import FIRST_STAGE, ExactIndex, Index, read_record

if TYPE_CHECKING:
    from hf_mel.kb.indexes.base import VectorIndex
    from hf_mel.kb.knowledge_base import KnowledgeBase

#: "exact" scores every entity; the others find candidates, which are then scored.
KINDS = ("exact", "faiss-pq", "faiss-flat", "faiss-ivf", "faiss-hnsw", "milvus")


def build_index(
    kb: KnowledgeBase, kind: str, model: Any, *, uri: str | None = None, progress: bool = True
) -> VectorIndex:
    """See [`~hf_mel.KnowledgeBase.build_index`]."""
    _check_kind(kind)
    if kind == "exact":
        raise KnowledgeBaseError("'exact' is no index that is built.", remedy="It ranks every entity, of any base.")
    if uri is not None and kind != "milvus":
        raise KnowledgeBaseError(f"{kind!r} has no server.", remedy="Leave the uri out, or build 'milvus'.")
    if kind == "milvus":
        from hf_mel.kb.indexes.milvus import MilvusIndex

        return MilvusIndex.build(kb, model, uri=uri, progress=progress)
    from hf_mel.kb.indexes.faiss import FaissIndex

    return FaissIndex.build(kb, model, kind, progress=progress)


def open_index(kb: KnowledgeBase, kind: str, model: Any, *, first_stage: int | None = None) -> Index:
    """See [`~hf_mel.KnowledgeBase.open_index`]."""
    _check_kind(kind)
    if kind == "exact":
        return ExactIndex(kb, model)
    record = read_record(kb.path, kind)
    first_stage = FIRST_STAGE if first_stage is None else first_stage
    if kind == "milvus":
        from hf_mel.kb.indexes.milvus import MilvusIndex

        return MilvusIndex(kb, model, record, first_stage)
    from hf_mel.kb.indexes.faiss import FaissIndex

    return FaissIndex(kb, model, record, first_stage)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise KnowledgeBaseError(f"there is no index of the kind {kind!r}.", remedy=f"Kinds are {', '.join(KINDS)}.")
