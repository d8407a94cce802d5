"""Recall of an index: the share of the exact ranking's best entities that are among its candidates."""

from __future__ import annotations

from collections.abc import Sequence

from hf_mel.errors import KnowledgeBaseError
from hf_mel.inference.encodings import num_rows
from hf_mel.inference.ranking import rank
from hf_mel.kb.indexes.base import Index, VectorIndex
from hf_mel.protocols import Encodings


def recall(
    index: Index, mentions: Encodings, ks: Sequence[int] = (1, 10, 64), *, progress: bool = False
) -> dict[int, float]:
    """Computes recall@k of a first stage: the share of the k entities with the best exact scores among its candidates.

    The model scores candidates exactly, so this is also the recall of the k best entities after both stages.

    Args:
        index ([`~hf_mel.kb.indexes.base.Index`]): An index with a first stage.
        mentions (`Mapping[str, torch.Tensor]`): Encodings of M mentions.
        ks (sequence of `int`): The values of k. A k larger than the knowledge base means all entities.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `dict[int, float]`: k → mean over mentions.

    Raises:
        KnowledgeBaseError: The index has no first stage.
    """
    if not isinstance(index, VectorIndex):
        raise KnowledgeBaseError(
            f"The index {index.kind!r} misses nothing, so its recall is 1.",
            remedy="Choose an index with a first stage.",
        )
    best_rows = rank(index.model, mentions, index.kb, top_k=max(ks), progress=progress).top_rows.numpy()
    candidates = [set(rows.tolist()) for rows in index.candidates(mentions)]
    return {
        k: sum(len(candidates[m].intersection(best_rows[m, :k].tolist())) for m in range(num_rows(mentions)))
        / best_rows[:, :k].size
        for k in ks
    }
