"""Tests of the groups of mentions."""

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.errors import DataFormatError
from hf_mel.evaluation.strata import has_image, names_by_id, strata_of
from hf_mel.schema import NIL
from tests.toy import toy_mentions


def mentions(**columns):
    defaults = {"context_id": ["c1", "c2", "c1", "c3"], "entity_id": ["Q1", "Q2", NIL, "Q3"]}
    return datasets.Dataset.from_dict({**defaults, **columns})


def test_groups_by_column_context_and_gold():
    rows = mentions(stratum=["text", "image", "", None], topic=["a", "a", "b", "b"])
    strata = strata_of(rows, train_golds={"Q1", "Q3"})
    assert strata == {
        "stratum": ["text", "image", None, None],
        "mentions in context": ["multiple", "single", "multiple", "single"],
        "gold in training": ["seen", "unseen", None, "seen"],
    }
    assert strata_of(rows, ["topic"]).keys() == {"topic", "mentions in context"}


def test_a_data_set_without_strata_is_grouped_by_context_and_gold():
    assert strata_of(mentions()).keys() == {"mentions in context"}
    assert strata_of(mentions(), train_golds=())["gold in training"] == ["unseen", "unseen", None, "unseen"]


#: Id → name and aliases.
NAMES = {
    "Q1": ["Michael Jordan", "MJ"],
    "Q2": ["Michael B. Jordan"],
    "Q3": ["Jordan", "Hashemite Kingdom of Jordan"],
    "Q4": ["Björk"],
    "Q5": ["Jordan Peele", "Michael the Comedian"],
}


@pytest.mark.parametrize(
    ("mention", "gold", "group"),
    [
        ("Michael Jordan", "Q1", "ambiguous"),  # Q2 has both words
        ("JORDAN Michael", "Q2", "ambiguous"),
        ("MJ", "Q1", "unambiguous"),
        ("MJ", "Q2", "ambiguous"),  # its only namesake is another entity
        ("bjork", "Q4", "unambiguous"),
        ("Peele Michael", "Q5", "unambiguous"),  # no single name has both words
        ("nobody", "Q3", "unambiguous"),
        ("nobody", NIL, None),
        ("Björk", NIL, None),
        ("Jord", "Q3", "unambiguous"),  # words, not letters
        ("Michael B.Jordan", "Q2", "unambiguous"),
        ("", "Q3", None),  # a visual mention
        ("?!", "Q3", None),
        (None, "Q3", None),
    ],
)
def test_a_name_is_ambiguous_if_another_entity_has_all_its_words(mention, gold, group):
    rows = datasets.Dataset.from_dict({"context_id": ["c"], "mention": [mention], "entity_id": [gold]})
    assert strata_of(rows, entity_names=NAMES)["name of mention"] == [group]


LETTERS = st.text("ab ", max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(LETTERS, st.integers(0, 3)), min_size=1, max_size=6),
    st.lists(st.lists(LETTERS, min_size=1, max_size=3), min_size=4, max_size=4),
)
def test_ambiguous_names_are_those_of_every_pair_by_hand(pairs, names):
    by_id = {f"Q{k}": each for k, each in enumerate(names)}
    rows = mentions(
        context_id=["c"] * len(pairs), mention=[m for m, _ in pairs], entity_id=[f"Q{gold}" for _, gold in pairs]
    )
    for group, (mention, gold) in zip(strata_of(rows, entity_names=by_id)["name of mention"], pairs, strict=True):
        others = [name for k, each in enumerate(names) if k != gold for name in each]
        has_namesake = any(all(word in name.split() for word in mention.split()) for name in others)
        assert group == (None if not mention.split() else "ambiguous" if has_namesake else "unambiguous")


def test_names_come_from_the_rows_that_have_them():
    columns = {"entity_id": ["Q1", "Q2"], "name": ["Ghana", None], "aliases": [["Gold Coast", None], None]}
    entities = datasets.Dataset.from_dict(columns)
    assert names_by_id(entities) == {"Q1": ["Ghana", "Gold Coast"], "Q2": [""]}
    assert names_by_id(entities.remove_columns("aliases")) == {"Q1": ["Ghana"], "Q2": [""]}
    assert names_by_id(entities.select_columns(["entity_id"])) is None


def test_an_unknown_column_is_an_error():
    with pytest.raises(DataFormatError, match=r"no column genre .*context_id, entity_id"):
        strata_of(mentions(), ["genre"])


def test_mentions_with_and_without_an_image_are_told_apart_without_decoding():
    mentions = toy_mentions(12, 6)
    pictured = [row["image"] is not None for row in mentions]
    assert len(set(pictured)) == 2
    assert has_image(mentions) == pictured
    chosen = mentions.select([5, 2, 9, 2])
    assert has_image(chosen) == [pictured[row] for row in (5, 2, 9, 2)]
    damaged = datasets.Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}, None]}).cast_column(
        "image", datasets.Image()
    )
    assert has_image(damaged) == [True, False]
    labels = strata_of(mentions)["image of mention"]
    assert labels == ["with" if is_pictured else "without" for is_pictured in pictured]
    only = mentions.select([row for row, is_pictured in enumerate(pictured) if is_pictured])
    assert "image of mention" not in strata_of(only)
