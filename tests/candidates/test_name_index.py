"""The name channel against a plain comparison of every mention and every name."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Indel

from hf_mel.candidates.name_index import NAMESAKE_SCORE, NameIndex, name_weight_of
from hf_mel.errors import RecipeError
from hf_mel.names import has_all_words, words_of


def dense(index: NameIndex, surfaces: list[str]) -> np.ndarray:
    scores = index.scores(surfaces)
    return np.array([scores.of(number, np.arange(len(index))) for number in range(len(surfaces))])


def plain_score(surface: str, names: list[str], all_names: list[list[str]]) -> float:
    """The score of one entity, name by name and word by word."""
    words = words_of(surface)
    if any(has_all_words(surface, names_of_entity) for names_of_entity in all_names):
        full = [words_of(name) for name in names if words and words <= words_of(name)]
        return max((1.0 if words == name else NAMESAKE_SCORE for name in full), default=0.0)
    different = [name for entity in all_names for name in {words_of(name) for name in entity if name}]
    weights, similarities = {}, {}
    for word in words:
        others = {other: Indel.normalized_similarity(word, other) for name in different for other in name}
        others = {other: s for other, s in others.items() if (other == word if word in others else s >= 0.75)}
        counts = [sum(other in name for name in different) for other in others]
        weights[word], similarities[word] = math.log((1 + len(different)) / min(counts, default=1)), others
    total = sum(weights.values())
    if not total:
        return 0.0
    shares = [
        sum(weights[word] * max((similarities[word].get(o, 0) for o in words_of(name)), default=0) for word in words)
        / total
        for name in names
        if name
    ]
    best = max(shares, default=0.0)
    return NAMESAKE_SCORE * best if best > 0.5 + 1e-9 else math.nan if abs(best - 0.5) <= 1e-9 else 0.0


WORDS = st.sampled_from(["swift", "Swifts", "TAYLOR", "taylör", "tayler", "of", "Ghana", "Congo"])
NAMES = st.lists(WORDS, max_size=3).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(NAMES, max_size=3), min_size=1, max_size=8), st.lists(NAMES, min_size=1, max_size=4))
def test_scores_are_those_of_comparing_every_name(names, surfaces):
    index = NameIndex(names)
    expected = np.array([[plain_score(surface, entity, names) for entity in names] for surface in surfaces])
    at_the_limit = np.isnan(expected)  # rounding decides
    result = dense(index, surfaces)
    assert result[~at_the_limit] == pytest.approx(expected[~at_the_limit], abs=1e-6)
    for number, surface in enumerate(surfaces):
        assert dense(index, [surface]).tolist() == [result[number].tolist()]  # single = batched
        namesakes = [row for row, entity in enumerate(names) if has_all_words(surface, entity)]
        assert index.namesakes(surface).tolist() == namesakes


def test_an_alias_counts_as_much_as_a_name_and_a_whole_name_more_than_a_part():
    index = NameIndex([["Taylor Swift", "T-Swizzle"], ["Jonathan Swift"], ["Swift"], ["Ghana"]])
    assert dense(index, ["Swift"]).tolist() == [[NAMESAKE_SCORE, NAMESAKE_SCORE, 1, 0]]
    assert dense(index, ["swizzle T"]).tolist() == [[1, 0, 0, 0]]


def test_a_misspelt_name_is_near_and_a_known_one_is_not_compared():
    index = NameIndex([["Gotse Delchev"], ["Ivan Pyryev"], ["Deltas"]])
    assert dense(index, ["Delcheva"])[0].argmax() == 0
    assert 0 < dense(index, ["Delcheva"])[0, 0] < NAMESAKE_SCORE
    assert dense(index, ["Delchev"]).tolist() == [[NAMESAKE_SCORE, 0, 0]]


@pytest.mark.parametrize("surface", ["", "😀", "!?", "\u200f"])
def test_a_mention_without_a_word_has_no_name_scores(surface):
    assert not dense(NameIndex([["Swift"], ["😀"], [""], []]), [surface]).any()
    assert not dense(NameIndex([]), [surface, "Swift"]).any()


def test_scripts_without_spaces_and_from_right_to_left_are_compared():
    index = NameIndex([["北京"], ["القاهرة"], ["Αθήνα"]])
    assert dense(index, ["北京", "القاهرة", "ΑΘΗΝΑ"]).tolist() == np.eye(3).tolist()


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "much"])
def test_a_weight_that_is_no_number_is_an_error(weight):
    with pytest.raises(RecipeError, match="name weight"):
        name_weight_of(None, weight)
