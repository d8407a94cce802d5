"""Names: folding, words, and namesakes against a plain comparison."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.names import fold_name, has_all_words, namesakes_of


@pytest.mark.parametrize(
    "names",
    [
        ("GHANA", "Ghana", "ghana"),
        ("Côte d'Ivoire", "COTE D'IVOIRE", unicodedata.normalize("NFD", "Côte d'Ivoire")),
        ("Straße", "STRASSE", "STRAẞE"),
        ("DİYARBAKIR", "Diyarbakır", "diyarbakir"),  # Turkish dotted and dotless i
        ("ISPARTA", "Isparta", "ısparta"),
        ("ﬁnland", "Finland"),
        ("Ｇｈａｎａ", "Ghana"),
        ("Æthelred", "AETHELRED"),
        ("Łódź", "LODZ"),
        ("Søren", "soren"),
        ("Nguyễn Đình", "nguyen dinh"),
        ("Αθήνα", "ΑΘΗΝΑ"),
        ("Νίκος", "ΝΙΚΟΣ"),
        ("Ёлка", "ёлка", unicodedata.normalize("NFD", "ёлка")),
        ("서울", unicodedata.normalize("NFD", "서울")),
    ],
)
def test_spellings_of_one_name_fold_to_the_same(names):
    assert len({fold_name(name) for name in names}) == 1


@pytest.mark.parametrize(
    "name", ["القاهرة", "أحمد", "עִבְרִית", "北京", "がっこう", "ガーナ", "서울", "йод", "हिन्दी", "ประเทศไทย", "தமிழ்", ""]
)
def test_marks_that_are_no_accents_are_kept(name):
    assert fold_name(name) == unicodedata.normalize("NFC", name)


@pytest.mark.parametrize(
    ("surface", "names", "expected"),
    [
        ("Swift", ["Taylor Swift"], True),
        ("swift TAYLOR", ["Taylor Swift"], True),
        ("Taylor Swift", ["Taylor", "Swift"], False),  # no single name has both words
        ("Tay", ["Taylor Swift"], False),  # a part of a word
        ("Tay", ["Taylor Swift", "Tay-Tay"], True),
        ("Beyonce", ["Beyoncé Knowles"], True),
        ("", ["Taylor Swift"], False),
        ("😀!", ["😀!"], False),  # no word
        ("Swift", [], False),
    ],
)
def test_an_entity_is_a_namesake_if_one_name_has_all_words(surface, names, expected):
    assert has_all_words(surface, names) is expected


@given(
    st.lists(st.text("ab É", max_size=5), min_size=1, max_size=4),
    st.lists(st.lists(st.text("ab É", max_size=5), max_size=3), max_size=5),
)
def test_namesakes_are_the_entities_that_have_all_words(surfaces, names):
    by_id = {str(row): names_of_entity for row, names_of_entity in enumerate(names)}
    assert namesakes_of(surfaces, by_id) == {
        surface: {entity_id for entity_id, entity_names in by_id.items() if has_all_words(surface, entity_names)}
        for surface in surfaces
    }
