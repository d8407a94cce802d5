"""`rank` against plain NumPy over the whole score matrix."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf_mel.errors import KnowledgeBaseError, ScoreError, UnknownEntityError
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference import ranking
from hf_mel.inference.entity_sources import EncodedEntities, EntityPart, part_of_process
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.ranking import RankingResult, rank
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.spaces.mel_ranking.mel_ranking import ranks_from_ids
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model


class DotProduct:
    """Scores by inner product, and keeps the shape of every block it scored."""

    def __init__(self):
        self.blocks = []

    def score(self, mentions, entities):
        self.blocks.append((len(mentions["x"]), len(entities["x"])))
        return mentions["x"] @ entities["x"].T


def table(scores):
    """Encodings of M mentions and N entities whose inner products are exactly `scores` [M, N] (small integers)."""
    scores = torch.as_tensor(np.asarray(scores, dtype=np.float32))
    return {"x": scores}, source({"x": torch.eye(scores.shape[1])})


def source(encodings):
    return EncodedEntities([f"Q{i}" for i in range(len(encodings["x"]))], encodings)


def brute_force(scores, golds, k, tolerance=1e-6):
    """One mention at a time, one entity at a time."""
    top, best, worst = [], [], []
    for row, gold in zip(np.asarray(scores, dtype=np.float64), golds, strict=True):
        top.append(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k])
        margin = tolerance * max(1.0, abs(row[gold]))
        better = sum(1 for s in row if s > row[gold] + margin)
        equal = sum(1 for i, s in enumerate(row) if i != gold and abs(s - row[gold]) <= margin)
        best.append(1 + better)
        worst.append(1 + better + equal)
    return top, best, worst


# Budgets from "one mention and one entity at a time" to "all at once"; few values, so that ties abound.
budgets = st.sampled_from([1, 400, 2_000, 20_000, 2**29])
matrices = hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(-3, 3))


@settings(max_examples=200, deadline=None)
@given(matrices, budgets, st.integers(1, 12), st.data())
def test_chunks_and_batches_equal_brute_force(scores, budget, k, data):
    golds = data.draw(st.lists(st.integers(0, scores.shape[1] - 1), min_size=len(scores), max_size=len(scores)))
    mentions, entities = table(scores)
    result = rank(DotProduct(), mentions, entities, gold_rows=golds, top_k=k, byte_budget=budget)
    top, best, worst = brute_force(scores, golds, k)
    assert result.top_rows.tolist() == top
    assert result.top_scores.tolist() == [[row[i] for i in rows] for row, rows in zip(scores, top, strict=True)]
    assert result.gold_score.tolist() == [row[gold] for row, gold in zip(scores, golds, strict=True)]
    assert result.best_rank.tolist() == best
    assert result.worst_rank.tolist() == worst


class ThreadGroup(ranking.ProcessGroup):
    """Processes of a ranking as threads."""

    def _exchange(self, value):
        board, barrier = self.processes.board, self.processes.barrier
        board[self.index] = value
        barrier.wait()
        values = list(board)
        barrier.wait()
        return values

    def __init__(self, processes):
        super().__init__(processes)
        self.processes = processes


def rank_in_threads(count, source, **options):
    """Ranks with `count` threads, each with its part of the entities, and returns the result of each."""
    board, barrier = [None] * count, threading.Barrier(count, timeout=60)

    def run(index):
        processes = SimpleNamespace(process_index=index, num_processes=count, board=board, barrier=barrier)
        part = EntityPart(source, part_of_process(len(source), processes))
        return rank(DotProduct(), entity_chunks=part, processes=processes, **options)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


@settings(max_examples=100, deadline=None)
@given(matrices, budgets, st.integers(1, 12), st.integers(2, 5), st.data())
def test_any_number_of_processes_finds_what_one_finds(scores, budget, k, count, data):
    golds = data.draw(st.lists(st.integers(-1, scores.shape[1] - 1), min_size=len(scores), max_size=len(scores)))
    bonus = SparseScores.of_mentions([(np.array([0]), np.array([2.0]))] * len(scores))
    mentions, entities = table(scores)
    options = {"mention_encodings": mentions, "gold_rows": golds, "top_k": k, "byte_budget": budget, "added": bonus}
    whole = rank(DotProduct(), entity_chunks=entities, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "ProcessGroup", ThreadGroup)
        for result in rank_in_threads(count, entities, **options):
            for name in ("top_scores", "top_rows", "gold_score", "best_rank", "worst_rank"):
                torch.testing.assert_close(getattr(result, name), getattr(whole, name), rtol=0, atol=0, equal_nan=True)


def test_an_error_that_cannot_be_pickled_reaches_the_other_processes(monkeypatch):
    class OddError(Exception):
        def __init__(self, first, second):
            super().__init__(first)

    class Broken(EncodedEntities):
        def iter_chunks(self, *arguments, rows, **options):
            if rows.start:
                raise OddError("no memory", 1)
            return super().iter_chunks(*arguments, rows=rows, **options)

    monkeypatch.setattr(ranking, "ProcessGroup", ThreadGroup)
    mentions, entities = table([[1, 2, 3]])
    with pytest.raises(RuntimeError, match="OddError in another process: no memory"):
        rank_in_threads(2, Broken(entities.entity_ids, entities.tensors), mention_encodings=mentions)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 4), st.data())
def test_an_error_anywhere_ends_the_block_of_every_process_and_they_go_on_together(count, data):
    """Blocks and gathers are nested at random, the same in all processes, and each process may fail at one step."""
    steps = data.draw(st.lists(st.sampled_from(["open", "close", "gather"]), max_size=12))
    failing = data.draw(st.lists(st.none() | st.integers(0, len(steps)), min_size=count, max_size=count))
    board, barrier = [None] * count, threading.Barrier(count, timeout=60)

    def follow(group, numbered, fails):
        """Follows steps up to the end of a block."""
        for number, step in numbered:
            if number == fails:
                raise KeyError(f"{group.index} at {number}")
            if step == "close":
                return
            if step == "gather":
                assert group.gather((group.index, number)) == [(index, number) for index in range(count)]
            else:
                with group.raise_together():
                    follow(group, numbered, fails)

    def run(index):
        processes = SimpleNamespace(process_index=index, num_processes=count, board=board, barrier=barrier)
        group = ThreadGroup(processes)
        outcome = None
        try:
            with group.raise_together():
                follow(group, iter(enumerate(steps)), failing[index])
        except KeyError as error:
            outcome = error
        assert group.gather(index) == list(range(count))
        return outcome

    with ThreadPoolExecutor(count) as threads:
        outcomes = list(threads.map(run, range(count)))
    assert len({outcome is None for outcome in outcomes}) == 1


@settings(max_examples=100, deadline=None)
@given(matrices, budgets, st.data())
def test_the_order_of_the_entities_does_not_change_ranks(scores, budget, data):
    size = scores.shape[1]
    golds = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=len(scores), max_size=len(scores))))
    order = np.array(data.draw(st.permutations(range(size))))  # new row of each old row
    shuffled = np.empty_like(scores)
    shuffled[:, order] = scores
    plain = rank(DotProduct(), *table(scores), gold_rows=golds, byte_budget=budget)
    other = rank(DotProduct(), *table(shuffled), gold_rows=order[golds], byte_budget=budget)
    assert torch.equal(plain.best_rank, other.best_rank)
    assert torch.equal(plain.worst_rank, other.worst_rank)
    assert torch.equal(plain.top_scores, other.top_scores)


class TwoSteps:
    """Scores x·x' + y·y', the second only where it reaches the floor; for a cautious one, where |y|·|y'| does."""

    def __init__(self, cautious):
        self.cautious, self.pairs, self.left_out = cautious, 0, 0

    def quick_scores(self, mentions, entities):
        return mentions["x"] @ entities["x"].T

    def remaining_scores(self, mentions, entities, floor):
        rest = mentions["y"] @ entities["y"].T
        bound = mentions["y"].norm(dim=1)[:, None] * entities["y"].norm(dim=1) if self.cautious else rest
        below = bound < floor
        self.pairs += below.numel()
        self.left_out += int(below.sum())
        return rest.masked_fill(below, -torch.inf)


class Foreseeing(TwoSteps):
    """Knows |y'| of each entity, and so which pairs may reach a floor. It computes all pairs, also those that cannot."""

    pair_bound_encodings = ("x", "lengths")

    def __init__(self):
        super().__init__(cautious=True)

    def may_reach(self, mentions, entities, floor):
        return mentions["y"].norm(dim=1)[:, None] * entities["lengths"] >= floor

    def remaining_scores(self, mentions, entities, floor):
        return mentions["y"] @ entities["y"].T


@dataclass
class Converting(EncodedEntities):
    """Entities that are converted when they are read. `read` has the rows whose vectors y were read."""

    converts = True
    read: list[int] = field(default_factory=list)

    def iter_chunks(self, chunk_size, *, rows=None, as_stored=False, names=None):
        for first, chunk in super().iter_chunks(chunk_size, rows=rows, as_stored=as_stored, names=names):
            if names is None and chunk_size > 1:
                self.read += range(first, first + len(chunk["y"]))
            yield first, chunk

    def encodings(self, indices, *, as_stored=False, names=None):
        if names is not None and "y" in names:
            self.read += list(indices)
        return super().encodings(indices, as_stored=as_stored, names=names)


@settings(max_examples=300, deadline=None)
@given(matrices, budgets, st.integers(1, 12), st.sampled_from(["golds", "among", "floor"]), st.data())
def test_a_source_that_converts_is_read_where_pairs_may_matter_and_gives_the_same(scores, budget, k, form, data):
    count, size = scores.shape
    added, quick = (data.draw(hnp.arrays(np.int64, scores.shape, elements=st.integers(-2, 2))) for _ in range(2))
    lengths = torch.from_numpy(data.draw(hnp.arrays(np.int64, size, elements=st.integers(0, 3)))).float()
    mentions = {"x": torch.tensor(quick).float(), "y": torch.tensor(scores - quick).float()}
    encodings = {"x": torch.eye(size), "y": torch.diag(lengths), "lengths": lengths}
    expected = quick + added + (scores - quick) * lengths.numpy()
    options = {"top_k": k, "byte_budget": budget, "added": sparse(added)}
    kept = np.ones(scores.shape, bool)
    if form == "golds":
        options["gold_rows"] = data.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count))
    elif form == "among":
        kept = data.draw(hnp.arrays(bool, scores.shape))
        options["among"] = torch.from_numpy(kept)
    else:
        options["floor"] = data.draw(st.integers(-3, 3))
        kept = expected >= options["floor"]
    entities = Converting([f"Q{row}" for row in range(size)], encodings)
    result = rank(Foreseeing(), mentions, entities, **options)
    for row, chosen, rows, tops in zip(expected, kept, result.top_rows, result.top_scores.tolist(), strict=True):
        best = sorted(np.flatnonzero(chosen), key=lambda i: (-row[i], i))[:k]
        assert rows[: len(best)].tolist() == best
        assert tops[: len(best)] == [row[i] for i in best]
    if form == "golds":
        _, best, worst = brute_force(expected, options["gold_rows"], k)
        assert (result.best_rank.tolist(), result.worst_rank.tolist()) == (best, worst)


@pytest.mark.parametrize("converts", [True, False])
def test_the_rows_that_cannot_be_among_the_best_are_not_read(converts):
    size = 50
    lengths = torch.where(torch.arange(size) % 5 == 0, 1.0, 0.1)
    encodings = {"x": torch.zeros(size, 2), "y": lengths[:, None] * torch.ones(size, 2), "lengths": 1.5 * lengths}
    entities = Converting([f"Q{row}" for row in range(size)], encodings)
    entities.converts = converts
    result = rank(Foreseeing(), {"x": torch.zeros(1, 2), "y": torch.ones(1, 2)}, entities, top_k=2, byte_budget=3000)
    assert result.top_rows.tolist() == [[0, 5]]
    # The first chunk gives the threshold. Of later ones, only the rows that may reach it are read.
    assert {row for row in entities.read if row >= 20} == set(range(20, size, 5 if converts else 1))


def sparse(matrix):
    """The entries of a matrix [M, N] that are not 0."""
    rows = [np.flatnonzero(row) for row in matrix]
    return SparseScores.of_mentions([(at, row[at].astype(np.float32)) for at, row in zip(rows, matrix, strict=True)])


@settings(max_examples=200, deadline=None)
@given(matrices, budgets, st.integers(1, 12), st.sampled_from(["plain", "two steps"]), st.data())
def test_added_scores_are_those_of_a_matrix_that_is_added(scores, budget, k, form, data):
    count, size = scores.shape
    golds = data.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count))
    added, quick = (
        data.draw(hnp.arrays(np.int64, scores.shape, elements=st.sampled_from([0, 0, 0, 1, 2, -2]))) for _ in range(2)
    )
    mentions = {"x": torch.tensor(quick).float(), "y": torch.tensor(scores - quick).float()}
    model, entities = TwoSteps(cautious=True), source({"x": torch.eye(size), "y": torch.eye(size)})
    if form == "plain":
        model, (mentions, entities) = DotProduct(), table(scores)
    result = rank(model, mentions, entities, gold_rows=golds, top_k=k, byte_budget=budget, added=sparse(added))
    top, best, worst = brute_force(scores + added, golds, k)
    assert result.top_rows.tolist() == top
    assert result.top_scores.tolist() == [
        [row[i] for i in rows] for row, rows in zip(scores + added, top, strict=True)
    ]
    assert result.best_rank.tolist() == best
    assert result.worst_rank.tolist() == worst


@settings(max_examples=200, deadline=None)
@given(matrices, budgets, st.integers(1, 12), st.sampled_from(["plain", "cautious", "exact"]), st.data())
def test_only_the_chosen_pairs_are_ranked(scores, budget, k, form, data):
    size = scores.shape[1]
    among = data.draw(hnp.arrays(bool, scores.shape))
    added, quick = (data.draw(hnp.arrays(np.int64, scores.shape, elements=st.integers(-2, 2))) for _ in range(2))
    mentions = {"x": torch.tensor(quick).float(), "y": torch.tensor(scores - quick).float()}
    model, entities = TwoSteps(form == "cautious"), source({"x": torch.eye(size), "y": torch.eye(size)})
    if form == "plain":
        model, (mentions, entities) = DotProduct(), table(scores)
    options = {"top_k": k, "byte_budget": budget, "added": sparse(added), "among": torch.from_numpy(among)}
    result = rank(model, mentions, entities, **options)
    for row, chosen, rows, tops in zip(
        scores + added, among, result.top_rows, result.top_scores.tolist(), strict=True
    ):
        best = sorted(np.flatnonzero(chosen), key=lambda i: (-row[i], i))[:k]
        assert rows[: len(best)].tolist() == best
        assert tops == [row[i] for i in best] + [-np.inf] * (min(k, size) - len(best))


@given(matrices, st.data())
def test_sparse_scores_are_those_of_their_matrix(matrix, data):
    count, size = matrix.shape
    scores = sparse(matrix)
    rows = np.array(data.draw(st.lists(st.integers(0, size - 1), unique=True)), dtype=np.int64)
    mentions = data.draw(st.lists(st.integers(0, count - 1)))

    def dense(part, width):
        block = torch.zeros(len(part), width)
        part.add_to(block, 0, 0)
        return block.tolist()

    assert dense(scores, size) == matrix.tolist()
    assert dense(scores * 3, size) == (matrix * 3).tolist()
    assert dense(scores.select(mentions), size) == matrix[mentions].tolist()
    assert dense(scores.among(np.sort(rows)), len(rows)) == matrix[:, np.sort(rows)].tolist()
    assert all(scores.of(m, rows).tolist() == matrix[m, rows].tolist() for m in range(count))


@settings(max_examples=200, deadline=None)
@given(matrices, budgets, st.integers(1, 12), st.booleans(), st.data())
def test_skipping_pairs_below_the_floor_changes_no_rank(scores, budget, k, cautious, data):
    count, size = scores.shape
    golds = data.draw(st.none() | st.lists(st.integers(-1, size - 1), min_size=count, max_size=count))
    quick = data.draw(hnp.arrays(np.int64, scores.shape, elements=st.integers(-3, 3)))
    mentions = {"x": torch.tensor(quick).float(), "y": torch.tensor(scores - quick).float()}
    entities = source({"x": torch.eye(size), "y": torch.eye(size)})
    result = rank(TwoSteps(cautious), mentions, entities, gold_rows=golds, top_k=k, byte_budget=budget)
    top, best, worst = brute_force(scores, [max(gold, 0) for gold in golds or [0] * count], k)
    assert result.top_rows.tolist() == top
    assert result.top_scores.tolist() == [[row[i] for i in rows] for row, rows in zip(scores, top, strict=True)]
    if golds is not None:
        has_gold = [gold >= 0 for gold in golds]
        assert result.best_rank.tolist() == [rank * counts for rank, counts in zip(best, has_gold, strict=True)]
        assert result.worst_rank.tolist() == [rank * counts for rank, counts in zip(worst, has_gold, strict=True)]


def test_most_pairs_below_the_floor_are_skipped():
    generator = torch.Generator().manual_seed(0)
    mentions = {name: torch.randn(9, 8, generator=generator) for name in "xy"}
    entities = {name: torch.randn(5_000, 8, generator=generator) for name in "xy"}
    mentions["y"] /= 8
    model = TwoSteps(cautious=True)
    rank(model, mentions, source(entities), gold_rows=range(9), top_k=5, byte_budget=300_000)
    assert model.left_out < model.pairs
    easy = TwoSteps(cautious=True)
    rank(easy, mentions, source(entities), top_k=5, byte_budget=300_000)  # a gold that ranks low keeps pairs in
    assert easy.left_out > 0.9 * easy.pairs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["x", "y"])
def test_a_partial_score_that_is_not_finite_is_named(value, part):
    mentions, entities = {name: torch.ones(5, 1) for name in "xy"}, {name: torch.ones(7, 1) for name in "xy"}
    entities[part][4] = value
    with pytest.raises(ScoreError, match="mention 0 and entity row 4"):
        rank(TwoSteps(cautious=False), mentions, source(entities), top_k=2)
    with pytest.raises(ScoreError, match=r"mention \d and entity row 4"):
        rank(TwoSteps(cautious=False), mentions, source(entities), gold_rows=[-1, -1, 0, 4, -1], top_k=2)


def test_random_scores_in_chunks_of_any_shape_equal_brute_force():
    generator = torch.Generator().manual_seed(0)
    mentions = {"x": torch.randn(23, 16, generator=generator)}
    entities = torch.randn(211, 16, generator=generator)
    entities[100:105] = entities[7]  # duplicates, which rounding may pull apart between chunks
    golds = torch.randint(0, 211, (23,), generator=generator)
    golds[:5] = 7
    scores = mentions["x"].double() @ entities.double().T
    top, best, worst = brute_force(scores.numpy(), golds.tolist(), 5, tolerance=1e-6)
    assert max(worst[i] - best[i] for i in range(5)) == 5
    for budget in (1, 3_000, 30_000, 300_000, 2**29):
        model = DotProduct()
        result = rank(model, mentions, source({"x": entities}), gold_rows=golds, top_k=5, byte_budget=budget)
        assert result.best_rank.tolist() == best
        assert result.worst_rank.tolist() == worst
        duplicates = {7, *range(100, 105)}
        for row, expected in zip(result.top_rows.tolist(), top, strict=True):
            if not duplicates & set(expected):
                assert row == expected


def test_tolerance_is_relative_above_one_and_absolute_below():
    mentions, entities = {"x": torch.eye(3)}, torch.zeros(4, 3)
    entities[:, 0] = torch.tensor([0.5, 0.5 + 8e-7, 0.5 + 4e-6, 0.5 - 8e-7])
    entities[:, 1] = torch.tensor([1e4, 1e4 + 5e-3, 1e4 + 0.1, 1e4 - 5e-3])
    entities[:, 2] = torch.tensor([-1e4, -1e4 + 5e-3, -1e4 + 0.1, -1e4 - 5e-3])
    result = rank(DotProduct(), mentions, source({"x": entities}), gold_rows=[0, 0, 0])
    assert result.best_rank.tolist() == [2, 2, 2]
    assert result.worst_rank.tolist() == [4, 4, 4]
    wide = rank(DotProduct(), mentions, source({"x": entities}), gold_rows=[0, 0, 0], tie_tolerance=1e-4)
    assert wide.best_rank.tolist() == [1, 1, 1]
    assert wide.worst_rank.tolist() == [4, 4, 4]


def test_ties_as_the_metric_defines_them():
    generator = np.random.default_rng(0)
    scores = generator.integers(-5, 5, (30, 12))
    golds = generator.integers(0, 12, 30)
    result = rank(DotProduct(), *table(scores), gold_rows=golds, top_k=12)
    best, worst = ranks_from_ids(
        [[f"Q{i}" for i in rows] for rows in result.top_rows.tolist()],
        [f"Q{gold}" for gold in golds],
        result.top_scores.tolist(),
    )
    assert result.best_rank.tolist() == best.tolist()
    assert result.worst_rank.tolist() == worst.tolist()


def test_equal_scores_of_all_entities_give_ranks_from_first_to_last():
    result = rank(DotProduct(), *table(np.zeros((4, 9))), gold_rows=[0, 3, 8, 8], top_k=3, byte_budget=900)
    assert result.best_rank.tolist() == [1] * 4
    assert result.worst_rank.tolist() == [9] * 4
    assert result.top_rows.tolist() == [[0, 1, 2]] * 4


def test_a_mention_without_a_gold_has_no_rank():
    result = rank(DotProduct(), *table([[3, 2, 1], [1, 2, 3]]), gold_rows=[-1, 0])
    assert result.best_rank.tolist() == result.worst_rank.tolist() == [0, 3]
    assert torch.isnan(result.gold_score).tolist() == [True, False]
    without = rank(DotProduct(), *table([[3, 2, 1]]))
    assert without.gold_score is without.best_rank is without.worst_rank is None


def test_one_entity_and_no_mentions_are_ranked():
    one = rank(DotProduct(), *table([[5]]), gold_rows=[0], top_k=10)
    assert (one.top_scores.tolist(), one.top_rows.tolist()) == ([[5]], [[0]])
    assert one.best_rank.tolist() == one.worst_rank.tolist() == [1]
    none = rank(DotProduct(), *table(np.zeros((0, 4))), gold_rows=[], top_k=2)
    assert none.top_scores.shape == none.top_rows.shape == (0, 2)
    assert none.best_rank.shape == none.worst_rank.shape == none.gold_score.shape == (0,)
    assert none.top_rows.dtype == none.best_rank.dtype == torch.int64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("budget", [1, 2**29])
def test_a_score_that_cannot_be_ranked_is_named(value, budget):
    scores = torch.zeros(5, 7)
    scores[3, 4] = value
    mentions = {"x": torch.arange(5.0)[:, None]}
    entities = {"x": torch.arange(7.0)[:, None]}

    def look_up(mention, entity):
        return scores[mention["x"][:, 0].long()][:, entity["x"][:, 0].long()]

    with pytest.raises(ScoreError, match="mention 3 and entity row 4"):
        rank(None, mentions, source(entities), byte_budget=budget, score=look_up)


def test_wrong_arguments_are_refused():
    mentions, entities = table([[1, 2], [2, 1]])
    with pytest.raises(ValueError, match="top_k"):
        rank(DotProduct(), mentions, entities, top_k=0)
    with pytest.raises(ValueError, match="2 mentions"):
        rank(DotProduct(), mentions, entities, gold_rows=[0])
    with pytest.raises(UnknownEntityError, match=r"row 1: Gold row 2 .* 2 entities"):
        rank(DotProduct(), mentions, entities, gold_rows=[0, 2])
    with pytest.raises(KnowledgeBaseError, match="no entities"):
        rank(DotProduct(), mentions, source({"x": torch.empty(0, 2)}))
    with pytest.raises(ScoreError, match="2 mentions and 2 entities"):
        rank(DotProduct(), mentions, entities, score=lambda m, e: torch.zeros(1, 2))
    with pytest.raises(ValueError, match="3 entity ids but 2"):
        EncodedEntities(["a", "b", "c"], {"x": torch.zeros(2, 2)})


def test_a_missing_chunk_of_entities_is_an_error():
    class Gap(EncodedEntities):
        def iter_chunks(self, chunk_size, **options):
            chunks = list(super().iter_chunks(1, **options))
            return iter(chunks[:1] + chunks[2:])

    with pytest.raises(KnowledgeBaseError, match="row 1 is missing"):
        rank(DotProduct(), {"x": torch.ones(1, 2)}, Gap(["a", "b", "c"], {"x": torch.ones(3, 2)}))


@pytest.mark.parametrize("budget", [200_000, 1_000_000])
def test_blocks_stay_within_the_budget(budget):
    mentions, width = {"x": torch.ones(300, 8)}, 8 * 4
    for size in (10, 500, 3_000):
        model = DotProduct()
        rank(model, mentions, source({"x": torch.ones(size, 8)}), byte_budget=budget)
        rows, columns = (max(axis) for axis in zip(*model.blocks, strict=True))
        # The entities of the chunk, and a scorer that holds two dozen tensors of the block.
        assert columns * width + rows * columns * 4 * 24 <= budget
        assert sum(m * n for m, n in model.blocks) == 300 * size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_batches():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    generator = torch.Generator().manual_seed(0)
    entities = source({"x": torch.randn(18_000, 256, generator=generator)})
    mentions = {"x": torch.randn(5_000, 256, generator=generator)}  # 43 batches; all scores would be 360 MB
    rank(DotProduct(), {"x": mentions["x"][:300]}, entities, gold_rows=[0] * 300, byte_budget=2**26)
    before = resident()
    rank(DotProduct(), mentions, entities, gold_rows=[0] * 5_000, byte_budget=2**26)
    assert resident() - before < 2**27


def test_scores_are_not_computed_under_autocast():
    mentions, entities = {"x": torch.tensor([[1.0, 2**-12]])}, {"x": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = rank(DotProduct(), mentions, source(entities), gold_rows=[0])
    assert (result.best_rank.item(), result.worst_rank.item()) == (2, 2)


def test_result_is_on_the_cpu_and_free_of_gradients():
    mentions, entities = table([[1, 2]])
    mentions["x"].requires_grad_()
    result = rank(DotProduct(), mentions, entities, gold_rows=[0])
    assert isinstance(result, RankingResult)
    assert not result.top_scores.requires_grad
    assert ranking.rank is rank


_TWO_PROCESSES = """
import sys
import torch
from accelerate import PartialState
from hf_mel.errors import ScoreError
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.inference.entity_sources import EntityPart, part_of_process
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.ranking import rank
from tests.inference.test_ranking import TwoSteps, source
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model

processes = PartialState(cpu=True)
data = torch.load(sys.argv[1])
results = []
for size in (1, 2, 37):
    entities = source({name: tensor[:size] for name, tensor in data["entities"].items()})
    part = EntityPart(entities, part_of_process(size, processes))
    golds = [min(gold, size - 1) for gold in data["golds"]]
    results.append(vars(rank(TwoSteps(True), data["mentions"], part, gold_rows=golds, top_k=6, processes=processes)))
mentions, entities = toy_mentions(20, entities=12, nil_every=5), toy_entities(15)
model, processor = toy_model(), ToyProcessor()
for kb in (entities, KnowledgeBase.from_pretrained(sys.argv[2])):
    result = FullEvaluator(kb, progress=False)(ModelInputs(model, processor), mentions, processes=processes)
    results.append(vars(result.ranking) | {"metrics": result.metrics})
data["entities"]["x"][30] = float("nan")  # of the second process
part = EntityPart(source(data["entities"]), part_of_process(37, processes))
try:
    rank(TwoSteps(True), data["mentions"], part, processes=processes)
except ScoreError as error:
    results.append(str(error))
torch.save(results, f"{sys.argv[3]}{processes.process_index}.pt")
processes.destroy_process_group()
"""


def test_two_processes_find_what_one_finds(tmp_path):
    generator = torch.Generator().manual_seed(0)
    mentions = {name: torch.randint(-2, 3, (11, 4), generator=generator).float() for name in "xy"}
    entities = {name: torch.randint(-2, 3, (37, 4), generator=generator).float() for name in "xy"}
    golds = [*torch.randint(0, 37, (9,), generator=generator).tolist(), -1, 36]
    torch.save({"mentions": mentions, "entities": entities, "golds": golds}, tmp_path / "data.pt")
    model, processor = toy_model(), ToyProcessor()
    KnowledgeBase.build(toy_entities(15), model, processor, output=tmp_path / "kb", progress=False)
    program = tmp_path / "program.py"
    program.write_text(_TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    root = Path(__file__).parents[2]
    subprocess.run(
        [*command, str(tmp_path / "data.pt"), str(tmp_path / "kb"), str(tmp_path / "results")],
        check=True,
        env={**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
    )
    result = FullEvaluator(toy_entities(15), progress=False)(
        ModelInputs(model, processor), toy_mentions(20, entities=12, nil_every=5)
    )
    for process in range(2):
        *ranked, error = torch.load(tmp_path / f"results{process}.pt", weights_only=False)
        assert "entity row 30 is nan" in error
        for size, result_of_process in zip((1, 2, 37), ranked[:3], strict=True):
            whole = source({name: tensor[:size] for name, tensor in entities.items()})
            rows = [min(gold, size - 1) for gold in golds]
            for name, column in vars(rank(TwoSteps(True), mentions, whole, gold_rows=rows, top_k=6)).items():
                torch.testing.assert_close(result_of_process[name], column, rtol=0, atol=0, equal_nan=True)
        for result_of_process in ranked[3:]:
            assert result_of_process["metrics"] == result.metrics
            for name, column in vars(result.ranking).items():
                torch.testing.assert_close(result_of_process[name], column, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_of_another_type_are_ranked_as_float32(dtype):
    generator = torch.Generator().manual_seed(3)
    mentions = {"x": torch.randn(5, 4, generator=generator)}
    entities = {"x": torch.randn(9, 4, generator=generator)}
    result = rank(
        None, mentions, source(entities), gold_rows=[0, 3, -1, 8, 2], score=lambda m, e: (m["x"] @ e["x"].T).to(dtype)
    )
    scores = (mentions["x"] @ entities["x"].T).to(dtype).float()
    torch.testing.assert_close(result.top_scores, scores.sort(descending=True, dim=1).values)
    halves = {name: tensor.half() for name, tensor in entities.items()}
    in_float = rank(None, mentions, source(halves), score=lambda m, e: m["x"] @ e["x"].T)
    torch.testing.assert_close(
        in_float.top_scores, (mentions["x"] @ halves["x"].float().T).sort(descending=True, dim=1).values
    )


@pytest.mark.parametrize("takes_half", [True, False])
def test_half_precision_is_converted_for_a_model_that_does_not_take_it(takes_half):
    class Watched(DotProduct):
        takes_half_precision = takes_half
        dtypes: set = set()

        def score(self, mentions, entities):
            self.dtypes.add(entities["x"].dtype)
            return super().score(mentions, {"x": entities["x"].float()})

    mentions, entities = table(np.arange(12).reshape(3, 4))
    halves = source({"x": entities.tensors["x"].half()})
    model = Watched()
    assert rank(model, mentions, halves).top_rows.tolist() == [[3, 2, 1, 0]] * 3
    assert model.dtypes == {torch.float16 if takes_half else torch.float32}
    model.dtypes.clear()
    rank(model, mentions, halves, score=model.score)  # a score that is given says nothing about half precision
    assert model.dtypes == {torch.float32}
