"""Which posts stand for an entity: the ones that PageRank finds most central among its own (IMN, section 3.3).

The posts of an entity are the vertices of a graph, one for each modality, whose edges weigh as the cosine similarity of
their features. What the paper leaves open is decided so:

- A negative cosine is no edge: the share of a random walk cannot be negative.
- A post is not its own neighbour (no self-loops): an edge joins two posts.
- From a post without neighbours (all cosines ≤ 0, features of length 0, or the only post) the walk goes on at any post,
  as PageRank does at a page without links.
- Posts whose scores agree to six digits of the mean count as equal, and the earlier one comes first.
- An entity with fewer posts than are wanted is known by all of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from hf_mel.errors import ScoreError

#: How representative posts are found: "random" is the paper's ablation (Figure 4).
SELECTIONS = ("pagerank", "random")

#: What the graphs of one batch may take, in bytes, with the copies that solving makes: a single graph may take more.
_GRAPH_BYTES = 2**28
_BYTES_PER_EDGE = 4 * 8
#: Digits, of the mean score, to which scores are told apart: features of one text differ a little between batches.
_DIGITS = 6


def pagerank(weights: torch.Tensor, mask: torch.Tensor | None = None, *, damping: float = 0.85) -> torch.Tensor:
    """The PageRank of the vertices of B weighted graphs, each of up to n of them.

    It is the solution x of x = damping · Pᵀx + (1 - damping) · u, with P the weights divided by the sum of their row
    (a row of zeros: u) and u uniform over the graph's vertices. The system is solved as it stands: of n posts in the
    hundreds that costs no more than iterating, and has no tolerance.

    Args:
        weights (`torch.Tensor` `[B, n, n]`): Of the edge from row to column, at least 0.
        mask (`torch.Tensor` `[B, n]`, *optional*): Which vertices there are; default all.
        damping (`float`): The share of the walk that follows edges, at least 0 and below 1.

    Returns:
        `torch.Tensor` `[B, n]` (float64): Scores that sum to 1 over the vertices of a graph; 0 where there is none.

    Raises:
        `ValueError`: a weight is negative, nan or infinite, or `damping` is outside its range.
    """
    if not 0 <= damping < 1:
        raise ValueError(f"damping={damping} is not at least 0 and below 1.")
    count, size, _ = weights.shape
    if mask is None:
        mask = torch.ones(count, size, dtype=torch.bool, device=weights.device)
    there = mask.to(torch.float64)
    walk = weights.to(torch.float64)
    if not mask.all():
        walk = walk.masked_fill(~(mask[:, :, None] & mask[:, None]), 0)
    total = walk.sum(2)
    if walk.numel() and not (walk.amin() >= 0 and total.isfinite().all()):
        raise ValueError("The weights of a graph must be finite and at least 0.")
    uniform = there / there.sum(1, keepdim=True).clamp(min=1)
    # I - damping · Pᵀ, with as few passes over the graphs as it takes: they are what costs.
    system = walk.mT * torch.where(total > 0, -damping / total, 0.0)[:, None]
    stuck = mask & (total == 0)
    if stuck.any():
        system -= damping * uniform[:, :, None] * stuck[:, None]
    system.diagonal(dim1=1, dim2=2).add_(1)
    return torch.linalg.solve(system, (1 - damping) * uniform[:, :, None])[:, :, 0]


def similarity_graphs(features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The graphs of B entities: cosines between the features of their posts, without negative ones and self-loops.

    Args:
        features (`torch.Tensor` `[B, n, d]`): Features of up to n posts each.
        mask (`torch.Tensor` `[B, n]`, *optional*): Which posts there are; default all.

    Returns:
        `torch.Tensor` `[B, n, n]` (float32), 0 where a post is not there.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    if mask is not None:
        unit = unit * mask[:, :, None]
    weights = (unit @ unit.mT).clamp_(min=0)
    weights.diagonal(dim1=1, dim2=2).zero_()
    return weights


def select_posts(
    features: torch.Tensor,
    groups: Sequence[Sequence[int]],
    k: int,
    *,
    damping: float = 0.85,
    graph_bytes: int = _GRAPH_BYTES,
) -> list[list[int]]:
    """The k posts of each entity with the highest PageRank in its similarity graph.

    Entities with about the same number of posts are computed together. One with n posts takes 32 n² bytes.

    Args:
        features (`torch.Tensor` `[P, d]`): Features of all posts, in one modality.
        groups (E sequences of `int`): The rows of each entity's posts; none is fine.
        k (`int`): How many to choose.
        damping (`float`): See [`pagerank`].
        graph_bytes (`int`): Memory for the graphs that are computed together.

    Returns:
        E lists of up to k rows, the highest score first.

    Raises:
        [`~hf_mel.errors.ScoreError`]: a feature is nan or infinite.
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
        scores = pagerank(similarity_graphs(features[rows.to(features.device)], mask), mask, damping=damping)
        scores = (scores * mask.sum(1, keepdim=True) * 10**_DIGITS).round().masked_fill(~mask, -1)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()
        for group, places in zip(batch, best, strict=True):
            chosen[group] = [groups[group][place] for place in places if place < len(groups[group])]
    return chosen


def check_features(features: torch.Tensor, names: Sequence[str] | None = None) -> None:
    """Checks that the features [P, d] of posts are numbers.

    Raises:
        [`~hf_mel.errors.ScoreError`]: a feature is nan or infinite; names the post, or without `names` its row.
    """
    wrong = (~features.isfinite().all(1)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ScoreError(
            "the features of the post are nan or infinite.",
            row=row if names is None else names[row],
            remedy="Look at the weights of the model, and at this post.",
        )


def random_posts(owner: str, posts: Sequence[int], k: int, *, seed: int = 0) -> list[int]:
    """k posts of an entity at random, the same for the same entity id and seed: the ablation of PageRank.

    Args:
        owner (`str`): The entity's id.
        posts (sequence of `int`): Its posts.
        k (`int`): How many to choose; all if there are fewer.
        seed (`int`): Seed of the choice.
    """
    return random.Random(f"{seed} {owner}").sample(list(posts), min(k, len(posts)))
