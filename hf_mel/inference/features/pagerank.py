"""Selects the most representative posts of an entity by PageRank (IMN, section 3.3).

The posts of an entity are the vertices of one graph per modality. The weight of an edge is the cosine similarity of the
features of two posts. The paper leaves some points open, which are decided as follows:

- A negative cosine is no edge, because the probability of a step cannot be negative.
- A post is not its own neighbour (no self-loops).
- From a post without neighbours (all cosines ≤ 0, features of length 0, or the only post) the walk continues at a
  uniformly random post, as PageRank does at a page without links.
- Posts whose scores agree to six digits of the mean are equal, and the earlier post comes first.
- Of an entity with fewer posts than requested, all posts are selected.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from hf_mel.errors import ScoreError

#: Methods of selecting posts; "random" is the paper's ablation (Figure 4).
SELECTIONS = ("pagerank", "random")

#: Memory limit in bytes for the graphs of one batch, with the copies that solving makes. A single graph may take more.
_GRAPH_BYTES = 2**28
_BYTES_PER_EDGE = 4 * 8
#: Digits of the mean to which scores are compared, because the features of one text differ slightly between batches.
_DIGITS = 6


def pagerank(weights: torch.Tensor, mask: torch.Tensor | None = None, *, damping: float = 0.85) -> torch.Tensor:
    """Returns the PageRank of the vertices of B weighted graphs with up to n vertices each.

    It is the solution x of x = damping · Pᵀx + (1 - damping) · u, where P is the weights divided by the sum of their row
    (u for a row of zeros) and u is uniform over the graph's vertices. The linear system is solved directly. For graphs
    of some hundred vertices this costs no more than iterating, and needs no tolerance.

    Args:
        weights (`torch.Tensor` `[B, n, n]`): Weights of the edges from row to column, at least 0.
        mask (`torch.Tensor` `[B, n]`, *optional*): True for a vertex, False for padding. Default: no padding.
        damping (`float`): The probability of following an edge, at least 0 and below 1.

    Returns:
        `torch.Tensor` `[B, n]` (float64): Scores that sum to 1 over the vertices of a graph; 0 for padding.

    Raises:
        `ValueError`: A weight is negative, nan or infinite, or `damping` is outside its range.
    """
    if not 0 <= damping < 1:
        raise ValueError(f"damping={damping} is not at least 0 and below 1.")
    count, size, _ = weights.shape
    if mask is None:
        mask = torch.ones(count, size, dtype=torch.bool, device=weights.device)
    vertices = mask.to(torch.float64)
    walk = weights.to(torch.float64)
    if not mask.all():
        walk = walk.masked_fill(~(mask[:, :, None] & mask[:, None]), 0)
    total = walk.sum(2)
    if walk.numel() and not (walk.amin() >= 0 and total.isfinite().all()):
        raise ValueError("The weights of a graph must be finite and at least 0.")
    uniform = vertices / vertices.sum(1, keepdim=True).clamp(min=1)
    # I - damping · Pᵀ, with few passes over the graphs, which dominate the cost.
    system = walk.mT * torch.where(total > 0, -damping / total, 0.0)[:, None]
    isolated = mask & (total == 0)
    if isolated.any():
        system -= damping * uniform[:, :, None] * isolated[:, None]
    system.diagonal(dim1=1, dim2=2).add_(1)
    return torch.linalg.solve(system, (1 - damping) * uniform[:, :, None])[:, :, 0]


def similarity_graphs(features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the graphs of B entities: cosines between the features of their posts, without negative cosines and
    self-loops.

    Args:
        features (`torch.Tensor` `[B, n, d]`): Features of up to n posts per entity.
        mask (`torch.Tensor` `[B, n]`, *optional*): True for a post, False for padding. Default: no padding.

    Returns:
        `torch.Tensor` `[B, n, n]` (float32), 0 for padding.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    if mask is not None:
        unit = unit * mask[:, :, None]
    weights = (unit @ unit.mT).clamp_(min=0)
    weights.diagonal(dim1=1, dim2=2).zero_()
    return weights


def select_posts(
    features: torch.Tensor, groups: Sequence[Sequence[int]], k: int, *, graph_bytes: int = _GRAPH_BYTES
) -> list[list[int]]:
    """Returns the k posts of each entity with the highest PageRank in its similarity graph.

    Entities with a similar number of posts share a batch. An entity with n posts takes 32 n² bytes.

    Args:
        features (`torch.Tensor` `[P, d]`): Features of all posts in one modality.
        groups (E sequences of `int`): The rows of each entity's posts; may be empty.
        k (`int`): Number of posts to select.
        graph_bytes (`int`): Memory for the graphs of one batch.

    Returns:
        E lists of up to k rows, the highest score first.

    Raises:
        [`~hf_mel.errors.ScoreError`]: A feature is nan or infinite.
        `ValueError`: `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"k={k} posts are too few; choose at least 1.")
    check_features(features)
    chosen: list[list[int]] = [[] for _ in groups]
    order = sorted(range(len(groups)), key=lambda group: -len(groups[group]))
    first = 0
    while first < len(order) and groups[order[first]]:
        size = len(groups[order[first]])
        count = max(1, graph_bytes // (_BYTES_PER_EDGE * size * size))
        batch = [group for group in order[first : first + count] if groups[group]]
        first += len(batch)
        rows = torch.zeros(len(batch), size, dtype=torch.long)
        mask = torch.zeros(len(batch), size, dtype=torch.bool)
        for place, group in enumerate(batch):
            rows[place, : len(groups[group])] = torch.as_tensor(groups[group])
            mask[place, : len(groups[group])] = True
        mask = mask.to(features.device)
        scores = pagerank(similarity_graphs(features[rows.to(features.device)], mask), mask)
        scores = (scores * mask.sum(1, keepdim=True) * 10**_DIGITS).round().masked_fill(~mask, -1)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()
        for group, places in zip(batch, best, strict=True):
            chosen[group] = [groups[group][place] for place in places if place < len(groups[group])]
    return chosen


def check_features(features: torch.Tensor, names: Sequence[str] | None = None) -> None:
    """Checks that the features [P, d] of posts are finite.

    Raises:
        [`~hf_mel.errors.ScoreError`]: A feature is nan or infinite; names the post, or without `names` its row.
    """
    wrong = (~features.isfinite().all(1)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ScoreError(
            "The features of the post are nan or infinite.",
            row=row if names is None else names[row],
            remedy="Check the model's weights and this post.",
        )


def random_posts(entity_id: str, posts: Sequence[int], k: int, *, seed: int = 0) -> list[int]:
    """Returns k random posts of an entity, the same for the same entity id and seed: the ablation of PageRank.

    Args:
        entity_id (`str`): The entity's id.
        posts (sequence of `int`): Its posts.
        k (`int`): Number of posts to select; all if there are fewer.
        seed (`int`): Random seed.
    """
    return random.Random(f"{seed} {entity_id}").sample(list(posts), min(k, len(posts)))
