"""PageRank and the choice of posts, against networkx and plain loops."""

from __future__ import annotations

import math

import networkx
import pytest
import torch

from hf_mel.errors import ScoreError
from hf_mel.inference.features.pagerank import check_features, pagerank, random_posts, select_posts, similarity_graphs


def graph_scores(weights: torch.Tensor, damping: float) -> list[float]:
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(weights)))
    for i, row in enumerate(weights.tolist()):
        graph.add_weighted_edges_from((i, j, weight) for j, weight in enumerate(row) if weight)
    scores = networkx.pagerank(graph, alpha=damping, tol=1e-13, max_iter=1000)
    return [scores[i] for i in range(len(weights))]


def plain_cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def plain_choice(features: torch.Tensor, posts: list[int], k: int) -> list[int]:
    """The definition in loops: cosines, networkx, sort."""
    vectors = [features[post].tolist() for post in posts]
    weights = torch.tensor(
        [[max(plain_cosine(a, b), 0.0) * (i != j) for j, b in enumerate(vectors)] for i, a in enumerate(vectors)],
        dtype=torch.float64,
    ).view(len(posts), len(posts))
    scores = graph_scores(weights, 0.85) if posts else []
    return [posts[i] for i in sorted(range(len(posts)), key=lambda i: -round(scores[i] * len(posts), 6))][:k]


@pytest.mark.parametrize("damping", [0.0, 0.5, 0.85])
def test_pagerank_is_that_of_networkx(damping):
    generator = torch.Generator().manual_seed(1)
    sizes = [9, 1, 4, 7, 9, 2]
    weights = torch.rand(len(sizes), 9, 9, generator=generator, dtype=torch.float64)
    weights *= torch.rand(weights.shape, generator=generator) < 0.4  # asymmetric, sparse, with self-loops
    weights[0, 3] = 0  # a vertex without edges out of it
    weights[4] = 0
    mask = torch.tensor([[place < size for place in range(9)] for size in sizes])
    scores = pagerank(weights, mask, damping=damping)
    for k, size in enumerate(sizes):
        expected = graph_scores(weights[k, :size, :size], damping)
        assert scores[k, :size].tolist() == pytest.approx(expected, abs=1e-9)
        assert scores[k, size:].tolist() == [0] * (9 - size)
    torch.testing.assert_close(scores.sum(1), torch.ones(len(sizes), dtype=torch.float64))


def test_pagerank_ignores_masked_vertices_and_is_zero_without_any():
    """Vertices may be missing anywhere, and a graph may have none."""
    weights = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True, True, False]])
    vertices = [0, 2, 3]
    scores = pagerank(weights, mask)
    assert scores[0, vertices].tolist() == pytest.approx(
        graph_scores(weights[0][vertices][:, vertices], 0.85), abs=1e-9
    )
    assert pagerank(weights, torch.zeros(1, 5, dtype=torch.bool)).tolist() == [[0.0] * 5]


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_negative_and_infinite_weights_are_refused(weight):
    weights = torch.ones(1, 2, 2)
    weights[0, 0, 1] = weight
    with pytest.raises(ValueError, match="finite and at least 0"):
        pagerank(weights)
    assert pagerank(weights, torch.tensor([[True, False]])).tolist() == [[1.0, 0.0]]  # not a vertex


def test_a_damping_of_one_is_refused():
    with pytest.raises(ValueError, match="damping=1"):
        pagerank(torch.ones(1, 2, 2), damping=1)


def test_graphs_have_no_negative_edges_and_no_loops():
    features = torch.tensor([[[1.0, 0.0], [-1.0, 0.1], [3.0, 3.0], [0.0, 0.0]]])
    weights = similarity_graphs(features)[0]
    vectors = features[0].tolist()
    expected = [
        [max(plain_cosine(a, b), 0.0) * (i != j) for j, b in enumerate(vectors)] for i, a in enumerate(vectors)
    ]
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-6, rtol=0)
    assert weights[0, 1] == 0
    assert weights[3].tolist() == [0, 0, 0, 0]
    mask = torch.tensor([[True, True, False, True]])
    assert similarity_graphs(features, mask)[0, 2].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("graph_bytes", [1, 32 * 36 * 3, 2**28])
def test_chosen_posts_are_those_of_the_definition(graph_bytes):
    """Whatever is computed together; 0, 1 and many posts; interleaved rows."""
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
    groups = [[0, 2, 4, 6, 8, 10], [], [1], [3, 5, 7, 9, 11, 13, 15], [39, 38, 37], list(range(12, 30, 3)), []]
    chosen = select_posts(features, groups, 4, graph_bytes=graph_bytes)
    assert chosen == [plain_choice(features, group, 4) for group in groups]
    assert [len(each) for each in chosen] == [4, 0, 1, 4, 3, 4, 0]


def test_chosen_posts_do_not_depend_on_the_order_of_the_posts():
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(4))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5)).tolist()
    straight = select_posts(features, [list(range(12))], 5)[0]
    assert select_posts(features, [order], 5)[0] == straight


def test_equally_central_posts_keep_their_order():
    same = torch.tensor([[0.3, 0.4]]).repeat(6, 1)
    assert select_posts(same, [[4, 1, 5, 0]], 3) == [[4, 1, 5]]
    # Rounding of encoders: the same up to a few last bits.
    noisy = same + 1e-8 * torch.arange(12).view(6, 2)
    assert select_posts(noisy, [[4, 1, 5, 0]], 3) == [[4, 1, 5]]
    unrelated = torch.eye(4)
    assert select_posts(unrelated, [[0, 1, 2, 3]], 2) == [[0, 1]]
    many = same[:1].repeat(500, 1)  # a sort that is not stable keeps the order of a few
    assert select_posts(many, [range(499, -1, -1)], 20) == [list(range(499, 479, -1))]


def test_a_post_unlike_the_others_comes_last():
    features = torch.tensor([[-1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [1.0, -0.1]])
    chosen = select_posts(features, [[0, 1, 2, 3]], 4)[0]
    assert chosen[0] == 2
    assert chosen[-1] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_name_their_post(value):
    features = torch.ones(3, 2)
    features[1, 0] = value
    with pytest.raises(ScoreError, match="row post-7: The features of the post"):
        check_features(features, ["post-3", "post-7", "post-9"])
    with pytest.raises(ScoreError, match="row 1"):
        select_posts(features, [[0]], 2)


def test_zero_posts_to_choose_are_refused():
    with pytest.raises(ValueError, match="k=0"):
        select_posts(torch.ones(1, 2), [[0]], 0)


def test_random_choice_depends_on_entity_and_seed_alone():
    posts = list(range(100, 130))
    chosen = random_posts("Q1", posts, 10)
    assert chosen == random_posts("Q1", posts, 10)
    assert len(set(chosen)) == 10
    assert set(chosen) <= set(posts)
    assert random_posts("Q2", posts, 10) != chosen
    assert random_posts("Q1", posts, 10, seed=1) != chosen
    assert sorted(random_posts("Q1", [4, 2], 10)) == [2, 4]
    counts = [0] * 10
    for number in range(2000):
        for post in random_posts(f"Q{number}", range(10), 3):
            counts[post] += 1
    assert min(counts) > 500  # 600 expected, standard deviation 20
