"""Tests of the candidate protocol against counting in plain loops."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.candidates.lists import CandidateLists
from hf_mel.errors import DataFormatError, RecipeError, ScoreError, UnknownEntityError
from hf_mel.evaluation.candidate_evaluator import CANDIDATE_WEIGHTS, END_TO_END, GOLD_ADDED, CandidateEvaluator
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.evaluation.tables import orders_table, results_table
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.reranking import score_listed, score_pairs
from hf_mel.schema import NIL
from tests.toy import ToyPairProcessor, ToyProcessor, toy_entities, toy_mentions, toy_model, toy_reranker
from tests.toy_documents import ToyDocumentProcessor, toy_document_reranker, toy_documents

ENTITIES, MENTIONS = toy_entities(12), toy_mentions(12, nil_every=5)
GOLDS = list(MENTIONS["entity_id"])
PROCESSOR = ToyPairProcessor()


class TableReranker(torch.nn.Module):
    """Scores the pair of mention m and entity q with `table[m, q]`. Its tensors hold the numbers m and q."""

    example_unit, pairs_are_independent = "mention", True

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, pair_ids, pair_mask, pair_context, **_):
        return {"scores": self.table[pair_ids[..., 0], pair_ids[..., 1]].masked_fill(~pair_mask, -torch.inf)}


def number_processor(mentions=None, entities=None, pairs=None):
    width = max(len(listed) for _, listed in pairs)
    ids = torch.zeros(len(pairs), width, 2, dtype=torch.long)
    mask = torch.zeros(len(pairs), width, dtype=torch.bool)
    for i, (mention, listed) in enumerate(pairs):
        for j, entity in enumerate(listed):
            ids[i, j] = torch.tensor([int(mention["mention_id"][1:]), int(entity["entity_id"][1:]) - 1])
            mask[i, j] = True
    return {"pair_ids": ids, "pair_mask": mask, "pair_context": torch.zeros(len(pairs), dtype=torch.long)}


def lists_of(rows, scores=None) -> CandidateLists:
    ids = [[f"Q{row + 1}" for row in listed] for listed in rows]
    scores = [[float(-c) for c in range(len(listed))] for listed in rows] if scores is None else scores
    return CandidateLists(list(MENTIONS["mention_id"]), ids, {"here": scores}, {"source": "here"})


ROWS = st.lists(st.lists(st.integers(0, 11), max_size=6, unique=True), min_size=12, max_size=12)


@settings(max_examples=25, deadline=None)
@given(ROWS, st.integers(0, 2**16))
def test_both_protocols_agree_with_a_double_loop(rows, seed):
    table = torch.randint(0, 5, (12, 12), generator=torch.Generator().manual_seed(seed)).float()  # with ties
    result = CandidateEvaluator(ENTITIES, ks=(1, 3), progress=False)(
        ModelInputs(TableReranker(table), number_processor), MENTIONS, lists_of(rows)
    )
    for protocol in (END_TO_END, GOLD_ADDED):
        reciprocal, source_reciprocal, hits, recall = [], [], 0, 0
        for i, gold in enumerate(GOLDS):
            if gold == NIL:
                continue
            row = int(gold[1:]) - 1
            listed = list(rows[i])
            recall += row in listed
            source_reciprocal.append(1 / (listed.index(row) + 1) if row in listed else 0)
            if protocol == GOLD_ADDED and row not in listed:
                listed.append(row)
                source_reciprocal[-1] = 1 / len(listed)
            if row not in listed:
                reciprocal.append(0)
                continue
            better = sum(table[i, other] > table[i, row] for other in listed)
            equal = sum(table[i, other] == table[i, row] for other in listed) - 1
            reciprocal.append(1 / float(1 + better + equal / 2))
            hits += 1 + better + equal / 2 <= 1
        orders = result.orders[protocol]
        assert orders["reranker"]["metrics"]["mrr"] == pytest.approx(np.mean(reciprocal))
        assert orders["reranker"]["metrics"]["hits@1"] == pytest.approx(float(hits) / len(reciprocal))
        assert orders["candidates: here"]["metrics"]["mrr"] == pytest.approx(np.mean(source_reciprocal))
        longest = max(map(len, rows))
        assert result.setting["candidates"]["recall"][f"recall@{longest}"] == pytest.approx(recall / len(reciprocal))
    assert result.metrics == result.orders[END_TO_END]["reranker"]["metrics"]


@pytest.mark.parametrize("retrieved", [True, False])
def test_a_constant_model_is_at_chance(retrieved):
    """The position of the gold reveals nothing, whether it was retrieved in the first place or added."""
    rows = [[] for _ in GOLDS]
    for i, gold in enumerate(GOLDS):
        row = 0 if gold == NIL else int(gold[1:]) - 1
        others = [other for other in range(12) if other != row][:4]
        rows[i] = [row, *others] if retrieved else others
    result = CandidateEvaluator(ENTITIES, progress=False)(
        ModelInputs(TableReranker(torch.zeros(12, 12)), number_processor), MENTIONS, lists_of(rows)
    )
    added = result.orders[GOLD_ADDED]["reranker"]["metrics"]
    assert added["mr"] == 3  # of five
    assert added["hits@1"] == 0
    end_to_end = result.orders[END_TO_END]["reranker"]["metrics"]
    assert end_to_end["num_missed"] == (0 if retrieved else end_to_end["num_ranked"])


def test_the_model_gets_candidates_in_an_order_that_does_not_reveal_the_gold():
    seen = []

    def spy(mentions=None, entities=None, pairs=None):
        seen.extend((m["mention_id"], [e["entity_id"] for e in listed]) for m, listed in pairs)
        return number_processor(pairs=pairs)

    model = TableReranker(torch.zeros(12, 12))
    model.pairs_are_independent = False
    CandidateEvaluator(ENTITIES, progress=False)(ModelInputs(model, spy), MENTIONS, lists_of([[9, 3, 5]] * 12))
    assert all(listed == sorted(listed) for _, listed in seen)


@pytest.mark.parametrize("independent", [True, False])
def test_plain_and_joint_ranking_with_and_without_the_added_gold(independent):
    model = toy_reranker(unit="context", independent=independent)
    rows = [sorted({(3 * i + c) % 12 for c in range(i % 5)}) for i in range(12)]
    result = CandidateEvaluator(ENTITIES, progress=False, batch_size=5)(
        ModelInputs(model, PROCESSOR), MENTIONS, lists_of(rows)
    )
    assert result.order == "reranker, jointly"
    for protocol in (END_TO_END, GOLD_ADDED):
        listed = [list(candidates) for candidates in rows]
        for candidates, gold in zip(listed, GOLDS, strict=True):
            if protocol == GOLD_ADDED and gold != NIL and int(gold[1:]) - 1 not in candidates:
                candidates.append(int(gold[1:]) - 1)
        width = max(map(len, listed))
        mask = torch.tensor([[c < len(candidates) for c in range(width)] for candidates in listed])
        scored = score_pairs(ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, listed, joint_masks=[mask])
        for order, scores in (("reranker", scored.scores), ("reranker, jointly", scored.joint[0])):
            reciprocal = []
            for i, gold in enumerate(GOLDS):
                if gold != NIL:
                    row = int(gold[1:]) - 1
                    place = listed[i].index(row) if row in listed[i] else None
                    reciprocal.append(0 if place is None else 1 / int((scores[i] >= scores[i, place] - 1e-6).sum()))
            assert result.orders[protocol][order]["metrics"]["mrr"] == pytest.approx(np.mean(reciprocal))
    plain = CandidateEvaluator(ENTITIES, joint=False, progress=False, batch_size=5)(
        ModelInputs(model, PROCESSOR), MENTIONS, lists_of(rows)
    )
    assert plain.order == "reranker"
    assert plain.orders == result.orders


def test_results_and_records_are_plain_data():
    rows = [[0, 1, 2]] * 11 + [[]]
    result = CandidateEvaluator(ENTITIES, progress=False)(
        ModelInputs(toy_reranker(), PROCESSOR), MENTIONS, lists_of(rows)
    )
    data = json.loads(json.dumps(result.to_dict()))
    assert data["protocol"] == END_TO_END
    assert data["gold_added"]["protocol"] == GOLD_ADDED
    assert data["candidates"]["source"] == "here"
    assert data["candidates"]["k"] == 3
    assert data["candidates"]["without"] == 1
    assert data["ties"] == "realistic"
    assert set(data["strata"]) == {"stratum", "mentions in context", "name of mention", "image of mention"}
    records = list(result.records())
    assert [record["mention_id"] for record in records] == list(MENTIONS["mention_id"])
    assert records[-1]["candidates"] == []
    for record in records:
        scores = [candidate["score"] for candidate in record["candidates"]]
        assert scores == sorted(scores, reverse=True)
        ids = [candidate["entity_id"] for candidate in record["candidates"]]
        if record["rank"] is None:
            assert record["entity_id"] not in ids
        else:
            assert ids[int(record["rank"]) - 1] == record["entity_id"]


def test_invalid_input_is_an_error():
    model = toy_reranker()
    with pytest.raises(UnknownEntityError, match="row m0: The candidate 'Q13'"):
        CandidateEvaluator(ENTITIES)(ModelInputs(model, PROCESSOR), MENTIONS, lists_of([[12]] * 12))
    with pytest.raises(DataFormatError, match="lack 11 of 12 mentions"):
        CandidateEvaluator(ENTITIES)(ModelInputs(model, PROCESSOR), MENTIONS, CandidateLists(["m3"], [["Q1"]], {}))
    with pytest.raises(RecipeError, match="jointly"):
        CandidateEvaluator(ENTITIES, joint=True)(
            ModelInputs(TableReranker(torch.zeros(1)), number_processor), MENTIONS, lists_of([[1]] * 12)
        )


# Documents, priors, and micro-F1


@settings(max_examples=15, deadline=None)
@given(ROWS, st.integers(0, 2**16), st.lists(st.sampled_from(["text", "image", ""]), min_size=12, max_size=12))
def test_micro_f1_agrees_with_counting_links(rows, seed, modalities):
    table = torch.randint(0, 6, (12, 12), generator=torch.Generator().manual_seed(seed)).float()
    mentions = MENTIONS.add_column("modality", modalities)
    result = CandidateEvaluator(ENTITIES, progress=False)(
        ModelInputs(TableReranker(table), number_processor), mentions, lists_of(rows)
    )
    for protocol in (END_TO_END, GOLD_ADDED):
        for order in ("reranker", "candidates: here"):
            counts: dict[str, list[int]] = {}  # correct links, links, mentions
            for i, gold in enumerate(GOLDS):
                if gold == NIL:
                    continue
                row, listed = int(gold[1:]) - 1, list(rows[i])
                scores = {row: float(-position) for position, row in enumerate(listed)}
                if protocol == GOLD_ADDED and row not in listed:
                    listed.append(row)
                    scores[row] = -100.0
                if order == "reranker":
                    scores = {candidate: float(table[i, candidate]) for candidate in listed}
                best = [candidate for candidate in listed if scores[candidate] == max(scores.values())]
                for group in ("all", modalities[i] or "text"):
                    count = counts.setdefault(group, [0, 0, 0])
                    count[0] += best == [row]
                    count[1] += bool(listed)
                    count[2] += 1
            reported = result.orders[protocol][order]
            assert set(reported["strata"]["modality"]) == {modality or "text" for modality in modalities}
            for group, metrics in (("all", reported["metrics"]), *reported["strata"]["modality"].items()):
                correct, linked, total = counts.get(group, [0, 0, 0])
                if not total:
                    assert np.isnan(metrics["micro_f1"])
                    continue
                precision, recall = correct / linked if linked else 0, correct / total
                f1 = 2 * precision * recall / (precision + recall) if correct else 0
                assert metrics["micro_f1"] == pytest.approx(f1)
                if linked == total:
                    assert metrics["micro_f1"] == pytest.approx(metrics["hits@1"])


def test_the_table_has_f1_by_modality():
    mentions = MENTIONS.add_column("modality", ["text", "image"] * 6)
    result = CandidateEvaluator(ENTITIES, progress=False)(
        ModelInputs(TableReranker(torch.zeros(12, 12)), number_processor), mentions, lists_of([[1]] * 12)
    )
    table = results_table(result.to_dict())
    assert "F1" in [column.header for column in table.columns]
    assert {"modality: image", "modality: text"} <= set(map(str, table.columns[0]._cells))


@pytest.mark.parametrize("independent", [True, False])
def test_the_model_gets_each_candidate_with_its_prior(independent):
    """The prior is 0 for an added gold and for a candidate of another source, in both protocols."""
    seen: dict[tuple[str, str], set[float]] = {}

    class Spy(ToyDocumentProcessor):
        def __call__(self, mentions=None, entities=None, pairs=None, **kwargs):
            for mention, listed in pairs:
                for entity in listed:
                    seen.setdefault((mention["mention_id"], entity["entity_id"]), set()).add(entity["prior"])
            return super().__call__(pairs=pairs)

    documents, rows = toy_documents(12, nil_every=5), [[(5 * i + c) % 12 for c in range(i % 4)] for i in range(12)]
    scores = [[float("nan") if c == 1 else (1 + c) / 8 for c in range(len(listed))] for listed in rows]
    ids = [[f"Q{row + 1}" for row in listed] for listed in rows]
    lists = CandidateLists(list(documents["mention_id"]), ids, {"prior": scores}, {"source": "prior"})
    model = toy_reranker(unit="document", independent=independent)
    result = CandidateEvaluator(ENTITIES, progress=False)(ModelInputs(model, Spy()), documents, lists)
    for (mention_id, entity_id), priors in seen.items():
        if mention_id in ("m", ""):
            continue
        i = int(mention_id[1:])
        place = ids[i].index(entity_id) if entity_id in ids[i] else 1
        assert priors == {0.0 if place == 1 else (1 + place) / 8}
    added = {(f"m{i}", gold) for i, gold in enumerate(documents["entity_id"]) if gold != NIL}
    assert added <= set(seen)
    assert result.setting["candidates"]["without_prior"] == 3
    wrong = CandidateLists(lists.mention_ids, ids, {"prior": [[-1.0] * len(listed) for listed in rows]})
    with pytest.raises(DataFormatError, match="row m1: The prior of the candidate"):
        CandidateEvaluator(ENTITIES, progress=False)(ModelInputs(model, Spy()), documents, wrong)


def test_both_protocols_score_whole_documents():
    documents = toy_documents(12, nil_every=5)
    rows = [sorted({(3 * i + c) % 12 for c in range(i % 5)}) for i in range(12)]
    lists = CandidateLists(
        list(documents["mention_id"]),
        [[f"Q{row + 1}" for row in listed] for listed in rows],
        {"prior": [[(1 + row) / 16 for row in listed] for listed in rows]},
    )
    model, processor = toy_document_reranker(), ToyDocumentProcessor()
    result = CandidateEvaluator(ENTITIES, progress=False, batch_size=5)(
        ModelInputs(model, processor), documents, lists
    )
    for protocol in (END_TO_END, GOLD_ADDED):
        listed = [list(candidates) for candidates in rows]
        for candidates, gold in zip(listed, documents["entity_id"], strict=True):
            if protocol == GOLD_ADDED and gold != NIL and int(gold[1:]) - 1 not in candidates:
                candidates.append(int(gold[1:]) - 1)
        priors = [
            [(1 + row) / 16 if row in retrieved else 0.0 for row in candidates]
            for candidates, retrieved in zip(listed, rows, strict=True)
        ]
        scores = score_pairs(ModelInputs(model, processor), documents, ENTITIES, listed, priors=priors).scores
        for i, gold in enumerate(documents["entity_id"]):
            row = None if gold == NIL else int(gold[1:]) - 1
            rank = int((scores[i] >= scores[i, listed[i].index(row)] - 1e-6).sum()) if row in listed[i] else np.nan
            assert result.ranks[protocol][i] == pytest.approx(rank, nan_ok=True)


def scored_lists(rows, seed) -> CandidateLists:
    """Returns lists with a source without scores, and one with scores for all but every third candidate."""
    random = np.random.default_rng(seed)
    scores = [
        [float(random.integers(0, 9)) / 4 if (c + i) % 3 else np.nan for c in listed] for i, listed in enumerate(rows)
    ]
    lists = lists_of(rows, scores)
    none = [[np.nan] * len(listed) for listed in rows]
    return CandidateLists(lists.mention_ids, lists.entity_ids, {"silent": none, "here": scores}, lists.setting)


def weighted_ranks(table, lists, weight, protocol):
    """Returns the mean rank of every gold among ties from plain loops, nan for a miss and for NIL."""
    scores = lists.scores["here"]
    scale = np.std([s for of_mention in scores for s in of_mention if not np.isnan(s)]) or 1.0
    ranks = []
    for i, gold in enumerate(GOLDS):
        list_scores = {e: s / scale for e, s in zip(lists.entity_ids[i], scores[i], strict=True)}
        if protocol == GOLD_ADDED and gold != NIL:
            list_scores.setdefault(gold, np.nan)
        lowest = min([s for s in list_scores.values() if not np.isnan(s)], default=0.0)
        total = {
            e: float(table[i, int(e[1:]) - 1]) + weight * (lowest if np.isnan(s) else s)
            for e, s in list_scores.items()
        }
        if gold not in total:
            ranks.append(np.nan)
            continue
        better = sum(s > total[gold] + 1e-5 for s in total.values())
        equal = sum(abs(s - total[gold]) <= 1e-5 for s in total.values()) - 1
        ranks.append(1 + better + equal / 2)
    return np.asarray(ranks)


def reciprocal_mean(ranks) -> float:
    in_kb = np.asarray([gold != NIL for gold in GOLDS])
    return float(np.nan_to_num(1 / ranks[in_kb]).mean())


@settings(max_examples=10, deadline=None)
@given(ROWS, st.integers(0, 2**16), st.sampled_from([0.0, 0.5, 3.0]))
def test_weighted_list_scores_agree_with_a_double_loop(rows, seed, weight):
    rows[0], rows[1] = [1, 2, 3], []  # at least one list has scores
    lists = scored_lists(rows, seed)
    table = torch.randint(0, 5, (12, 12), generator=torch.Generator().manual_seed(seed)).float()
    options = {"ks": (1, 3), "progress": False}
    result = CandidateEvaluator(ENTITIES, candidate_weight=weight, **options)(
        ModelInputs(TableReranker(table), number_processor), MENTIONS, lists
    )
    chosen = CandidateEvaluator(ENTITIES, candidate_weight="auto", **options)(
        ModelInputs(TableReranker(table), number_processor), MENTIONS, lists
    )
    plain = CandidateEvaluator(ENTITIES, **options)(
        ModelInputs(TableReranker(table), number_processor), MENTIONS, lists
    )
    assert plain.order == "reranker"
    assert "candidate_weight" not in plain.setting
    assert result.order == "reranker + candidates"
    for protocol in (END_TO_END, GOLD_ADDED):
        expected = weighted_ranks(table, lists, weight, protocol)
        np.testing.assert_array_equal(result.ranks[protocol], expected)
        assert result.orders[protocol][result.order]["metrics"]["mrr"] == pytest.approx(reciprocal_mean(expected))
        assert {**result.orders[protocol], result.order: None} == {**plain.orders[protocol], result.order: None}
        if weight == 0:
            np.testing.assert_array_equal(result.scores[protocol], plain.scores[protocol])
            np.testing.assert_array_equal(result.ranks[protocol], plain.ranks[protocol])
    mrr = {w: reciprocal_mean(weighted_ranks(table, lists, w, END_TO_END)) for w in CANDIDATE_WEIGHTS}
    weighting = chosen.setting["candidate_weight"]
    assert list(weighting["chosen_by_mrr"].values()) == pytest.approx(list(mrr.values()))
    assert weighting["weight"] == next(w for w in mrr if mrr[w] >= max(mrr.values()) - 1e-12)
    assert chosen.metrics["mrr"] == pytest.approx(max(mrr.values()))


def test_the_order_of_scored_candidates_changes_no_rank():
    rows = [[(5 * i + 2 * c) % 12 for c in range(i % 6)] for i in range(12)]
    lists = scored_lists(rows, 3)
    reversed_lists = CandidateLists(
        lists.mention_ids,
        [ids[::-1] for ids in lists.entity_ids],
        {source: [listed[::-1] for listed in scores] for source, scores in lists.scores.items()},
    )
    table = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    one, other = (
        CandidateEvaluator(ENTITIES, candidate_weight=2, progress=False)(
            ModelInputs(TableReranker(table), number_processor), MENTIONS, candidates
        )
        for candidates in (lists, reversed_lists)
    )
    for protocol in (END_TO_END, GOLD_ADDED):
        np.testing.assert_array_equal(one.ranks[protocol], other.ranks[protocol])


@pytest.mark.parametrize("independent", [True, False])
def test_the_weight_applies_to_the_main_order_and_is_reported(independent):
    model = toy_reranker(unit="context", independent=independent)
    lists = lists_of([[(3 * i + c) % 12 for c in range(4)] for i in range(12)])
    for joint, order in ((True, "reranker, jointly"), (False, "reranker")):
        options = {"joint": joint, "progress": False}
        plain = CandidateEvaluator(ENTITIES, **options)(ModelInputs(model, PROCESSOR), MENTIONS, lists)
        result = CandidateEvaluator(ENTITIES, candidate_weight=1e9, **options)(
            ModelInputs(model, PROCESSOR), MENTIONS, lists
        )
        weighting = result.setting["candidate_weight"]
        assert weighting["reranker"] == order
        assert weighting["source"] == "here"
        assert weighting["scale"] == pytest.approx(np.std([0, 1, 2, 3]))
        # A large weight leaves the order of the list scores 0, -1, …
        weighted, source = result.orders[END_TO_END][result.order], result.orders[END_TO_END]["candidates: here"]
        assert weighted["metrics"]["mrr"] == pytest.approx(source["metrics"]["mrr"])
        unweighted = CandidateEvaluator(ENTITIES, candidate_weight=0, **options)(
            ModelInputs(model, PROCESSOR), MENTIONS, lists
        )
        assert unweighted.metrics == plain.metrics
        assert f"{order} + 1e+09 * here score / 1.118" in orders_table(result.to_dict()).caption
        json.dumps(result.to_dict())


def test_the_weight_applies_to_the_named_source():
    """With scores of two sources, a named source has the weight that it has alone."""
    rows = [list(range(12))] * 12
    alone = {"prior": scored_lists(rows, 3).scores["here"], "retriever": scored_lists(rows, 4).scores["here"]}
    both = lists_of(rows)
    both = CandidateLists(both.mention_ids, both.entity_ids, alone, both.setting)
    table = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))

    def evaluate(lists, **options):
        evaluator = CandidateEvaluator(ENTITIES, progress=False, **options)
        return evaluator(ModelInputs(TableReranker(table), number_processor), MENTIONS, lists)

    ranks = []
    for source, scores in alone.items():
        single = evaluate(lists_of(rows, scores), candidate_weight=2)
        named = evaluate(both, candidate_weight=2, candidate_source=source)
        assert named.setting["candidate_weight"]["source"] == source
        for protocol in (END_TO_END, GOLD_ADDED):
            np.testing.assert_array_equal(named.ranks[protocol], single.ranks[protocol])
        ranks.append(named.ranks[END_TO_END])
    assert not np.array_equal(*ranks, equal_nan=True)
    with pytest.raises(RecipeError, match=r"scores of prior and retriever.*--candidate-weight retriever=WEIGHT"):
        evaluate(both, candidate_weight=2)
    with pytest.raises(RecipeError, match=r"no scores of 'name'.*Choose among prior, retriever"):
        evaluate(both, candidate_weight=2, candidate_source="name")
    with pytest.raises(RecipeError, match=r"'retriever' have no weight.*candidate_weight"):
        evaluate(both, candidate_source="retriever")


def test_invalid_weights_are_an_error():
    model = TableReranker(torch.zeros(12, 12))

    def evaluate(lists, weight, mentions=MENTIONS):
        CandidateEvaluator(ENTITIES, candidate_weight=weight, progress=False)(
            ModelInputs(model, number_processor), mentions, lists
        )

    without = CandidateLists(list(MENTIONS["mention_id"]), [["Q1", "Q2"]] * 12, {})
    with pytest.raises(RecipeError, match="no scores that could be given a weight"):
        evaluate(without, 1.0)
    with pytest.raises(RecipeError, match="no scores that could be given a weight"):
        evaluate(lists_of([[1, 2]] * 12, [[np.nan, np.nan]] * 12), "auto")
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(RecipeError, match="Give 0 or more"):
            evaluate(lists_of([[1, 2]] * 12), wrong)
    nothing = MENTIONS.map(lambda row: {"entity_id": NIL})
    with pytest.raises(RecipeError, match=r"no mention's gold.*Give a number"):
        evaluate(lists_of([[1, 2]] * 12), "auto", nothing)


def test_an_added_gold_has_the_lowest_list_score_and_the_model_may_need_scores():
    seen = {}

    class Spy(ToyPairProcessor):
        def __call__(self, mentions=None, entities=None, pairs=None, **kwargs):
            for mention, listed in pairs:
                for entity in listed:
                    seen[mention["mention_id"], entity["entity_id"]] = entity["list_score"]
            return super().__call__(pairs=pairs)

    lists = lists_of([[9, 3, 5]] * 12, scores=[[2.0, 0.5, 1.0]] * 12)
    model = toy_reranker()
    CandidateEvaluator(ENTITIES, progress=False)(ModelInputs(model, Spy()), MENTIONS, lists)
    for i, gold in enumerate(GOLDS):
        assert [seen[f"m{i}", entity_id] for entity_id in ("Q10", "Q4", "Q6")] == [0, -1.5, -1]
        assert gold == NIL or seen[f"m{i}", gold] == {"Q10": 0, "Q6": -1}.get(gold, -1.5)
    model.reads_list_scores = True
    with pytest.raises(RecipeError, match="reads the scores of the list"):
        CandidateEvaluator(ENTITIES, progress=False)(
            ModelInputs(model, PROCESSOR), MENTIONS, CandidateLists(lists.mention_ids, lists.entity_ids, {})
        )


def test_a_model_may_rank_jointly_only_if_asked():
    model = toy_reranker()
    model.ranks_jointly_by_default = False
    lists = lists_of([[9, 3, 5]] * 12)
    for joint, order in ((None, "reranker"), (True, "reranker, jointly")):
        result = CandidateEvaluator(ENTITIES, joint=joint, progress=False)(
            ModelInputs(model, PROCESSOR), MENTIONS, lists
        )
        assert result.order == order
        assert "reranker, jointly" in result.orders[END_TO_END]


# Retrievers

RETRIEVER = ModelInputs(toy_model(), ToyProcessor())


@cache
def scores_of_single_pairs() -> torch.Tensor:
    """Returns the scores [12, 12] of every mention and entity, each encoded and scored alone."""
    model = RETRIEVER.model
    with torch.no_grad():
        mentions = [model.encode_mentions(**RETRIEVER.mentions([row])) for row in MENTIONS]
        entities = [model.encode_entities(**RETRIEVER.entities([row])) for row in ENTITIES]
        return torch.stack([torch.cat([model.score(m, e)[0] for e in entities]) for m in mentions])


@settings(max_examples=20, deadline=None)
@given(ROWS, st.integers(1, 5))
def test_a_retriever_scores_each_listed_pair_as_it_scores_it_alone(rows, batch_size):
    scores = score_listed(RETRIEVER, MENTIONS, ENTITIES, rows, batch_size=batch_size)
    expected = torch.full((12, max(map(len, rows))), -torch.inf)
    for i, listed in enumerate(rows):
        expected[i, : len(listed)] = scores_of_single_pairs()[i, listed]
    torch.testing.assert_close(scores, expected)


def test_a_retriever_ranks_lists_of_all_entities_as_it_ranks_all_entities():
    settings = {"ks": (1, 3), "progress": False}
    listed = CandidateEvaluator(ENTITIES, **settings)(RETRIEVER, MENTIONS, lists_of([range(12)] * 12))
    full = FullEvaluator(ENTITIES, **settings)(RETRIEVER, MENTIONS)
    assert listed.order == "retriever"
    for name in ("hits@1", "hits@3", "mrr", "mr"):
        assert listed.metrics[name] == pytest.approx(full.metrics[name])
    expected = [record["rank"] for record in full.records()]
    assert [record["rank"] for record in listed.records()] == expected


def test_a_retriever_is_scored_on_mentions_without_candidates():
    result = CandidateEvaluator(ENTITIES, ks=(1,), progress=False)(RETRIEVER, MENTIONS, lists_of([[]] * 12))
    assert result.metrics["hits@1"] == 0
    assert result.orders[GOLD_ADDED]["retriever"]["metrics"]["hits@1"] == 1  # the gold is the only candidate


def test_a_score_of_a_retriever_that_is_nan_names_its_mention():
    model = toy_model()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(ScoreError, match=r"row m2: The score with entity 'Q4' is nan"):
        score_listed(ModelInputs(model, ToyProcessor()), MENTIONS, ENTITIES, [[], [], [3]] + [[]] * 9)
