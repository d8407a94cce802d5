"""How much of what ranking every entity finds is among the candidates of an index."""

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
    """Recall@k of a first stage: the share of the k best entities of all that is among its candidates.

    The model scores the candidates as it scores everything, so this is the recall of the k best of both stages too.

    Args:
        index ([`~hf_mel.kb.indexes.base.Index`]): One with a first stage.
        mentions (`Mapping[str, torch.Tensor]`): Encodings of M mentions.
        ks (sequence of `int`): Every k; all entities, if there are fewer.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `dict[int, float]`: by k, the mean over mentions.
    """
    if not isinstance(index, VectorIndex):
        raise KnowledgeBaseError(
            f"the index {index.kind!r} misses nothing.", remedy="Recall is that of an index with a first stage."
        )
    best = rank(index.model, mentions, index.kb, top_k=max(ks), progress=progress).top_rows.numpy()
    found = [set(rows.tolist()) for rows in index.candidates(mentions)]
    return {
        k: sum(len(found[m].intersection(best[m, :k].tolist())) for m in range(num_rows(mentions))) / best[:, :k].size
        for k in ks
    }
