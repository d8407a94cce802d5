"""Candidate lists against brute force over all names."""

from __future__ import annotations

import math
from collections import Counter

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.candidates import sources as module
from hf_mel.candidates.lists import CandidateLists
from hf_mel.candidates.sources import (
    dictionary_candidates,
    document_candidates,
    name_candidates,
    prior_candidates,
    release_candidates,
    shared_candidates,
    union_candidates,
)
from hf_mel.errors import DataFormatError, MelError, RecipeError, UnknownEntityError
from hf_mel.schema import NIL, entity_features, mention_features

WORDS = st.text("abc ", min_size=1, max_size=6)


def entities_of(names: list[list[str]]) -> datasets.Dataset:
    rows = [
        {"entity_id": f"Q{i}", "name": each[0], "description": "", "attributes": "", "aliases": each[1:], "images": []}
        for i, each in enumerate(names)
    ]
    return datasets.Dataset.from_list(rows, features=entity_features())


def mentions_of(surfaces: list[str], golds: list[str] | None = None, prefix: str = "m") -> datasets.Dataset:
    rows = [
        {
            "mention_id": f"{prefix}{i}",
            "context_id": f"c{i}",
            "text": surface,
            "mention": surface,
            "start": -1,
            "end": -1,
            "mention_type": "",
            "topic": "",
            "image": None,
            "entity_id": golds[i] if golds else NIL,
            "candidates": [],
        }
        for i, surface in enumerate(surfaces)
    ]
    return datasets.Dataset.from_list(rows, features=mention_features())


def longest_common_subsequence(a: str, b: str) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def composite(surface: str, name: str) -> float:
    words = [k for k in range(len(name)) if name[k] != " " and (k == 0 or name[k - 1] == " ")]
    prefix = max(common_prefix(surface, name[k:]) for k in words or [0])
    longer = max(len(surface), len(name))
    subsequence = longest_common_subsequence(surface, name)
    return ((subsequence + prefix) / len(surface) + (longer - edit_distance(surface, name)) / longer) / 3


@settings(max_examples=25, deadline=None)
@given(
    st.lists(WORDS, min_size=1, max_size=6),
    st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=9),
    st.integers(1, 10),
    st.integers(1, 30),
)
def test_the_composite_is_that_of_every_pair_by_hand(surfaces, names, k, chunk):
    before, module._CHUNK_SCORES = module._CHUNK_SCORES, chunk
    try:
        candidates = name_candidates(mentions_of(surfaces), entities_of(names), k=k, scorer="composite")
    finally:
        module._CHUNK_SCORES = before
    for surface, listed, scores in zip(surfaces, candidates.entity_ids, candidates.scores["name"], strict=True):
        expected = {f"Q{i}": max(composite(surface, name) for name in each) for i, each in enumerate(names)}
        expected = {entity_id: score for entity_id, score in expected.items() if score > 0}
        assert len(set(listed)) == len(listed) == min(k, len(expected))
        assert scores == pytest.approx([expected[entity_id] for entity_id in listed], abs=1e-5)
        assert scores == pytest.approx(sorted(expected.values(), reverse=True)[:k], abs=1e-5)


def test_the_composite_does_not_punish_a_surname():
    """A surname is contained in a full name, and more similar to it than to a short name with other letters."""
    entities = entities_of([["Alcott"], ["Keith Wilson Alcorn"], ["Alan"], ["Alonzo Corner"]])
    candidates = name_candidates(mentions_of(["Alcorn"]), entities, k=1, scorer="composite")
    assert candidates.entity_ids == [["Q1"]]


@pytest.mark.parametrize("scorer", list(module.SCORERS))
def test_case_and_accents_of_names_and_aliases_do_not_count(scorer):
    others = [["Magdalena Abakanowicz"], ["Berenice Abbott"], ["Norman Ackroyd"], ["Weiwei Ai"], ["Afro"], ["Arman"]]
    entities = entities_of([*others, ["Ghana", "Goldküste"], ["Curaçao"], ["Кейптаун"], ["加纳共和国"]])
    surfaces = ["GHANA", "ghana", "GOLDKUSTE", "curacao", "CURAÇAO", "КЕЙПТАУН", "加纳共和国"]
    candidates = name_candidates(mentions_of(surfaces), entities, k=1, scorer=scorer)
    assert candidates.entity_ids == [["Q6"], ["Q6"], ["Q6"], ["Q7"], ["Q7"], ["Q8"], ["Q9"]]
    scores = [score for [score] in candidates.scores["name"]]
    assert scores == pytest.approx([max(scores)] * 7)  # as similar as equal names


def test_an_entity_without_similarity_is_no_candidate():
    entities = entities_of([["Ghana"], ["Togo"], ["加纳"]])
    candidates = name_candidates(mentions_of(["!!!", "多哥", "加纳"]), entities, k=3)
    assert candidates.entity_ids == [[], [], ["Q2"]]
    assert candidates.scores["name"] == [[], [], [100]]


def test_the_prior_joins_surface_forms_that_differ_in_case_and_accents():
    training = mentions_of(["Córdoba", "CORDOBA", "cordoba", "Cordova"], ["Q1", "Q2", "Q1", "Q3"], prefix="t")
    candidates = prior_candidates(mentions_of(["CÓRDOBA"]), training)
    assert candidates.entity_ids == [["Q1", "Q2"]]
    assert candidates.scores["prior"][0] == pytest.approx([2 / 3, 1 / 3])


def test_ties_do_not_follow_the_order_of_the_knowledge_base():
    names = [["Paris"]] * 40
    one = name_candidates(mentions_of(["Paris"]), entities_of(names), k=10).entity_ids[0]
    assert one != [f"Q{i}" for i in range(10)]
    entities = entities_of(names)
    turned = name_candidates(mentions_of(["Paris"]), entities.select(range(39, -1, -1)), k=10).entity_ids[0]
    assert turned == one


@pytest.mark.parametrize("scorer", list(module.SCORERS))
def test_every_scorer_finds_the_same_name(scorer):
    entities = entities_of([["Anna Karenina"], ["Boris"], ["Anna K.", "The Karenin case"]])
    assert name_candidates(mentions_of(["Boris"]), entities, k=1, scorer=scorer).entity_ids == [["Q1"]]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("aAbB"), st.sampled_from(["Q1", "Q2", "Q3", NIL])), min_size=1, max_size=12),
    st.lists(st.sampled_from("abx"), min_size=1, max_size=4),
    st.booleans(),
)
def test_the_prior_is_the_share_of_uses_without_the_mention_itself(uses, surfaces, within):
    training = mentions_of([surface for surface, _ in uses], [gold for _, gold in uses], prefix="t")
    mentions = training if within else mentions_of(surfaces)
    candidates = prior_candidates(mentions, training, k=2)
    for i, (surface, listed, scores) in enumerate(
        zip(mentions["mention"], candidates.entity_ids, candidates.scores["prior"], strict=True)
    ):
        others = [use for j, use in enumerate(uses) if not (within and i == j)]
        counts = Counter(gold for name, gold in others if name.lower() == surface.lower())
        shares = {gold: count / sum(counts.values()) for gold, count in counts.items() if gold != NIL}
        assert scores == pytest.approx(sorted(shares.values(), reverse=True)[:2])
        assert scores == [shares[entity_id] for entity_id in listed]


def make(ids, source="name", scores=None, **setting) -> CandidateLists:
    scores = [[float(-c) for c in range(len(each))] for each in ids] if scores is None else scores
    return CandidateLists([f"m{i}" for i in range(len(ids))], ids, {source: scores}, {"source": source, **setting})


@given(
    st.lists(st.sampled_from(["Ann", "ann bo", "Bó", "bo ann", "cy", "", "-"]), min_size=1, max_size=5),
    st.lists(
        st.lists(st.sampled_from(["Ann Bo", "Bo", "cy ann", "Cy"]), min_size=1, max_size=2), min_size=1, max_size=6
    ),
    st.integers(1, 4),
)
def test_the_dictionary_has_an_equal_share_for_each_namesake(surfaces, names, k):
    lists = dictionary_candidates(mentions_of(surfaces), entities_of(names), k=k)

    def words(name):
        return set("".join({"ó": "o", "-": " "}.get(letter, letter) for letter in name.lower()).split())

    for surface, ids, shares in zip(surfaces, lists.entity_ids, lists.scores["dictionary"], strict=True):
        namesakes = {
            f"Q{i}" for i, each in enumerate(names) if words(surface) and any(words(surface) <= words(n) for n in each)
        }
        assert len(ids) == len(set(ids)) == min(k, len(namesakes))
        assert set(ids) <= namesakes
        assert shares == [pytest.approx(1 / len(namesakes)) for _ in ids]


def test_a_prior_is_the_mean_of_counts_and_dictionary():
    scores = {"prior": [[0.5, math.nan, math.nan], [1.0]], "dictionary": [[0.25, 0.25, math.nan], [math.nan]]}
    lists = CandidateLists(["a", "b"], [["Q1", "Q2", "Q3"], ["Q1"]], scores)
    assert lists.priors == {"a": {"Q1": 0.375, "Q2": 0.125}, "b": {"Q1": 0.5}}
    assert CandidateLists(["b"], [["Q1"]], {"dictionary": [[0.2]]}).priors == {"b": {"Q1": 0.2}}


def test_a_union_keeps_scores_of_candidates_beyond_k_that_another_source_gives():
    names = CandidateLists(["a"], [["Q1", "Q2", "Q3"]], {"dictionary": [[0.3, 0.3, 0.3]]})
    ranked = CandidateLists(["a"], [["Q3", "Q4"]], {"retriever": [[9.0, 8.0]]})
    union = union_candidates([ranked, names], k=2)
    assert union.entity_ids == [["Q3", "Q1"]]
    assert union.scores["dictionary"] == [[0.3, 0.3]]
    more = union_candidates(
        [ranked, names], k=1, shared=CandidateLists(["a"], [["Q2", "Q5"]], {"shared": [[1.0, 0.5]]})
    )
    assert more.entity_ids == [["Q3", "Q2", "Q5"]]
    np.testing.assert_equal(more.scores["dictionary"], [[0.3, 0.3, math.nan]])
    np.testing.assert_equal(more.scores["shared"], [[math.nan, 1.0, 0.5]])


@given(
    st.lists(st.lists(st.sampled_from("QRSTU"), max_size=4, unique=True), min_size=1, max_size=8), st.integers(1, 3)
)
def test_mentions_share_their_first_candidates_with_their_document(listed, first):
    names = [f"d{i % 2}" for i in range(len(listed))]
    mentions = mentions_of(["x"] * len(listed)).add_column("document_id", names)
    lists = CandidateLists(list(mentions["mention_id"]), listed, {"name": [[1.0] * len(each) for each in listed]})
    shared = shared_candidates(mentions, lists, first=first)
    for i in range(len(listed)):
        votes = Counter()
        for j, each in enumerate(listed):
            for place, entity_id in enumerate(each[:first]):
                votes[entity_id] += (1 / (place + 1)) * (names[i] == names[j] and i != j)
        votes = {entity_id: vote for entity_id, vote in votes.items() if vote}
        assert set(shared.entity_ids[i]) == set(votes)
        assert shared.scores["shared"][i] == pytest.approx(sorted(votes.values(), reverse=True))
        assert [votes[entity_id] for entity_id in shared.entity_ids[i]] == pytest.approx(shared.scores["shared"][i])


def test_a_union_takes_turns_and_keeps_the_scores_of_each_source():
    one, other = make([["Q1", "Q2", "Q3"], []]), make([["Q2", "Q9"], ["Q4"]], "prior")
    union = union_candidates([one, other], k=3)
    assert union.entity_ids == [["Q1", "Q2", "Q9"], ["Q4"]]
    assert union.scores["name"][0][:2] == [0, -1]
    assert math.isnan(union.scores["name"][0][2])
    assert math.isnan(union.scores["prior"][0][0])
    assert union.scores["prior"][0][1:] == [0, -1]
    assert union.setting["source"] == "name+prior"
    with pytest.raises(ValueError, match="twice"):
        union_candidates([one, one], k=3)


def test_recall_counts_golds_among_the_first_k():
    lists = make([["Q1", "Q2"], ["Q2"], [], ["Q5"]])
    assert lists.recall(["Q2", "Q2", "Q3", NIL], [1, 2]) == pytest.approx({"recall@1": 1 / 3, "recall@2": 2 / 3})
    assert math.isnan(make([["Q1"]]).recall([NIL], [1])["recall@1"])


def test_candidate_lists_survive_writing_and_reading(tmp_path):
    union = union_candidates([make([["Q1"], []], scorer="WRatio"), make([["Q2"], []], "prior")], k=3)
    union.save(tmp_path / "deep/lists.parquet")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["lists.parquet"]
    loaded = CandidateLists.load(tmp_path / "deep/lists.parquet")
    assert (loaded.mention_ids, loaded.entity_ids, loaded.setting) == (
        union.mention_ids,
        union.entity_ids,
        union.setting,
    )
    for source, scores in union.scores.items():
        for values, expected in zip(loaded.scores[source], scores, strict=True):
            np.testing.assert_equal(values, expected)


def test_files_without_candidates_are_refused(tmp_path):
    (tmp_path / "text.parquet").write_text("no")
    datasets.Dataset.from_dict({"mention_id": ["m"]}).to_parquet(tmp_path / "other.parquet")
    for name in ("text.parquet", "other.parquet", "none.parquet"):
        with pytest.raises(DataFormatError, match=f"{name}.*hf-mel candidates"):
            CandidateLists.load(tmp_path / name)
    with pytest.raises(MelError, match="cannot be written"):
        make([["Q1"]]).save(tmp_path / "text.parquet" / "x.parquet")


def test_lists_follow_the_order_of_given_mentions_and_become_rows():
    lists = make([["Q1"], ["Q2"], ["Q3", "Q0"]])
    picked = lists.for_mentions(mentions_of(["a"] * 3).select([2, 0]))
    assert picked.entity_ids == [["Q3", "Q0"], ["Q1"]]
    assert picked.scores["name"] == [[0, -1], [0]]
    assert picked.rows(["Q0", "Q1", "Q3"]) == [[2, 0], [1]]
    assert lists.top(1).entity_ids == [["Q1"], ["Q2"], ["Q3"]]
    with pytest.raises(DataFormatError, match="lack 1 of 4 mentions, among them 'm3'"):
        lists.for_mentions(mentions_of(["a"] * 4))
    with pytest.raises(UnknownEntityError, match="row m1: The candidate 'Q2'"):
        lists.rows(["Q1"])


def test_wrong_arguments_are_refused():
    entities, mentions = entities_of([["a"]]), mentions_of(["a"])
    with pytest.raises(ValueError, match="scorer must be one of WRatio"):
        name_candidates(mentions, entities, scorer="soundex")
    with pytest.raises(ValueError, match="k must be"):
        name_candidates(mentions, entities, k=0)
    with pytest.raises(ValueError, match="as many lists"):
        CandidateLists(["m"], [], {})
    with pytest.raises(ValueError, match="scores of 'name' is not the number of candidates"):
        make([["Q1"]], scores=[[]])


def test_a_visual_mention_has_no_name_and_no_prior():
    entities, mentions = entities_of([["ab"], ["cd"]]), mentions_of(["ab", "", "ab"], ["Q0", "Q1", "Q0"])
    assert [bool(each) for each in name_candidates(mentions, entities, k=1).entity_ids] == [True, False, True]
    assert prior_candidates(mentions, mentions, k=5).entity_ids == [["Q0"], [], ["Q0"]]


def test_priors_hold_only_candidates_with_a_prior():
    lists = CandidateLists(["a", "b"], [["Q1", "Q2"], []], {"prior": [[0.25, math.nan], []], "name": [[9, 8], []]})
    assert lists.priors == {"a": {"Q1": 0.25}, "b": {}}
    assert lists.for_mentions(mentions_of(["x"], prefix="a").map(lambda row: {"mention_id": "a"})).priors == {
        "a": {"Q1": 0.25}
    }
    assert CandidateLists(["a"], [["Q1"]], {"name": [[1.0]]}).priors is None
    for wrong in (-0.5, math.inf):
        with pytest.raises(DataFormatError, match="row a: The prior of the candidate 'Q2' is"):
            _ = CandidateLists(["a"], [["Q1", "Q2"]], {"prior": [[0.5, wrong]]}).priors


def shipped(listed, priors=None) -> datasets.Dataset:
    rows = mentions_of(["x"] * len(listed)).remove_columns("candidates").to_list()
    for i, row in enumerate(rows):
        row |= {"candidates": listed[i]} | ({} if priors is None else {"candidate_priors": priors[i]})
    extra = {} if priors is None else {"candidate_priors": [datasets.Value("float32")]}
    return datasets.Dataset.from_list(rows, features=mention_features(**extra))


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=6), min_size=1, max_size=4))
def test_released_candidates_come_best_first_with_their_priors(pairs):
    listed = [[f"Q{entity}" for entity, _ in each] for each in pairs]
    if not any(listed):
        return
    candidates = release_candidates(shipped(listed, [[prior / 4 for _, prior in each] for each in pairs]), k=3)
    for ids, priors, each in zip(candidates.entity_ids, candidates.scores["prior"], pairs, strict=True):
        best = {}
        for entity, prior in each:
            best[f"Q{entity}"] = max(best.get(f"Q{entity}", 0), prior / 4)
        assert priors == sorted(best.values(), reverse=True)[:3]
        assert [best[entity_id] for entity_id in ids] == priors
        assert len(set(ids)) == len(ids)


def test_released_candidates_without_priors_keep_their_order():
    candidates = release_candidates(shipped([["Q2", "Q1", "Q2"], []], [[], []]), k=2)
    assert candidates.entity_ids == [["Q2", "Q1"], []]
    assert list(candidates.scores) == ["release"]
    assert candidates.priors is None
    assert release_candidates(shipped([["Q2", "Q1"]]), k=1).entity_ids == [["Q2"]]
    some = release_candidates(shipped([["Q2", "Q1"], ["Q3"]], [[0.25, 0.75], []]))
    assert (some.entity_ids, some.scores) == ([["Q1", "Q2"], ["Q3"]], {"prior": [[0.75, 0.25], [0.0]]})


@pytest.mark.parametrize(
    ("listed", "priors", "message"),
    [
        ([["Q1"], ["Q2"]], [[0.5], [math.nan]], "row m1: The prior nan is not a probability"),
        ([["Q1"], ["Q2"]], [[0.5], [-0.1]], "row m1: The prior -0.1"),
        ([["Q1"], ["Q2", "Q3"]], [[0.5], [0.5]], "row m1: The mention has 2 candidates and 1 priors"),
        ([[], []], None, "ships no candidates"),
    ],
)
def test_wrong_priors_of_a_release_name_the_mention(listed, priors, message):
    with pytest.raises(DataFormatError, match=message):
        release_candidates(shipped(listed, priors))


@given(
    st.lists(st.lists(st.sampled_from("QRSTU"), max_size=4, unique=True), min_size=1, max_size=8), st.integers(1, 4)
)
def test_a_mention_without_candidates_gets_those_of_its_document(listed, k):
    names = [f"d{i % 2}" for i in range(len(listed))]
    mentions = mentions_of(["x"] * len(listed)).add_column("document_id", names)
    lists = CandidateLists(list(mentions["mention_id"]), listed, {"name": [[1.0] * len(each) for each in listed]})
    shared = document_candidates(mentions, lists, k=k)
    for i, ids in enumerate(listed):
        if ids:
            assert shared.entity_ids[i] == []
            continue
        votes = Counter()
        for j, each in enumerate(listed):
            for place, entity_id in enumerate(each):
                votes[entity_id] += (1 / (place + 1)) * (names[i] == names[j])
        best = sorted((score for score in votes.values() if score), reverse=True)[:k]
        assert shared.scores["document"][i] == pytest.approx(best)
        assert [votes[entity_id] for entity_id in shared.entity_ids[i]] == pytest.approx(best)


NUMBERS = st.one_of(st.just(math.nan), st.floats(-5, 5))


@given(st.lists(st.lists(NUMBERS, max_size=4), min_size=1, max_size=5), st.booleans())
def test_relative_scores_are_those_of_the_retriever_less_the_best(numbers, has_others):
    ids = [[f"Q{c}" for c in range(len(row))] for row in numbers]
    scores = {"retriever": numbers} | ({"name": [[1.0] * len(row) for row in numbers]} if has_others else {})
    lists = CandidateLists([f"m{i}" for i in range(len(ids))], ids, scores | {"prior": [[0.5] * len(r) for r in ids]})
    known = [[x for x in row if not math.isnan(x)] for row in numbers]
    if not any(known):  # the retriever gave no score at all
        assert lists.relative_scores == (
            {f"m{i}": dict.fromkeys(row, 0.0) for i, row in enumerate(ids)} if has_others and any(ids) else None
        )
        return
    for i, row in enumerate(numbers):
        expected = [(min(known[i], default=0) if math.isnan(x) else x) - max(known[i], default=0) for x in row]
        assert list(lists.relative_scores[f"m{i}"].values()) == pytest.approx(expected)
        assert list(lists.relative_scores[f"m{i}"]) == ids[i]
    lists.check_relative_scores()


def test_lists_of_several_sources_without_a_retriever_have_no_relative_scores():
    lists = CandidateLists(["m"], [["Q1"]], {"name": [[1.0]], "here": [[2.0]]})
    assert lists.relative_scores is None
    assert CandidateLists(["m"], [["Q1"]], {"prior": [[1.0]]}).relative_scores is None
    with pytest.raises(RecipeError, match="reads the scores of the list"):
        lists.check_relative_scores()
