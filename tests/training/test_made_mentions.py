"""Made mentions: consistent spans, no name left beside the surface form, draws that depend on the entity alone."""

from __future__ import annotations

import random

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.names import words_of
from hf_mel.schema import NO_SPAN, entity_features, mention_features
from hf_mel.training.made_mentions import look_alike_groups, made_mentions, without_names
from tests.toy import toy_entities


def entities_of(*rows: dict) -> datasets.Dataset:
    """Entities with empty columns where a row has none."""
    empty = {"description": "", "attributes": "", "aliases": [], "images": []}
    full = [{"entity_id": f"Q{number}", **empty, **row} for number, row in enumerate(rows, 1)]
    return datasets.Dataset.from_list(full, features=entity_features())


ORME = {
    "name": "Orme, Ada Maria",
    "aliases": ["A. M. Falk"],
    "description": "Ada Maria Orme was a painter in Lisbon. She taught for years. In 1850 Orme left the city with Bo.",
    "attributes": "Born: 1812-03-11, Porto. Life: 1812–1870.",
}
LUND = {"name": "Cy Lund", "description": "sculptor", "attributes": "Born: 1901, Bergen."}


def test_every_mention_stands_where_it_says_and_is_a_form_of_a_name():
    entities = entities_of(ORME, LUND)
    mentions = made_mentions(entities, 200)
    assert mentions.features == mention_features()
    assert len(set(mentions["mention_id"])) == len(mentions)
    words = {"Q1": words_of("Orme Ada Maria A M Falk"), "Q2": words_of("Cy Lund C")}
    for row in mentions:
        if row["start"] == NO_SPAN:
            assert (row["mention"], row["end"]) == ("", NO_SPAN)
        else:
            assert row["text"][row["start"] : row["end"]] == row["mention"]
            assert row["mention"]
        assert words_of(row["mention"]) <= words[row["entity_id"]]


def test_forms_of_a_name_are_whole_parts_initials_and_aliases_in_the_usual_order():
    surfaces = set(made_mentions(entities_of(ORME, LUND), 300)["mention"])
    for expected in ("Ada Maria Orme", "Orme", "Ada", "Maria Orme", "A. Orme", "A. M. Orme", "A. M. Falk", ""):
        assert expected in surfaces, expected
    assert not any("," in surface for surface in surfaces)


def test_the_text_around_the_surface_form_does_not_name_the_entity():
    mentions = made_mentions(entities_of(ORME, LUND), 300)
    for row in mentions.filter(lambda row: row["entity_id"] == "Q1"):
        around = row["text"] if row["start"] == NO_SPAN else row["text"][: row["start"]] + row["text"][row["end"] :]
        assert not words_of(around) & {"orme", "ada", "falk"}, row["text"]


def test_what_is_known_is_told_and_dates_become_years():
    texts = [row["text"] for row in made_mentions(entities_of(ORME, LUND), 300) if row["entity_id"] == "Q1"]
    for fact in ("Porto", "She taught for years", "was a painter in Lisbon", "1812", "1870"):
        assert any(fact in text for text in texts), fact
    assert not any("1812-03" in text for text in texts)


def test_an_entity_with_a_name_alone_is_mentioned_by_it_and_one_without_anything_is_not():
    mentions = made_mentions(entities_of({"name": "Solo"}, {"name": ""}), 50)
    assert set(mentions["entity_id"]) == {"Q1"}
    assert set(mentions["mention"]) == {"Solo"}
    texts = mentions["text"]
    assert len(texts) == len(set(texts))  # equal mentions are made once


def test_images_are_those_of_the_entity_and_are_not_decoded():
    entities = toy_entities(4)
    mentions = made_mentions(entities, 6)
    undecoded = {
        row["entity_id"]: {image["bytes"] for image in row["images"]} for row in _undecoded(entities, "images")
    }
    for row in mentions.cast_column("image", datasets.Image(decode=False)):
        image = row["image"]
        assert image["bytes"] in undecoded[row["entity_id"]] if image else not undecoded[row["entity_id"]]


def _undecoded(entities: datasets.Dataset, column: str) -> datasets.Dataset:
    return entities.cast_column(column, datasets.List(datasets.Image(decode=False)))


def test_the_seed_and_the_entity_decide_and_the_order_of_others_does_not():
    entities = entities_of(ORME, LUND)
    first, again = made_mentions(entities, 5, seed=3), made_mentions(entities, 5, seed=3)
    assert first.to_list() == again.to_list()
    assert first.to_list() != made_mentions(entities, 5, seed=4).to_list()
    chosen = made_mentions(entities, 5, seed=3, chosen=[1])
    assert chosen.to_list() == [row for row in first.to_list() if row["entity_id"] == "Q2"]


@given(st.lists(st.sampled_from(["Ada Orme", "Orme, Bo", "Cy Lund", "Lund", "", "Bo Orme Jr."]), max_size=12))
def test_look_alike_groups_hold_every_row_once_and_end_in_the_same_word(names):
    groups = list(look_alike_groups(names, random.Random(0)))
    assert sorted(row for group in groups for row in group) == list(range(len(names)))
    last = {"Ada Orme": "orme", "Orme, Bo": "orme", "Bo Orme Jr.": "orme", "Cy Lund": "lund", "Lund": "lund", "": ""}
    assert [len({last[names[row]] for row in group}) for group in groups] == [1] * len(groups)
    assert len({last[names[group[0]]] for group in groups}) == len(groups)


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("Ada Orme met Adam Ormeson and ORME.", ["Ada Orme"], "met Adam Ormeson and ."),
        ("Of Ur and the city", ["Ur of Of"], "Of Ur and the city"),
        ("nothing here", [""], "nothing here"),
        ("C++ (C++) is old", ["C++"], "( ) is old"),
    ],
)
def test_names_are_taken_out_as_whole_words(text, names, expected):
    assert without_names(text, names) == expected
