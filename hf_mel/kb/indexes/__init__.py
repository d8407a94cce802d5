"""Indexes of a knowledge base, by kind: building and opening them.

Back ends are imported when they are used, so that the command line can list the kinds without importing torch.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_mel.errors import KnowledgeBaseError

if TYPE_CHECKING:
    from accelerate import PartialState

    from hf_mel.kb.indexes.base import Index
    from hf_mel.kb.knowledge_base import KnowledgeBase
    from hf_mel.protocols import MelProcessor

logger = logging.getLogger(__name__)

#: Kinds of indexes that are built. They find candidates, which the model then scores.
BuiltKind = Literal["codes", "faiss-pq", "faiss-flat", "milvus"]
#: Kinds of indexes to find entities with. "exact" needs no build; it scores every entity that the "codes", where they are
#: built, do not prove to be worse.
Kind = Literal["exact", "faiss-pq", "faiss-flat", "milvus"]
KINDS: tuple[str, ...] = get_args(Kind)
#: Kinds of earlier versions.
_REMOVED_KINDS = ("faiss-ivf", "faiss-hnsw")


def build_index(
    kb: KnowledgeBase,
    kind: str,
    model: Any,
    processor: MelProcessor,
    *,
    uri: str | None = None,
    processes: PartialState | None = None,
    progress: bool = True,
) -> Index | None:
    """Builds an index, which finds candidates much faster than scoring every entity.

    The index is stored beside the knowledge base and replaces one of the same kind. If the old index covers part of the
    entities, a faiss index is extended and a Milvus index is built again. An interrupted build resumes.

    Args:
        kb ([`~hf_mel.KnowledgeBase`]): The knowledge base.
        kind (`str`): One of [`KINDS`] other than "exact", or "codes", with which "exact" proves what it need not score.
        model ([`~hf_mel.protocols.Retriever`]): The model that built the knowledge base. It must return vectors for a
            first stage (`index_vectors`, `query_vectors`), or for "codes" bounds (`bound_vectors`, `bound_queries`).
        processor ([`~hf_mel.protocols.MelProcessor`]): Its processor.
        uri (`str`, *optional*): The address of a Milvus server, for "milvus". Default: a file in the folder of the
            knowledge base.
        processes (`accelerate.PartialState`, *optional*): Processes that share the entities of "codes", whose file is that of
            one process if it has as many threads as each of them. An index of another kind is built by the first process,
            for which the others wait. All of them make this call with the same arguments.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`~hf_mel.kb.indexes.base.Index`]: The index; `None` in all processes but the first.

    Raises:
        KnowledgeBaseError: The kind is unknown, another model built the knowledge base, the model returns no vectors,
            the disk is full, or the server cannot be reached. An existing index is left unchanged.
        MissingExtraError: The package of the index is not installed.
        LockedError: Another process changes the knowledge base.
    """
    _check_kind(kind, (*get_args(BuiltKind), "exact"))
    if kind == "exact":
        raise KnowledgeBaseError(
            "The index 'exact' is never built, because it scores every entity.", remedy="Open it without a build."
        )
    if uri is not None and kind != "milvus":
        raise KnowledgeBaseError(f"The index {kind!r} has no server.", remedy="Omit the URI, or build 'milvus'.")
    from hf_mel.inference.ranking import process_group
    from hf_mel.kb.shared_work import held_by_first

    group = process_group(processes)
    with held_by_first(kb.writing(), group):
        with group.raise_together():
            kb.check_made_by(model, processor)
        if kind == "codes":
            from hf_mel.kb.indexes.certified import CertifiedIndex

            return CertifiedIndex.build(kb, model, group, progress=progress)
        with group.without_limit(), group.raise_together():
            return _build_alone(kb, kind, model, uri, progress) if group.index == 0 else None


def _build_alone(kb: KnowledgeBase, kind: str, model: Any, uri: str | None, progress: bool) -> Index:
    """Builds an index of vectors in one process."""
    if kind == "milvus":
        from hf_mel.kb.indexes.milvus import MilvusIndex

        return MilvusIndex.build(kb, model, uri=uri, progress=progress)
    from hf_mel.kb.indexes.faiss import FaissIndex

    return FaissIndex.build(kb, model, kind, progress=progress)


def open_index(
    kb: KnowledgeBase, kind: str, model: Any, *, first_stage: int | None = None, certify: bool = False
) -> Index:
    """Opens an index that was built, or "exact", which needs no build.

    "exact" uses "codes" if they are built and fit the knowledge base. Its answers are the same without them.

    Args:
        kb ([`~hf_mel.KnowledgeBase`]): The knowledge base.
        kind (`str`): One of [`KINDS`].
        model ([`~hf_mel.protocols.Retriever`]): The model that built the knowledge base.
        first_stage (`int`, *optional*): Number of candidates that the index finds for the model to score. Default:
            [`~hf_mel.kb.indexes.base.FIRST_STAGE`].
        certify (`bool`): Whether to insist on proven answers and on the codes.

    Returns:
        [`~hf_mel.kb.indexes.base.Index`]: The index.

    Raises:
        KnowledgeBaseError: The index does not exist, is damaged, or was built from other encodings; with `certify`, the
            same of the codes, or the index proves nothing.
        MissingExtraError: The package of the index is not installed.
    """
    from hf_mel.kb.indexes.base import FIRST_STAGE, read_record

    _check_kind(kind, (*KINDS, "codes"))
    if kind in ("exact", "codes"):
        return _open_exact(kb, model, certify or kind == "codes")
    if certify:
        raise KnowledgeBaseError(
            f"The index {kind!r} may miss entities, so its answers are not proven.", remedy="Use the index 'exact'."
        )
    first_stage = FIRST_STAGE if first_stage is None else first_stage
    record = read_record(kb.path, kind)
    while True:
        try:
            if kind == "milvus":
                from hf_mel.kb.indexes.milvus import MilvusIndex

                return MilvusIndex(kb, model, record, first_stage)
            from hf_mel.kb.indexes.faiss import FaissIndex

            return FaissIndex(kb, model, record, first_stage)
        except KnowledgeBaseError:
            # Another process may have replaced the index since we read its record.
            current = read_record(kb.path, kind)
            if current == record:
                raise
            record = current


def _open_exact(kb: KnowledgeBase, model: Any, certify: bool) -> Index:
    """Opens the exact ranking, with codes if there are any."""
    from hf_mel.kb.indexes.base import ExactIndex, record_path

    if not certify and not record_path(kb.path, "codes").exists():
        return ExactIndex(kb, model)
    from hf_mel.kb.indexes.certified import CertifiedIndex

    try:
        return CertifiedIndex(kb, model)
    except KnowledgeBaseError as error:
        if certify:
            raise
        logger.warning("Every entity is scored, because the codes cannot be used. %s", error)
        return ExactIndex(kb, model)


def _check_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind in _REMOVED_KINDS:
        raise KnowledgeBaseError(
            f"Indexes of the kind {kind!r} are no longer supported: 'faiss-pq' is faster and misses fewer entities.",
            remedy="Build 'faiss-pq' or 'faiss-flat' instead: hf-mel kb index KB --model MODEL --kind faiss-pq",
        )
    if kind not in kinds:
        raise KnowledgeBaseError(f"The index kind {kind!r} is unknown.", remedy=f"Choose one of {', '.join(kinds)}.")
